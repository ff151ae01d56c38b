"""Locates published weights by name and downloads them into a cache.

timm's weights come from the Hugging Face hub if `huggingface_hub` is installed (the extra `hub`),
into the cache of the hub. Otherwise they come, like the authors' weights, over https from the place
of their first publication, into $NFNETS_JAX_CACHE (by default ~/.cache/nfnets_jax).
HF_HUB_OFFLINE=1 forbids every download. No downloaded file is executed: `weight_files` reads it.
"""

import contextlib
import fcntl
import hashlib
import http.client
import logging
import os
import pathlib
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

from nfnets_jax.errors import UsageError, first_line, nearest

_RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0)  # to wait after each connection that was lost
_TIMEOUT_SECONDS = 30.0  # without a byte
_CHUNK = 1 << 20


class Source(NamedTuple):
    """Location of published weights.

    Attributes:
      name: 'NFNet-F0' for the authors' weights, 'timm/eca_nfnet_l0.ra2_in1k' for timm's.
      repo: repository on the Hugging Face hub, '' if there is none.
      url: URL of a file, '' if there is none.
      digits: the known first digits of the SHA-256 of the file.
    """

    name: str
    repo: str
    url: str
    digits: str

    @property
    def file(self) -> str:
        return self.url.rpartition('/')[2]


_AUTHORS = 'https://storage.googleapis.com/dm-nfnets'
_TIMM = 'https://github.com/huggingface/pytorch-image-models/releases/download'
# The hub's name, the release's file: it ends in eight digits of its SHA-256.
_TIMM_FILES = {
    'dm_nfnet_f0.dm_in1k': 'v0.1-dnf-weights/dm_nfnet_f0-604f9c3a.pth',
    'dm_nfnet_f1.dm_in1k': 'v0.1-dnf-weights/dm_nfnet_f1-fc540f82.pth',
    'dm_nfnet_f2.dm_in1k': 'v0.1-dnf-weights/dm_nfnet_f2-89875923.pth',
    'dm_nfnet_f3.dm_in1k': 'v0.1-dnf-weights/dm_nfnet_f3-d74ab3aa.pth',
    'dm_nfnet_f4.dm_in1k': 'v0.1-dnf-weights/dm_nfnet_f4-0ac5b10b.pth',
    'dm_nfnet_f5.dm_in1k': 'v0.1-dnf-weights/dm_nfnet_f5-ecb20ab1.pth',
    'dm_nfnet_f6.dm_in1k': 'v0.1-dnf-weights/dm_nfnet_f6-e0f12116.pth',
    'nfnet_l0.ra2_in1k': 'v0.1-weights/nfnet_l0_ra2-45c6688d.pth',
    'eca_nfnet_l0.ra2_in1k': 'v0.1-weights/ecanfnet_l0_ra2-e3e9ac50.pth',
    'eca_nfnet_l1.ra2_in1k': 'v0.1-weights/ecanfnet_l1_ra2-7dce93cd.pth',
    'eca_nfnet_l2.ra3_in1k': 'v0.1-weights/ecanfnet_l2_ra3-da781a61.pth',
    'nf_resnet50.ra2_in1k': 'v0.1-weights/nf_resnet50_ra2-9f236009.pth',
    'nf_regnet_b1.ra2_in1k': 'v0.1-weights/nf_regnet_b1_256_ra2-ad85cfef.pth',
    'test_nfnet.r160_in1k': '',
}


def _sources() -> Iterator[Source]:
    for level in range(7):
        yield Source(f'NFNet-F{level}', '', f'{_AUTHORS}/F{level}_haiku.npz', '')
    for name, file in _TIMM_FILES.items():
        digits = file[-12:-4]
        yield Source(f'timm/{name}', f'timm/{name}', file and f'{_TIMM}/{file}', digits)


SOURCES: dict[str, Source] = {source.name: source for source in _sources()}


def list_pretrained() -> list[str]:
    """Returns the names of published weights that `load_pretrained` and `from_pretrained` know.

    Both also accept timm's names without 'timm/' and without the part after the dot:
    'eca_nfnet_l0'.
    """
    return list(SOURCES)


