"""Files past the page cache and through it: the same bytes either way."""

import errno
import os

import pytest
import torch

from fkernel.io import direct

SIZES = [0, 1, direct.ALIGNMENT, direct.BUFFER - 1, direct.BUFFER, 2 * direct.BUFFER + 12345]


@pytest.fixture(params=["direct", "no flag", "refused by the file system"])
def way(request, monkeypatch):
    """The three ways to open a file: where the system has no O_DIRECT, and where a file system refuses it."""
    if request.param == "no flag":
        monkeypatch.setattr(direct, "_DIRECT", 0)
    elif request.param == "refused by the file system":
        plain = os.open

        def refusing(path, flags, mode=0o777):
            if flags & direct._DIRECT:
                raise OSError(errno.EINVAL, "no direct access")
            return plain(path, flags, mode)

        monkeypatch.setattr(os, "open", refusing)
    return request.param


def content(size):
    return bytes(torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size)).tolist())


@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_in_any_chunks_is_read(way, size, tmp_path):
    data, path = content(size), tmp_path / "file"
    with direct.open_direct(path, direct.NEW) as file:
        direct.write_direct(file, [data[:7], memoryview(data[7:5000]), data[5000:]])
    assert path.read_bytes() == data
    assert b"".join(bytes(chunk) for chunk in direct.file_chunks(path)) == data
    with direct.open_direct(path) as file:
        for start, stop in ((0, size), (size // 3, size // 2), (size, size)):
            assert bytes(direct.read_direct(file, start, stop).tolist()) == data[start:stop]
        with pytest.raises(ValueError, match=f"it ends at byte {size}"):
            direct.read_direct(file, 0, size + direct.ALIGNMENT)


def test_an_error_of_the_disk_is_no_question_of_alignment(monkeypatch, tmp_path):
    def full(file, view):
        raise OSError(errno.ENOSPC, "full")

    with direct.open_direct(tmp_path / "file", direct.NEW) as file:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="full"):
            direct.write_direct(file, [content(direct.BUFFER)])


def test_a_limit_at_an_odd_place_is_told_as_what_it_is(tmp_path):
    """Past the page cache a write that is cut off at an odd place is invalid; through it the limit is named."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (direct.BUFFER + 1001, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with direct.open_direct(tmp_path / "file", direct.NEW) as file, pytest.raises(OSError, match="large") as caught:
            direct.write_direct(file, [content(3 * direct.BUFFER)])
        assert caught.value.errno == errno.EFBIG
    finally:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)
