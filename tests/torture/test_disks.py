"""Disks as they are: one that is really full, one that is really read-only; and what others do meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from fkernel.errors import StoreError
from fkernel.io import atomic_directory, atomic_write, check_writable, locked
from fkernel.record import Recorder
from fkernel.study.sealed import write_files
from tests.record.loops import adamw, gpt2, train
from tests.test_interrupted import STRATEGIES, computed, f
from tests.torture.leftovers import temporaries

ROOT = Path(__file__).parents[2]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def remounted(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def test_a_recording_on_a_full_disk_goes_on_where_there_is_room(disk, tmp_path):
    model = gpt2()
    with pytest.raises(StoreError, match=rf"Cannot write '{disk}/.*: the disk is full; make room"):
        train(disk / "recording", range(3), model, adamw(model), snapshots="every")
    assert not temporaries(disk)
    remounted(disk, "size=8m")
    for place in (disk / "recording", tmp_path / "undisturbed"):
        model = gpt2()
        train(place, range(3), model, adamw(model), snapshots="every")
    for path in (tmp_path / "undisturbed").rglob("*"):
        if path.is_file() and path.name != "lock":
            assert path.read_bytes() == (disk / "recording" / path.relative_to(tmp_path / "undisturbed")).read_bytes()


def test_a_store_on_a_full_disk_goes_on_where_there_is_room(disk):
    (disk / "ballast").write_bytes(bytes(52 << 10))
    with pytest.raises(StoreError, match=r"(the disk is full|No space left on device)"):
        computed(f, STRATEGIES[2], disk / "store")
    assert not temporaries(disk)
    remounted(disk, "size=1m")
    K = computed(f, STRATEGIES[2], disk / "store")
    assert torch.equal(K, computed(f, STRATEGIES[2], disk / "another"))


def test_a_read_only_disk_is_said_before_the_work(disk):
    with locked(disk, "lock"):
        pass
    remounted(disk, "ro")
    with pytest.raises(StoreError, match="its file system is read-only; choose a directory that you may write to"):
        check_writable(disk / "results")
    with pytest.raises(StoreError, match="its file system is read-only"):
        Recorder(disk / "recording")
    with locked(disk, "lock", shared=True), locked(disk, "lock", shared=True):
        pass


def test_results_on_a_disk_that_turned_read_only_stay(disk):
    write_files(disk / "out", {}, {}, {"schema": 1}, {})
    remounted(disk, "ro")
    with pytest.raises(StoreError, match=r"Cannot remove '.*results.json': its file system is read-only"):
        write_files(disk / "out", {}, {}, {"schema": 2}, {})
    assert '"schema": 1' in (disk / "out" / "results.json").read_text()


def test_a_lock_is_one_whatever_path_leads_to_it(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    model = gpt2()
    train(tmp_path / "link", range(1), model, adamw(model))
    with Recorder(tmp_path / "link"), pytest.raises(StoreError, match=f"in use by process {os.getpid()}"):
        Recorder(tmp_path / "real")
    assert (tmp_path / "link").is_symlink()
    assert not temporaries(tmp_path)


def test_a_reader_beside_a_writer_sees_the_old_or_the_new(tmp_path):
    """Every time that it looks, while both are replaced as fast as that goes."""
    contents, stop = [bytes([i]) * 50_000 for i in range(2)], threading.Event()
    atomic_write(tmp_path / "file", [contents[0]])

    def write() -> None:
        i = 0
        while not stop.is_set():
            i = 1 - i
            atomic_write(tmp_path / "file", [contents[i]])
            with atomic_directory(tmp_path / "folder", replace=True) as work:
                for name in "ab":
                    (work / name).write_bytes(contents[i])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = set[int]()
        while len(seen) < 2:
            found = (tmp_path / "file").read_bytes()
            seen.add(contents.index(found))
            for name in "ab":
                with suppress(FileNotFoundError):  # the moment between two renames
                    assert (tmp_path / "folder" / name).read_bytes() in contents
    finally:
        stop.set()
        writer.join()
    assert not temporaries(tmp_path)


TWICE = """
import sys
import torch
from pathlib import Path
from tests.demo.conftest import TINY
from fkernel.demo import prepare
torch.set_num_threads(1)
print(prepare(TINY, Path(sys.argv[1])))
"""


@pytest.mark.turns(6)
def test_two_processes_fill_one_cache(tmp_path):
    """Both train, one of them comes first, and both have what it made."""
    command = [sys.executable, "-W", "ignore", "-c", TWICE, str(tmp_path / "cache")]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [one.communicate(timeout=500)[0].splitlines()[-1] for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert said[0] == said[1]
    assert [each.name for each in (tmp_path / "cache").iterdir()] == [Path(said[0]).name]
