"""Whatever stops the writing leaves every shard complete or absent."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fkernel.engine.store import Store, journal, open_store, shards
from fkernel.io import atomic, atomic_write, flush_to_disk, lines, tensor_chunks
from tests.store.common import GROUPS, IDENTITY, ROOT, assert_same, fail, fill, handles, refused, values

KILLS = """
import os, random, signal, sys, tempfile, time
from pathlib import Path
import torch
from fkernel.func.handles.forms import Factored
from fkernel.engine.store import open_store

torch.set_num_threads(1)  # a forked child has no other threads
SHARDS = 4
GROUPS = [slice(2 * i, 2 * i + 2) for i in range(SHARDS)]
CONTENT = [{"w": Factored(torch.full((2, 64, 300), i + 1.0), torch.full((2, 64, 500), -i)), "b": torch.full((2, 9), i)}
           for i in range(SHARDS)]

def fill(directory):
    with open_store(directory, {"seed": 0}, GROUPS) as store:
        for i in range(SHARDS):
            if not store.has(i):
                store.write(i, CONTENT[i])

def child(directory, before=lambda: None):
    pid = os.fork()
    if pid == 0:
        before()
        fill(directory)
        os._exit(0)
    return pid

def check(directory):
    with open_store(directory, {"seed": 0}, GROUPS) as store:
        done = [i for i in range(SHARDS) if store.has(i)]
        for i in done:
            found = store.read(i)
            assert torch.equal(found["w"].inputs, CONTENT[i]["w"].inputs), (directory, i)
            assert torch.equal(found["w"].cotangents, CONTENT[i]["w"].cotangents), (directory, i)
            assert torch.equal(found["b"], CONTENT[i]["b"]), (directory, i)
    assert not list(Path(directory).glob("*.tmp"))
    return len(done)

def kill_at(step, after):
    seen = [0]
    def deadly(function):
        def call(*args):
            seen[0] += 1
            result = function(*args) if after or seen[0] != step else None
            if seen[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return call
    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)

def killed(pid):
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])

root = tempfile.mkdtemp(dir=sys.argv[1])
with open_store(f"{root}/forked", {"seed": 0}, GROUPS):  # a process that was forked meanwhile does not keep the lock
    sleeper = os.fork()
    if sleeper == 0:
        time.sleep(20)
        os._exit(0)
check(f"{root}/forked")
os.kill(sleeper, signal.SIGKILL)
killed(sleeper)

steps = 0  # one by one: before and after everything that makes something permanent
for after in (False, True):
    step, stopped = 1, True
    while stopped:
        directory = f"{root}/step-{after}-{step}"
        stopped = killed(child(directory, lambda: kill_at(step, after)))
        done = check(directory)
        assert stopped or done == SHARDS
        steps, step = steps + stopped, step + 1

start = time.perf_counter()
fill(f"{root}/whole")
whole = time.perf_counter() - start
rng, kills, partial, trial = random.Random(0), 0, 0, 0
while kills < 25:
    directory, done = f"{root}/random-{trial}", 0
    trial += 1
    while done < SHARDS and kills < 25:  # go on with the same store until it is complete
        pid = child(directory)
        time.sleep(rng.uniform(0, 1.2 * whole))
        os.kill(pid, signal.SIGKILL)
        kills += killed(pid)
        done = check(directory)
        partial += 0 < done < SHARDS