def find(name: str | os.PathLike) -> Source | None:
    """Returns the source of the published weights with this name, None if there are none."""
    text = os.fspath(name)
    for source in SOURCES.values():
        short = source.name.removeprefix('timm/')
        if text in (source.name, short) or text.removeprefix('timm/') == short.partition('.')[0]:
            return source
    return None


def locate(path: str | os.PathLike) -> str | os.PathLike:
    """Returns the path of weights; downloads weights given by name into the cache if needed.

    An existing path has precedence over a name.

    Raises:
      UsageError: the download fails; the message has the command to do it by hand.
    """
    if os.path.exists(path):
        return path
    if (source := find(path)) is None:
        text = os.fspath(path)
        if isinstance(text, str) and not set(text) & {'.', os.sep}:
            short = {name.removeprefix('timm/').partition('.')[0] for name in SOURCES}
            raise UsageError(f'{text}: no such file, nor weights{nearest(text, sorted(short))}')
        return path
    if source.repo and (hub := _hub()):
        return _from_hub(hub, source)
    if not source.url:
        raise UsageError(
            f'{source.name} is on the Hugging Face hub only: pip install "nfnets_jax[hub]"'
        )
    return fetch(source.url, cache_directory() / source.file, source.digits)


def cache_directory() -> pathlib.Path:
    """Returns the directory of files downloaded over https."""
    if own := os.environ.get('NFNETS_JAX_CACHE'):
        return pathlib.Path(own)
    return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'nfnets_jax'


def fetch(url: str, path: pathlib.Path, digits: str = '') -> pathlib.Path:
    """Downloads a file unless it exists, and verifies its checksum.

    An interrupted download resumes, in this call and the next. Processes that need the same file
    wait for the first of them. The SHA-256 is stored beside the file, and a later download must
    match it.

    Args:
      url: http or https.
      path: destination.
      digits: the first digits of the expected SHA-256.

    Raises:
      UsageError: the download fails; the message has the command to do it by hand.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f'{path.name}.lock'), 'a') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            known = path.with_name(f'{path.name}.sha256')
            if path.exists() and known.exists():
                return path
            part = path.with_name(f'{path.name}.part')
            if not path.exists():  # Else the user has put it there.
                if _is_offline():
                    raise UsageError(f'{path.name} is not in the cache, and HF_HUB_OFFLINE is set')
                _receive(url, part)
            whole = path if path.exists() else part
            _check(whole, known.read_text().strip() if known.exists() else digits, url, known)
            os.replace(whole, path)
            return path
    except UsageError as error:
        raise UsageError(f'{error}; by hand: curl -L -o {path} {url}') from error
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UsageError(f'{error.filename or path} cannot be written: {reason}') from error


def _check(path: pathlib.Path, expected: str, url: str, known: pathlib.Path) -> None:
    with open(path, 'rb') as file:
        found = hashlib.file_digest(file, 'sha256').hexdigest()
    if not found.startswith(expected):
        if path.suffix == '.part':
            path.unlink()  # It cannot be resumed.
        where = f', as {known} says' if len(expected) == len(found) else ''
        raise UsageError(f'{url}: its SHA-256 begins with {found[:8]}, not {expected[:8]}{where}')
    known.write_text(f'{found}\n')


def _receive(url: str, part: pathlib.Path) -> None:
    """Downloads to `part`, resuming at its end."""
    for wait in (*_RETRY_SECONDS, None):
        before = part.stat().st_size if part.exists() else 0
        try:
            return _receive_rest(url, part)
        except urllib.error.HTTPError as error:
            reason, is_final = f'{error.code} {error.reason}', error.code < 500
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError) as error:
            reason = first_line(getattr(error, 'reason', error))
            # Do not retry a server that cannot be reached at all.
            is_final = isinstance(error, urllib.error.URLError)
        except TimeoutError:
            reason, is_final = f'nothing came for {_TIMEOUT_SECONDS:.0f} s', False
        has_grown = part.exists() and part.stat().st_size > before
        if wait is None or (is_final and not has_grown):
            raise UsageError(f'{url} cannot be downloaded: {reason}')
        time.sleep(wait)
    return None


def _receive_rest(url: str, part: pathlib.Path) -> None:
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={'Range': f'bytes={start}-'} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not start:
            raise
        if error.headers.get('Content-Range') == f'bytes */{start}':
            return  # It is whole.
        part.unlink()
        raise ConnectionError('the file has changed') from error
    with response:
        if url.startswith('https:') and not response.url.startswith('https:'):
            raise UsageError(f'{url} leads to {response.url}, which is not https')
        total = _total(response, start)
        if total is None:  # The response is not a continuation.
            start, total = 0, int(response.headers.get('Content-Length') or 0)
        if not total:
            raise UsageError(f'{url} does not have a size')
        if (free := shutil.disk_usage(part.parent).free) < total - start:
            raise UsageError(
                f'{part.parent} is full: {(total - start) / 1e6:.1f} MB are needed and '
                f'{free / 1e6:.1f} MB free'
            )
        with open(part, 'r+b' if start else 'wb') as file, _progress(part, start, total) as report:
            file.seek(start)
            while start < total:
                if not (chunk := _read(response, min(_CHUNK, total - start))):
                    raise ConnectionError(f'it ended after {start} of {total} bytes')
                file.write(chunk)
                start += len(chunk)
                report(len(chunk))
            file.truncate()
            file.flush()
            os.fsync(file.fileno())


def _read(response: Any, count: int) -> bytes:
    """Reads from the network, whose errors are a ConnectionError here; a disk has others."""
    try:
        return response.read(count)
    except (ConnectionError, TimeoutError):
        raise
    except OSError as error:  # of TLS, or no route to the host any more
        raise ConnectionError(error.strerror or first_line(error)) from error


def _total(response: Any, start: int) -> int | None:
    """Returns the size of the file that a response continues at `start`, None if it does not."""
    pattern = rf'bytes {start}-\d+/(\d+)'
    match = re.fullmatch(pattern, response.headers.get('Content-Range') or '')
    return int(match[1]) if match and response.status == http.HTTPStatus.PARTIAL_CONTENT else None


@contextlib.contextmanager
def _progress(part: pathlib.Path, start: int, total: int) -> Iterator[Any]:
    """Shows a progress bar on a terminal if tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        print(f'{part.stem}: {(total - start) / 1e6:.1f} MB', file=sys.stderr)
        yield lambda count: None
        return
    scale = {'unit': 'B', 'unit_scale': True, 'unit_divisor': 1000}
    with tqdm(desc=part.stem, total=total, initial=start, disable=None, **scale) as bar:
        yield bar.update


