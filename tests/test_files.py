import contextlib
import os
import resource

import pytest

from nfnets_jax.errors import UsageError
from nfnets_jax.files import write_whole


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
    write_whole(tmp_path / 'a', b'\x00\xff')
    write_whole(tmp_path / 'a', 'späť')
    assert (tmp_path / 'a').read_text(encoding='utf-8') == 'späť'
    assert os.listdir(tmp_path) == ['a']


def test_what_cannot_be_written_leaves_the_old_file_alone(tmp_path):
    write_whole(tmp_path / 'a', 'old')
    with files_no_larger_than(10), pytest.raises(UsageError, match='a cannot be written: File too'):
        write_whole(tmp_path / 'a', 'new' * 1000)
    assert (tmp_path / 'a').read_text() == 'old'
    assert os.listdir(tmp_path) == ['a']


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match='nowhere/a cannot be written: No such file'):
        write_whole(tmp_path / 'nowhere' / 'a', '')
