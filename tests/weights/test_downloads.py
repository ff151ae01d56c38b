"""Weights by name come whole, from servers and networks that misbehave, or not at all."""

import contextlib
import errno
import hashlib
import http.client
import http.server
import json
import logging
import os
import pathlib
import pickle
import subprocess
import sys
import threading
import types

import numpy as np
import pytest

from nfnets_jax import list_pretrained, load_pretrained, models
from nfnets_jax.errors import UsageError
from nfnets_jax.weights import downloads, pretrained

ROOT = pathlib.Path(__file__).parents[2]
DATA = np.random.RandomState(0).bytes(3_000_000)
SHA = hashlib.sha256(DATA).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `data` under every path, and does what `faults` say, one for each answer."""

    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.data, self.faults, self.ranges = DATA, [], []
        self.url = f'http://127.0.0.1:{self.server_port}/w.npz'


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        data, asked = self.server.data, self.headers.get('Range')
        self.server.ranges.append(asked)
        fault = self.server.faults.pop(0) if self.server.faults else ''
        if isinstance(fault, int):
            self.send_error(fault)
            return
        start = int(asked.removeprefix('bytes=').rstrip('-')) if asked and fault != 'whole' else 0
        if start >= len(data):
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{len(data)}')
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if fault != 'no size':
            self.send_header('Content-Length', str(len(data) - start))
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(data) - 1}/{len(data)}')
        self.end_headers()
        rest = data[start:]
        with contextlib.suppress(OSError):
            self.wfile.write(rest[: len(rest) // 2] if fault == 'drop' else rest)

    def do_HEAD(self):  # The hub's protocol.
        self.send_response(200)
        self.send_header('Content-Length', str(len(self.server.data)))
        self.send_header('ETag', f'"{hashlib.sha256(self.server.data).hexdigest()}"')
        self.send_header('X-Repo-Commit', '0' * 40)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setattr(downloads, '_RETRY_SECONDS', (0.0, 0.0))
    monkeypatch.setattr(downloads, '_hub', lambda: None)
    monkeypatch.delenv('HF_HUB_OFFLINE', raising=False)
    monkeypatch.setenv('NFNETS_JAX_CACHE', str(tmp_path / 'cache'))
    with Server() as server:
        # `shutdown` waits for as long as it polls: half a second, unless it is told.
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'cache' / 'w.npz'


def left(path):
    return sorted(file.name.removeprefix('w.npz') for file in path.parent.iterdir())


def test_a_file_comes_once(server, path):
    for _ in range(2):
        assert downloads.fetch(server.url, path, SHA[:8]).read_bytes() == DATA
    assert server.ranges == [None]
    assert left(path) == ['', '.lock', '.sha256']
    assert path.with_name('w.npz.sha256').read_text() == f'{SHA}\n'


@pytest.mark.parametrize(
    ('faults', 'ranges'),
    [
        (['drop'], [None, 'bytes=1500000-']),
        (['drop', 'drop'], [None, 'bytes=1500000-', 'bytes=2250000-']),
        (['drop', 'whole'], [None, 'bytes=1500000-']),  # It does not know ranges.
        ([503], [None, None]),
    ],
)
def test_what_was_lost_is_continued(faults, ranges, server, path):
    server.faults = faults
    assert downloads.fetch(server.url, path, SHA[:8]).read_bytes() == DATA
    assert server.ranges == ranges


def test_a_download_is_continued_by_the_next_process(server, path):
    server.faults = ['drop'] * 3
    with pytest.raises(UsageError, match=r'ended after 2625000 of 3000000 bytes; by hand: curl'):
        downloads.fetch(server.url, path)
    assert left(path) == ['.lock', '.part']
    assert downloads.fetch(server.url, path).read_bytes() == DATA
    assert server.ranges[-1] == 'bytes=2625000-'


def test_a_part_that_is_whole_or_too_long(server, path):
    path.parent.mkdir()
    part = path.with_name('w.npz.part')
    for beginning in (DATA, DATA + b'more'):
        part.write_bytes(beginning)
        assert downloads.fetch(server.url, path, SHA).read_bytes() == DATA
        path.unlink()


@pytest.mark.parametrize('digits', ['00000000', '0' * 64])
def test_a_wrong_file_is_not_kept(digits, server, path):
    with pytest.raises(UsageError, match=f'SHA-256 begins with {SHA[:8]}, not 00000000') as error:
        downloads.fetch(server.url, path, digits)
    assert f'by hand: curl -L -o {path} {server.url}' in str(error.value)
    assert '\n' not in str(error.value)
    assert left(path) == ['.lock']


def test_a_file_that_comes_anew_must_be_the_same(server, path):
    downloads.fetch(server.url, path).unlink()
    server.data = DATA[::-1]
    with pytest.raises(UsageError, match=r'as .*w\.npz\.sha256 says'):
        downloads.fetch(server.url, path)


def test_what_was_put_there_by_hand_is_checked_and_taken(server, path):
    path.parent.mkdir()
    path.write_bytes(DATA[:-1])
    with pytest.raises(UsageError, match='SHA-256'):
        downloads.fetch(server.url, path, SHA[:8])
    assert path.exists()
    path.write_bytes(DATA)
    assert downloads.fetch(server.url, path, SHA[:8]) == path
    assert server.ranges == []


@pytest.mark.parametrize(
    ('fault', 'message'), [(404, '404 Not Found'), ('no size', 'does not have a size')]
)
def test_what_a_server_refuses_is_told(fault, message, server, path):
    server.faults = [fault]
    with pytest.raises(UsageError, match=message):
        downloads.fetch(server.url, path)
    assert len(server.ranges) == 1


def test_without_a_network(server, path, monkeypatch):
    with pytest.raises(UsageError, match=r'cannot be downloaded: .*refused.*; by hand: curl -L'):
        downloads.fetch('http://127.0.0.1:1/w.npz', path)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(UsageError, match='w.npz is not in the cache, and HF_HUB_OFFLINE is set'):
        downloads.fetch(server.url, path)
    assert server.ranges == []
    monkeypatch.delenv('HF_HUB_OFFLINE')
    downloads.fetch(server.url, path)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    assert downloads.fetch(server.url, path) == path


def test_a_network_that_fails_is_not_a_disk_that_does(server, path, monkeypatch):
    def read(response, *_):
        raise OSError(errno.EHOSTUNREACH, 'No route to host')

    with monkeypatch.context() as patch:
        patch.setattr(http.client.HTTPResponse, 'read', read)
        with pytest.raises(UsageError, match='cannot be downloaded: No route to host; by hand'):
            downloads.fetch(server.url, path)
    assert downloads.fetch(server.url, path, SHA).read_bytes() == DATA


def test_a_full_disk(server, path, monkeypatch):
    with monkeypatch.context() as patch:
        usage = type(downloads.shutil.disk_usage('/'))(4, 3, 1)
        patch.setattr(downloads.shutil, 'disk_usage', lambda path: usage)
        with pytest.raises(UsageError, match='is full: 3.0 MB are needed and 0.0 MB free'):
            downloads.fetch(server.url, path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:  # Filled by another, meanwhile.
        patch.setattr(downloads.os, 'fsync', full)
        with pytest.raises(UsageError, match='cannot be written: No space left on device'):
            downloads.fetch(server.url, path)
    assert not path.exists()
    assert downloads.fetch(server.url, path).read_bytes() == DATA


def test_two_processes_get_one_file(server, path):
    code = (
        'import pathlib, sys; from nfnets_jax.weights import downloads;'
        'print(len(downloads.fetch(sys.argv[1], pathlib.Path(sys.argv[2])).read_bytes()))'
    )
    command = [sys.executable, '-c', code, server.url, str(path)]
    both = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [process.communicate()[0] for process in both] == [f'{len(DATA)}\n'] * 2
    assert server.ranges == [None]


@pytest.mark.parametrize('num_classes', [3, 1000])
def test_weights_by_name(num_classes, server, monkeypatch, tmp_path):
    """From the name to the parameters, and to the names of ImageNet's classes."""
    metadata = pretrained.Metadata(model='NF-ResNet-8', num_classes=num_classes)
    shapes = pretrained.variable_shapes(metadata)[0]
    arrays = {name: np.ones(leaf.shape, 'f4') for name, leaf in pretrained.flatten(shapes).items()}
    np.savez(tmp_path / 'w.npz', **arrays)
    server.data = (tmp_path / 'w.npz').read_bytes()
    source = downloads.Source('NFNet-F0', '', server.url, '')
    monkeypatch.setitem(downloads.SOURCES, 'NFNet-F0', source)
    weights = load_pretrained('NFNet-F0')
    assert weights.metadata.model == 'NF-ResNet-8'
    np.testing.assert_equal(pretrained.flatten(weights.params), arrays)
    assert pretrained.load_metadata('NFNet-F0') == weights.metadata
    names = load_pretrained('NFNet-F0').metadata.class_names  # read ahead by load_metadata
    assert names == weights.metadata.class_names
    assert len(names) == (1000 if num_classes == 1000 else 0)
    assert names == tuple(sorted(names))
    assert names[207:208] == (('n02099601',) if names else ())  # golden retriever
    assert not load_pretrained(tmp_path / 'w.npz').metadata.class_names