def _is_offline() -> bool:
    return os.environ.get('HF_HUB_OFFLINE', '').upper() in ('1', 'ON', 'YES', 'TRUE')


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        return None
    return huggingface_hub


def _from_hub(hub: Any, source: Source) -> str:
    by_hand = f'hf download {source.repo} model.safetensors'
    log = logging.getLogger('huggingface_hub')
    level = log.level
    log.setLevel(logging.ERROR)  # The hub logs every attempt; the error below says it once.
    try:
        path = hub.hf_hub_download(source.repo, 'model.safetensors')
    except Exception as error:  # The type depends on the HTTP library, which varies by version.
        reason = first_line(error.__cause__ or error)  # 'Name or service not known'
        raise UsageError(
            f'{source.name} cannot be downloaded: {reason}; by hand: {by_hand}'
        ) from error
    finally:
        log.setLevel(level)
    # The hub names large files by their SHA-256.
    expected = os.path.basename(os.path.realpath(path))
    known = cache_directory() / f'{source.repo.replace("/", "--")}.sha256'
    try:
        if not re.fullmatch('[0-9a-f]{64}', expected):
            expected = known.read_text().strip() if known.exists() else ''
        elif known.exists() and known.read_text().strip() == expected:
            return path
        known.parent.mkdir(parents=True, exist_ok=True)
        _check(pathlib.Path(path), expected, source.name, known)
    except UsageError as error:
        raise UsageError(f'{error}: delete {path}, and again {by_hand}') from error
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UsageError(f'{error.filename or known} cannot be written: {reason}') from error
    return path
