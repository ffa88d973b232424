"""Files and directories that are replaced: a reader sees the old or the new, and nothing else is left."""

import errno
import os
import sys
import time
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

from fkernel.errors import StoreError
from fkernel.io import (
    append_line,
    atomic_directory,
    atomic_file,
    atomic_write,
    check_writable,
    cut_partial_line,
    explained,
    is_temporary,
    locked,
    make_directory,
    remove_directory,
    sweep,
    temporary,
)
from fkernel.io.temporary import DAY, temporary_beside
from tests.torture.leftovers import dead_beside
from tests.torture.operations import watched


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


@pytest.mark.parametrize("write", [atomic_write, fill])
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path, write):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "target")
    for text in ("old", "new"):
        if write is fill:
            fill(tmp_path / "link", text, replace=True)
            assert content(tmp_path / "elsewhere" / "target") == {"file": text}
        else:
            atomic_write(tmp_path / "link", [text.encode()])
            assert (tmp_path / "elsewhere" / "target").read_text() == text
        assert (tmp_path / "link").is_symlink()
        assert os.listdir(tmp_path / "elsewhere") == ["target"]


def test_what_gets_a_name_is_on_the_disk_before(tmp_path):
    """A power cut leaves the old or the new, and never an empty file: nothing that is not flushed is renamed."""
    with watched(tmp_path) as disk:
        make_directory(tmp_path / "a" / "b")
        atomic_write(tmp_path / "a" / "file", [b"x"])
        with atomic_file(tmp_path / "other") as temporary:
            temporary.write_text("x")
        with atomic_directory(tmp_path / "folder") as temporary:
            (temporary / "inside").mkdir()
            (temporary / "inside" / "file").write_text("x")
        append_line(tmp_path / "lines", b"one\n")
    assert {"open", "write", "mkdir", "replace", "rename", "fsync"} == {*disk.names}
    assert not disk.unsafe
    assert not disk.dirty
    with watched(tmp_path) as disk:
        (tmp_path / "new").write_text("x")
        (tmp_path / "new").rename(tmp_path / "renamed")
    assert disk.unsafe == [str(tmp_path / "renamed")]


# ------------------------------------------------------------------------------------------------ what others have left


def test_the_first_write_into_a_folder_sweeps_what_the_dead_left_there(tmp_path, monkeypatch):
    monkeypatch.setattr(temporary, "_swept", set())
    dead_beside(tmp_path / "file").write_text("half")
    (made := dead_beside(tmp_path / "folder")).mkdir()
    (made / "inside").touch()
    alive = temporary_beside(tmp_path / "another")
    alive.touch()
    (tmp_path / "users.tmp").touch()
    dead_beside(tmp_path / "later").touch()
    sweep(tmp_path)
    assert {*os.listdir(tmp_path)} == {alive.name, "users.tmp"}


def test_a_write_of_a_new_process_sweeps_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(temporary, "_swept", set())
    with monkeypatch.context() as patch:
        patch.setattr(temporary, "_swept", {(os.getpid(), str(tmp_path))})
        dead_beside(tmp_path / "file").touch()
    atomic_write(tmp_path / "other", [b"x"])
    assert os.listdir(tmp_path) == ["other"]


WRITES = """
import sys
from pathlib import Path
from fkernel.io.temporary import temporary_beside
temporary_beside(Path(sys.argv[1])).touch()
print("made", flush=True)
input()
"""


def test_a_writer_that_lives_keeps_its_files_and_one_that_was_killed_does_not(tmp_path):
    command = [sys.executable, "-c", WRITES, str(tmp_path / "x")]
    with Popen(command, cwd=Path(__file__).parent.parent, stdin=PIPE, stdout=PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"made\n"
        sweep(tmp_path)
        assert len(os.listdir(tmp_path)) == 1
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie, as nobody has asked for its status
        sweep(tmp_path)
        assert not os.listdir(tmp_path)


def test_a_later_process_with_the_same_number_is_another_one(tmp_path):
    name = temporary_beside(tmp_path / "x").name
    start = name.rpartition("-")[0].rpartition("-")[2]
    (tmp_path / name.replace(f"-{start}-", "-1-")).touch()
    sweep(tmp_path)
    assert not os.listdir(tmp_path)


def test_what_another_machine_left_is_swept_after_a_day(tmp_path, monkeypatch):
    left = temporary_beside(tmp_path / "x")
    left.touch()
    monkeypatch.setattr(temporary, "_machine", lambda: "00000000")
    sweep(tmp_path)
    assert left.exists()
    before = time.time() - DAY - 1
    os.utime(left, (before, before))
    sweep(tmp_path)
    assert not left.exists()


@pytest.mark.parametrize("successor", [False, True])
def test_a_folder_that_was_moved_aside_comes_back_unless_its_successor_came(tmp_path, successor):
    (aside := dead_beside(tmp_path / "folder", old=True)).mkdir()
    (aside / "file").write_text("old")
    if successor:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "file").write_text("new")
    sweep(tmp_path)
    assert os.listdir(tmp_path) == ["folder"]
    assert content(tmp_path / "folder") == {"file": "new" if successor else "old"}