def test_a_hostile_file_is_not_run(server, monkeypatch):
    class Hostile:
        def __reduce__(self):
            return exec, ('raise SystemExit',)

    server.data = pickle.dumps({'NFNet/~/linear': {'w': Hostile()}})
    source = downloads.Source('NFNet-F0', '', server.url, '')
    monkeypatch.setitem(downloads.SOURCES, 'NFNet-F0', source)
    with pytest.raises(UsageError, match=r'builtins\.exec, which is not run'):
        load_pretrained('NFNet-F0')


HUB = """
import json, sys
from nfnets_jax.weights import downloads
from nfnets_jax.errors import UsageError
try:
    print(json.dumps(open(downloads.locate('eca_nfnet_l0'), 'rb').read().hex()))
except UsageError as error:
    print(json.dumps(str(error)))
"""


def test_the_hub(server, tmp_path):
    pytest.importorskip('huggingface_hub', reason='an optional extra')
    server.data = b'abcdefgh' * 20
    address = server.url.rpartition('/')[0]
    environment = os.environ | {'HF_ENDPOINT': address, 'HF_HOME': str(tmp_path / 'hub')}

    def locate(**more):
        done = subprocess.run(
            [sys.executable, '-c', HUB],
            cwd=ROOT,
            env=environment | more,
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)

    assert 'by hand: hf download timm/eca_nfnet_l0.ra2_in1k' in locate(HF_HUB_OFFLINE='1')
    assert locate() == server.data.hex()
    assert locate(HF_HUB_OFFLINE='1') == server.data.hex()
    (blob,) = (tmp_path / 'hub').rglob('blobs/' + hashlib.sha256(server.data).hexdigest())
    for known in (tmp_path / 'cache').glob('*.sha256'):
        known.unlink()
    blob.write_bytes(b'damaged')
    assert 'its SHA-256 begins with' in locate(HF_HUB_OFFLINE='1')