print(steps, kills, partial)
"""


@pytest.mark.turns(6)
def test_a_killed_writer_leaves_every_shard_complete_or_absent(tmp_path):
    out = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert out.returncode == 0, out.stderr
    steps, kills, partial = map(int, out.stdout.split())
    assert steps == 2 * (1 + 3 + 4 * 4 + 1)  # the folder's name, the manifest, each shard, and the journal's name
    assert kills >= 25
    assert partial >= 1


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    def torn() -> Iterator[bytes]:
        yield b"new"
        assert (tmp_path / "file").read_bytes() == b"old"
        raise KeyboardInterrupt

    atomic_write(tmp_path / "file", [b"o", b"ld"])
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "file", torn())
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def ctrl_c() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore the signal
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def stop_at_second_chunk(monkeypatch: pytest.MonkeyPatch, stop: Any) -> None:
    def interrupted(tensor: torch.Tensor) -> Iterator[memoryview]:
        for chunk in tensor_chunks(tensor):
            yield chunk
            stop()

    monkeypatch.setattr(shards, "tensor_chunks", interrupted)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: str, stop: Any) -> None:
    """Stop the writing of a shard at a step of it."""
    if step == "in a tensor":
        stop_at_second_chunk(monkeypatch, stop)
    elif step == "at the end of the file":
        monkeypatch.setattr(atomic, "flush_to_disk", lambda path: stop())
    elif step == "when it is moved":
        monkeypatch.setattr(os, "replace", lambda *paths: stop())
    else:
        monkeypatch.setattr(lines, "flush_to_disk", lambda path: stop())


STEPS = ["in a tensor", "at the end of the file", "when it is moved", "when it is recorded"]
everywhere = pytest.mark.parametrize("step", STEPS)


def assert_goes_on(store: Store) -> None:
    """Shard 0 is served, shard 1 absent, nothing lies about; the same store goes on, and so does the next opening."""
    assert [store.has(i) for i in range(3)] == [True, False, False]
    assert not list(store.directory.glob("*.tmp"))
    assert_same(store.read(0), handles(0))
    store.write(2, handles(2, 2))
    fill(store)


@everywhere
def test_ctrl_c_leaves_a_store_that_goes_on(tmp_path, monkeypatch, step):
    with open_store(tmp_path / "store", IDENTITY, GROUPS) as store:
        store.write(0, handles(0))
        with monkeypatch.context() as patched:
            stop_at(patched, step, ctrl_c)
            with pytest.raises(KeyboardInterrupt):
                store.write(1, handles(1))
        assert_goes_on(store)
    with open_store(tmp_path / "store", IDENTITY, GROUPS) as store:
        for i, n in enumerate((3, 3, 2)):
            assert_same(store.read(i), handles(i, n))


@everywhere
def test_a_store_that_is_opened_anew_after_ctrl_c_goes_on(tmp_path, monkeypatch, step):
    def run() -> None:
        with open_store(tmp_path / "store", IDENTITY, GROUPS) as store:
            store.write(0, handles(0))
            stop_at(patched, step, ctrl_c)
            store.write(1, handles(1))

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        run()
    with open_store(tmp_path / "store", IDENTITY, GROUPS) as store:
        fill(store)
        for i, n in enumerate((3, 3, 2)):
            assert_same(store.read(i), handles(i, n))


def test_a_record_of_what_was_written_over_does_not_survive(tmp_path, monkeypatch):
    def write(content: dict[str, Any]) -> None:
        with pytest.raises(KeyboardInterrupt):
            store.write(0, content)

    with open_store(tmp_path / "store", IDENTITY, GROUPS) as store:
        monkeypatch.setattr(lines, "flush_to_disk", lambda path: ctrl_c())
        write(handles(0))  # recorded, but the store does not know
        monkeypatch.setattr(lines, "flush_to_disk", flush_to_disk)
        monkeypatch.setattr(journal.Journal, "add", lambda *args: ctrl_c())
        write(handles(5))  # moved into place, but not recorded
    with open_store(tmp_path / "store", IDENTITY, GROUPS) as store:
        assert not store.has(0)


@everywhere
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_is_reported_and_the_store_goes_on(tmp_path, monkeypatch, step, number):
    needed = shards.pack(handles(1)).nbytes
    with open_store(tmp_path / "store", IDENTITY, GROUPS) as store:
        store.write(0, handles(0))
        with (
            monkeypatch.context() as patched,
            refused(
                f"No room for shard 1 in '{tmp_path / 'store'}': it needs {needed} bytes and ",
                f"are free ({os.strerror(number)})",
                "Make room",
                "1 of 3 shards, is kept",
            ),
        ):
            stop_at(patched, step, fail(number))
            store.write(1, handles(1))
        assert_goes_on(store)
    with open_store(tmp_path / "store", IDENTITY, GROUPS) as store:
        for i, n in enumerate((3, 3, 2)):
            assert_same(store.read(i), handles(i, n))


def test_a_disk_without_room_is_not_filled_up(tmp_path, monkeypatch):
    needed = shards.pack(handles(0)).nbytes
    with open_store(tmp_path / "store", IDENTITY, GROUPS) as store:
        before = sorted(store.directory.iterdir())
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=999))
        with refused(f"it needs {needed} bytes and 999 are free ({os.strerror(errno.ENOSPC)})", "0 of 3 shards"):
            store.write(0, handles(0))
        assert sorted(store.directory.iterdir()) == before


def test_a_real_limit_on_file_sizes_is_reported_and_the_store_goes_on(tmp_path):
    large = {"w": values(3, 100_000)}
    with open_store(tmp_path / "store", IDENTITY, GROUPS) as store:
        store.write(0, handles(0))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
        try:
            with refused("No room for shard 1", "it needs 12", "File too large", "the limit on file sizes"):
                store.write(1, large)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not list(store.directory.glob("*.tmp"))
        assert_same(store.read(0), handles(0))
    with open_store(tmp_path / "store", IDENTITY, GROUPS) as store:
        assert [store.has(i) for i in range(3)] == [True, False, False]
        store.write(1, large)
        assert_same(store.read(1), large)
