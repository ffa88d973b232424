"""Files and directories that are replaced: a reader sees the old or the new, and nothing else is left."""

import os

import pytest

from fkernel.io import atomic_directory, atomic_file


def content(directory):
    return {file.name: file.read_text() for file in directory.iterdir()}


def fill(directory, text, replace=False):
    with atomic_directory(directory, replace) as temporary:
        (temporary / "file").write_text(text)
        assert not directory.exists() or content(directory) == {"file": "old"}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_a_file_whose_writing_is_stopped_stays_as_it_was(tmp_path, stop):
    def write():
        with atomic_file(tmp_path / "file") as temporary:
            temporary.write_text("ne")
            raise stop

    (tmp_path / "file").write_text("old")
    with pytest.raises(stop):
        write()
    assert content(tmp_path) == {"file": "old"}


def test_a_directory_is_replaced_only_where_that_is_asked(tmp_path):
    fill(tmp_path / "folder", "old")
    with pytest.raises(OSError, match="not empty"):
        fill(tmp_path / "folder", "new")
    assert content(tmp_path / "folder") == {"file": "old"}
    fill(tmp_path / "folder", "new", replace=True)
    assert content(tmp_path / "folder") == {"file": "new"}
    assert os.listdir(tmp_path) == ["folder"]
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755


def test_a_directory_comes_back_where_its_successor_cannot_be_renamed(tmp_path, monkeypatch):
    fill(tmp_path / "folder", "old")
    rename, calls = os.rename, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="no"):
        fill(tmp_path / "folder", "new", replace=True)
    assert len(calls) == 3
    assert os.listdir(tmp_path) == ["folder"]
    assert content(tmp_path / "folder") == {"file": "old"}
