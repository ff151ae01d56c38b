import contextlib
import getpass
import os
import pathlib
import pwd
import resource

import pytest

from nfnets_jax.errors import UsageError
from nfnets_jax.files import atomic_write, expand, make_directory


@contextlib.contextmanager
def files_no_larger_than(size):
    """As a disk that fills up: the kernel refuses to write more than so many bytes to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_bytes_and_text_replace_what_was_there(tmp_path):
    atomic_write(tmp_path / 'a', b'\x00\xff')
    atomic_write(tmp_path / 'a', 'späť')
    assert (tmp_path / 'a').read_text(encoding='utf-8') == 'späť'
    assert os.listdir(tmp_path) == ['a']


def test_what_cannot_be_written_leaves_the_old_file_alone(tmp_path):
    atomic_write(tmp_path / 'a', 'old')
    with files_no_larger_than(10), pytest.raises(UsageError, match='a cannot be written: File too'):
        atomic_write(tmp_path / 'a', 'new' * 1000)
    assert (tmp_path / 'a').read_text() == 'old'
    assert os.listdir(tmp_path) == ['a']


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match='nowhere/a cannot be written: No such file'):
        atomic_write(tmp_path / 'nowhere' / 'a', '')


def test_directories_are_made_or_refused(tmp_path):
    assert make_directory(tmp_path / 'a' / 'b').is_dir()
    assert make_directory(str(tmp_path / 'a')) == tmp_path / 'a'
    (tmp_path / 'file').touch()
    with pytest.raises(UsageError, match='file is a file: give a directory$'):
        make_directory(tmp_path / 'file')
    with pytest.raises(UsageError, match='cannot be written: Not a directory$'):
        make_directory(tmp_path / 'file' / 'a')


def test_a_path_is_what_a_shell_makes_of_it(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert expand('~') == str(tmp_path)
    assert expand(pathlib.Path('~/a')) == f'{tmp_path}/a'
    assert expand(f'~{getpass.getuser()}') == pwd.getpwnam(getpass.getuser()).pw_dir
    assert expand('runs/~/a') == 'runs/~/a'
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"~nobody-here/a: there is no user 'nobody-here'"):
        expand('~nobody-here/a')
    pathlib.Path('~nobody-here').touch()
    assert expand('~nobody-here') == '~nobody-here', 'a file of that name'


def test_text_with_bytes_of_a_file_name_is_written(tmp_path):
    atomic_write(tmp_path / 'page', os.fsdecode(b'caf\xc3\xa9 \xff'))
    assert (tmp_path / 'page').read_text(encoding='utf-8') == 'café \\udcff'
