"""What is damaged is named and not served."""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path

import pytest

from fkernel.engine.store import directory as module
from fkernel.engine.store import journal, open_store
from fkernel.io import checksum
from tests.store.common import GROUPS, IDENTITY, assert_same, fill, handles, refused, shard


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def swap(left: Path, right: Path) -> None:
    left.rename(left.with_name("x"))
    right.rename(left)
    left.with_name("x").rename(right)


DAMAGE = {
    "truncated": (lambda d: os.truncate(shard(d, 1), 1000), "has 1000 bytes, "),
    "empty": (lambda d: os.truncate(shard(d, 1), 0), "has 0 bytes, "),
    "longer": (lambda d: os.truncate(shard(d, 1), 100_000), "has 100000 bytes, "),
    "flipped in the header": (lambda d: flip(shard(d, 1), 20), "holds other bytes (SHA-256 "),
    "flipped in a tensor": (lambda d: flip(shard(d, 1), -1), "holds other bytes (SHA-256 "),
    "swapped": (lambda d: swap(shard(d, 0), shard(d, 1)), "holds shard 0 (SHA-256 "),
    "missing": (lambda d: shard(d, 1).unlink(), "is missing"),
    "a directory": (lambda d: (shard(d, 1).unlink(), shard(d, 1).mkdir()), "so its gradients are not served"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("when", ["before it is opened", "after it was read"])
def test_a_damaged_shard_is_named_and_not_served(full, damage, when):
    do, what = DAMAGE[damage]
    if when == "before it is opened":
        do(full)
    with open_store(full, IDENTITY, GROUPS) as store:
        if when == "after it was read":
            assert_same(store.read(1), handles(1))
            do(full)
        with refused(f"Shard 1, '{shard(full, 1)}', ", what, "delete line 2 of shards.jsonl", "delete the directory"):
            store.read(1)
        assert_same(store.read(2), handles(2, 2))


def test_a_shard_that_is_good_is_hashed_once(full, monkeypatch):
    hashed = []
    os.utime(shard(full, 1), (0, 0))
    with open_store(full, IDENTITY, GROUPS) as store:
        monkeypatch.setattr(module, "checksum", lambda path: hashed.append(path) or checksum(path))
        for _ in range(3):
            store.read(1)
    assert hashed == [shard(full, 1)]


def test_a_change_within_the_tick_of_a_coarse_clock_is_seen(full, monkeypatch):
    """A file system without sub-second times, on which a shard is damaged in the second in which it was read."""
    monkeypatch.setattr(module, "_state", lambda path: (path.stat().st_ino, path.stat().st_size, NOW, NOW))
    with open_store(full, IDENTITY, GROUPS) as store:
        assert_same(store.read(1), handles(1))
        flip(shard(full, 1), -1)
        with refused("Shard 1"):
            store.read(1)


NOW = time.time_ns() + 10**15
"""Later than these tests, which may run an hour after their module was imported."""


def test_the_advice_for_a_damaged_shard_works(full):
    flip(shard(full, 1), -1)
    lines = (full / "shards.jsonl").read_text().splitlines(keepends=True)
    (full / "shards.jsonl").write_text("".join(lines[:1] + lines[2:]))
    with open_store(full, IDENTITY, GROUPS) as store:
        assert [store.has(i) for i in range(3)] == [True, False, True]
        fill(store)
        assert_same(store.read(1), handles(1))


@pytest.mark.parametrize("tail", [b"{", b'{"index": 2, "rows"', b"\0\0\0\0", b"{}\n", b"\xff\n"])
def test_a_torn_last_line_is_dropped_and_its_shard_counts_as_absent(full, tail):
    path = full / "shards.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + tail)
    with open_store(full, IDENTITY, GROUPS) as store:
        assert [store.has(i) for i in range(3)] == [True, True, False]
        fill(store)
    assert path.read_bytes().splitlines(keepends=True)[:2] == lines[:2]
    with open_store(full, IDENTITY, GROUPS) as store:
        assert_same(store.read(2), handles(2, 2))


def test_every_cut_of_the_journal_leaves_whole_shards(full, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # hundreds of them take seconds
    path = full / "shards.jsonl"
    content = path.read_bytes()
    for end in range(len(content) + 1):
        path.write_bytes(content[:end])
        kept = journal.Journal(full, [[0, 3], [3, 6], [6, 8]])
        assert path.read_bytes() == content[:end]
        kept.cut()
        assert len(kept) == content[:end].count(b"\n")
        assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[: len(kept)])


@pytest.mark.parametrize(
    ("line", "change"),
    [
        (1, ""),
        (2, "{"),
        (1, '"index": 7'),
        (2, '"rows": [3, 5]'),
        (1, '"file": "../../x"'),
        (2, '"index": 0'),
        (1, None),
    ],
)
def test_a_damaged_journal_is_refused(full, line, change):
    path = full / "shards.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    if change is None:
        lines.insert(1, lines[0])
        line = 2
    elif ":" in change:
        fields = json.loads(lines[line - 1])
        lines[line - 1] = json.dumps({**fields, **json.loads(f"{{{change}}}")}) + "\n"
    else:
        lines[line - 1] = change + "\n"
    path.write_text("".join(lines))
    with refused(f"Line {line} of '{path}' is damaged", "delete it"):
        open_store(full, IDENTITY, GROUPS).__enter__()


def test_nothing_is_unpickled(full):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(full / "exploded"),)

    shard(full, 1).write_bytes(pickle.dumps(Bomb()))
    lines = [json.loads(line) for line in (full / "shards.jsonl").read_text().splitlines()]
    lines[1] |= {"bytes": shard(full, 1).stat().st_size, "sha256": checksum(shard(full, 1))}
    (full / "shards.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with open_store(full, IDENTITY, GROUPS) as store, refused("Shard 1", "cannot be read"):
        store.read(1)
    assert not (full / "exploded").exists()