def test_a_hub_that_cannot_be_reached_is_one_line(server, monkeypatch, caplog):
    class Hub:
        @staticmethod
        def hf_hub_download(repo, file):
            logging.getLogger('huggingface_hub.utils._http').warning('Retrying in 1s')
            raise RuntimeError('cannot find the requested files') from OSError('no such host')

    monkeypatch.setattr(downloads, '_hub', lambda: Hub)
    with pytest.raises(UsageError, match='cannot be downloaded: no such host; by hand: hf'):
        downloads.locate('test_nfnet')
    assert not caplog.records


def test_a_cache_that_cannot_be_written_is_one_line(server, monkeypatch, tmp_path):
    (tmp_path / 'hub').write_bytes(b'weights')
    hub = types.SimpleNamespace(hf_hub_download=lambda repo, file: str(tmp_path / 'hub'))
    monkeypatch.setattr(downloads, '_hub', lambda: hub)
    (tmp_path / 'cache').touch()
    with pytest.raises(UsageError, match='cache.* cannot be written: '):
        downloads.locate('test_nfnet')


def test_names():
    names = list_pretrained()
    assert {'NFNet-F6', 'timm/eca_nfnet_l0.ra2_in1k', 'timm/test_nfnet.r160_in1k'} <= {*names}
    for name in names:
        short = name.removeprefix('timm/').partition('.')[0]
        assert models.find_variant(short), name
        for spelled in (name, name.removeprefix('timm/'), short):
            assert downloads.find(spelled).name == name
    assert downloads.find('eca_nfnet_l0').digits == 'e3e9ac50'
    assert downloads.find('timm/eca_nfnet_l0').url.endswith('/ecanfnet_l0_ra2-e3e9ac50.pth')
    assert downloads.find('NF-ResNet-50') is downloads.find('w.npz') is None
    with pytest.raises(UsageError, match=r"eca_nfnet_l9: no such file, .*'eca_nfnet_l\d'"):
        load_pretrained('eca_nfnet_l9')


def test_what_is_on_the_hub_only_says_what_to_install(server):
    with pytest.raises(UsageError, match=r'pip install "nfnets_jax\[hub\]"'):
        load_pretrained('test_nfnet')


def test_a_path_has_precedence(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path('NFNet-F0').write_bytes(b'mine')
    assert downloads.locate('NFNet-F0') == 'NFNet-F0'