def test_a_removal_that_is_cut_short_leaves_no_half_folder(tmp_path, monkeypatch):
    make_directory(tmp_path / "folder" / "inside")
    (tmp_path / "folder" / "file").touch()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *given, **more: None)
        remove_directory(tmp_path / "folder")
    assert [is_temporary(name) for name in os.listdir(tmp_path)] == [True]
    remove_directory(tmp_path / "folder")  # which is gone


# -------------------------------------------------------------------------------------------------- what systems refuse


@pytest.mark.parametrize(
    ("number", "what"),
    [
        (errno.ENOSPC, "the disk is full; make room"),
        (errno.EDQUOT, "the quota is used up; make room"),
        (errno.EROFS, "its file system is read-only; choose"),
        (errno.EIO, "the disk reports an error; look at the system's log"),
        (errno.ENAMETOOLONG, "File name too long; choose"),
    ],
)
def test_a_refusal_names_the_file_and_the_remedy_and_keeps_its_number(tmp_path, monkeypatch, number, what):
    def refused(file):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refused)
    for write in (lambda path: atomic_write(path, [b"x"]), lambda path: fill(path, "x")):
        with pytest.raises(StoreError, match=f"Cannot write '{tmp_path}/x': {what}") as caught:
            write(tmp_path / "x")
        assert caught.value.errno == number
        assert not os.listdir(tmp_path)


@pytest.mark.parametrize("text", ["Error while serializing: I/O error: No space left on device (os error 28)"])
def test_a_full_disk_is_seen_in_another_librarys_words(tmp_path, text):
    with pytest.raises(StoreError, match="the disk is full"), atomic_directory(tmp_path / "x"):
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="something else"), atomic_directory(tmp_path / "x"):
        raise RuntimeError("something else")


def test_a_place_is_tried_before_the_work(tmp_path, monkeypatch):
    check_writable(tmp_path / "not" / "yet" / "there")
    assert not os.listdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="is a file; name a directory"):
        check_writable(tmp_path / "file")
    monkeypatch.setattr(os, "write", lambda *given: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(StoreError, match="the disk is full"):
        check_writable(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_of_the_system_as_a_sentence():
    assert "the disk is full" in explained(OSError(errno.ENOSPC, "No space left on device", "x"))
    assert explained(OSError("odd")) == "odd"
    assert explained(FileNotFoundError(errno.ENOENT, "No such file", "x")).startswith("[Errno 2]")


# ------------------------------------------------------------------------------------------------------ lines and locks


@pytest.mark.parametrize("before", ["", "one\n", "x" * 9000 + "\n"])
@pytest.mark.parametrize("partial", ["", "t", "y" * 9000])
def test_a_partial_last_line_is_cut_off(tmp_path, before, partial):
    (tmp_path / "log").write_text(before + partial)
    cut_partial_line(tmp_path / "log")
    append_line(tmp_path / "log", b"two\n")
    assert (tmp_path / "log").read_text() == before + "two\n"


def test_readers_share_a_lock_and_a_writer_waits_for_them(tmp_path):
    def refused(shared, who):
        with pytest.raises(StoreError, match=f"in use by {who}"), locked(tmp_path, "lock", shared):
            pass

    with locked(tmp_path, "lock", shared=True), locked(tmp_path, "lock", shared=True):
        refused(False, "another process")
    with locked(tmp_path, "lock"):
        refused(True, f"process {os.getpid()}")


def test_a_reader_without_the_right_to_write_respects_a_writers_lock(tmp_path, monkeypatch):
    from fkernel.io import locks

    def no_writing(path, mode, **more):
        if mode != "rb":
            raise OSError(errno.EROFS, "read-only")
        return open(path, mode, **more)

    with locked(tmp_path, "lock"):
        monkeypatch.setattr(locks, "open", no_writing, raising=False)
        with pytest.raises(StoreError, match="in use by process"), locked(tmp_path, "lock", shared=True):
            pass
    with locked(tmp_path, "lock", shared=True), locked(tmp_path, "none", shared=True):
        pass
    assert os.listdir(tmp_path) == ["lock"]
    with pytest.raises(StoreError, match="read-only"), locked(tmp_path, "lock"):
        pass
