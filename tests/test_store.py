"""Gradient handles on disk: what is read is what was written, or an error says why not; whatever stops the writing."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fkernel import func
from fkernel.engine.store import Store, journal, open_store, shards
from fkernel.engine.store import directory as module
from fkernel.engine.store.manifest import SCHEMA, describe, differences
from fkernel.errors import BatchError, FKernelError, StoreError
from fkernel.func.handles.forms import Concat, Factored, SparseRows, Sum, materialize_into, nbytes, shape_of, tensors
from fkernel.io import atomic, atomic_write, checksum, fingerprint, flush_to_disk, locks, open_direct, tensor_chunks

ROOT = Path(__file__).parent.parent
IDENTITY = {"params": "abc", "dtype": "float32", "seed": 0}
GROUPS = [slice(0, 3), slice(3, 6), slice(6, 8)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64]
on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux's /proc")


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (100 * torch.randn(*shape, generator=generator)).to(dtype)


def handles(i: int = 0, n: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Every kind of handle, for n sequences of shard i; queries and keys share what goes in."""
    a, ids = values(n, 5, 4, dtype=dtype, seed=i), values(n, 5, dtype=torch.int64, seed=i) % 7
    delta = values(n, 5, 6, dtype=dtype, seed=i + 1)
    table = Sum((Factored(values(n, 5, 6, dtype=dtype, seed=9), delta[..., :3]), SparseRows(ids, delta, 7)))
    return {
        "bias": values(n, 6, dtype=dtype, seed=i + 2),
        "scale": values(n, dtype=dtype, seed=i + 3),
        "q.weight": Factored(a, delta),
        "k.weight": Factored(a, -delta),
        "embedding": SparseRows(ids, delta, 7),
        "tied": table,
        "ragged": Concat((Factored(a[:1, :2], delta[:1, :2]), Factored(a[1:], delta[1:]))),
        "nested": Concat((Sum((SparseRows(ids[:1], delta[:1], 7),)), values(n - 1, 7, 6, dtype=dtype, seed=i))),
        "unused": torch.zeros((), dtype=dtype).expand(n, 4, 4),
    }


def fill(store: Store) -> None:
    for i, rows in enumerate(store.groups):
        if not store.has(i):
            store.write(i, handles(i, rows[1] - rows[0]))


def assert_same(found: Any, expected: Any) -> None:
    """Equal in kind, structure, dtype, shape and every bit."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            assert_same(found[name], expected[name])
    elif isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert b"".join(tensor_chunks(found)) == b"".join(tensor_chunks(expected))
    elif isinstance(expected, tuple):
        assert len(found) == len(expected)
        for left, right in zip(found, expected, strict=True):
            assert_same(left, right)
    else:
        assert found == expected


@contextmanager
def refused(*pieces: str) -> Iterator[None]:
    """Expect a StoreError whose message holds every piece."""
    with pytest.raises(StoreError) as caught:
        yield
    for piece in pieces:
        assert piece in str(caught.value)


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A complete store."""
    with open_store(tmp_path / "store", IDENTITY, GROUPS) as store:
        fill(store)
    return tmp_path / "store"


def shard(directory: Path, i: int) -> Path:
    return directory / f"shard-{i:05d}.safetensors"


def written(tmp_path: Path, content: dict[str, Any], n: int = 3) -> tuple[dict[str, Any], Path]:
    """Write one shard and read it in another opening."""
    with open_store(tmp_path / "store", IDENTITY, [slice(0, n)]) as store:
        store.write(0, content)
    with open_store(tmp_path / "store", IDENTITY, [slice(0, n)]) as store:
        return store.read(0), shard(tmp_path / "store", 0)


# ---------------------------------------------------------------------------------------------- what is written is read


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_of_handle_comes_back_as_it_was(tmp_path, dtype):
    content = handles(dtype=dtype)
    assert_same(written(tmp_path, content)[0], content)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32], ids=str)
def test_other_dtypes_come_back_as_well(tmp_path, dtype):
    content = {"w": values(3, 5, dtype=dtype)}
    assert_same(written(tmp_path, content)[0], content)


def test_what_layers_share_is_stored_once_and_shared_again(tmp_path):
    a = values(3, 50, 40)
    content = {name: Factored(a, values(3, 50, 4, seed=at)) for at, name in enumerate("qkv")}
    found, path = written(tmp_path, content)
    assert found["q"].inputs.data_ptr() == found["k"].inputs.data_ptr() == found["v"].inputs.data_ptr()
    assert found["q"].cotangents.data_ptr() != found["k"].cotangents.data_ptr()
    assert nbytes(found) == nbytes(content) < path.stat().st_size < nbytes(content) + 2000


LAYOUTS = {
    "transposed": lambda x: x.mT,
    "permuted": lambda x: x.permute(2, 0, 1),
    "sliced": lambda x: x[:, 1:4, ::2],
    "sliced and transposed": lambda x: x[:, :, 2:5].mT,
    "one row": lambda x: x[1:2],
    "nothing": lambda x: x[:, :0],
    "expanded first": lambda x: x[:1].expand(4, -1, -1),
    "expanded inside": lambda x: x[:, :1].expand(-1, 6, -1).mT,
    "expanded scalar": lambda x: x[0, 0, 0].expand(3, 500, 700),
    "windows": lambda x: x.reshape(-1).unfold(0, 8, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_tensor_of_any_layout_comes_back(tmp_path, layout, dtype):
    tensor = LAYOUTS[layout](values(4, 6, 8, dtype=dtype))
    content = {"plain": values(len(tensor), 5), "w": tensor, "again": tensor}
    found, path = written(tmp_path, content, n=len(tensor))
    assert_same(found, content)
    assert found["w"].data_ptr() == found["again"].data_ptr()
    assert path.stat().st_size < 10_000


def test_different_views_of_one_storage_are_not_confused(tmp_path):
    x = values(4, 4)
    views = [x, x.view(torch.int32), x.mT, x[:, :2], x.view(-1)[:8].view(4, 2), x.view(4, 2, 2), x[:, 1:3]]
    content = {str(at): view for at, view in enumerate(views)}
    assert_same(written(tmp_path, content, n=4)[0], content)


def test_a_transposed_tensor_keeps_its_layout_so_that_products_keep_their_bits(tmp_path):
    inputs, cotangents = values(3, 33, 65).mT, values(3, 17, 65).mT
    found, _ = written(tmp_path, {"w": Factored(inputs, cotangents)})
    assert found["w"].inputs.stride() == inputs.stride()
    products = [torch.empty(3, *shape_of(found["w"])) for _ in range(2)]
    materialize_into(Factored(inputs, cotangents), products[0])
    materialize_into(found["w"], products[1])
    assert_same(products[1], products[0])


def test_large_tensors_cross_the_chunks(tmp_path):
    big = values(3, 700, 900)  # 7.6 MB, in chunks of 1 MiB
    content = {
        "contiguous": big,
        "sliced": big[:, :, 1:],
        "transposed": big.mT,
        "wide": values(3, 2, 300_001)[:, :, 1:],
    }
    assert_same(written(tmp_path, content)[0], content)


def test_the_handles_of_a_model_contract_to_the_same_bits_from_disk(tmp_path):
    content = handles(dtype=torch.float64)
    del content["scale"]
    found, _ = written(tmp_path, content)
    assert_same(func.contract(found, content), func.contract(content, content))


def test_any_safetensors_reader_opens_a_shard(full):
    read = load_file(shard(full, 0))
    assert any(torch.equal(leaf, handles()["bias"]) for leaf in read.values())
    with safe_open(shard(full, 0), "pt") as file:
        assert list(json.loads(file.metadata()["handles"])) == list(handles())


def test_the_tensors_begin_where_their_dtypes_want_them(tmp_path):
    content = {"a": values(3, 3, dtype=torch.bfloat16), "b": values(3, dtype=torch.float64), "c": values(3, 5)}
    found, _ = written(tmp_path, content)
    assert all(leaf.data_ptr() % leaf.element_size() == 0 for leaf in found.values())


def test_a_change_in_place_stays_out_of_the_file(full):
    with open_store(full, IDENTITY, GROUPS) as store:
        tensors(store.read(0)["bias"])[0].zero_()
        assert_same(store.read(0), handles())


def test_what_was_read_outlives_the_store(full):
    with open_store(full, IDENTITY, GROUPS) as store:
        found = store.read(0)
    shutil.rmtree(full)
    assert_same(found, handles())


def test_a_dtype_that_cannot_be_stored_is_refused(tmp_path):
    with (
        open_store(tmp_path / "store", IDENTITY, GROUPS) as store,
        refused("'w/inputs' is torch.complex64", "float32"),
    ):
        store.write(0, {"w": Factored(torch.ones(3, 2, 2, dtype=torch.complex64), torch.ones(3, 2, 2))})


# ---------------------------------------------------------------------------------------------------- create and resume


def test_a_store_is_created_filled_and_resumed(tmp_path):
    directory = tmp_path / "deep" / "store"
    with open_store(directory, IDENTITY, GROUPS) as store:
        assert not store.complete
        assert store.nbytes == 0
        store.write(1, handles(1))
    with open_store(str(directory), IDENTITY, GROUPS) as store:
        assert [store.has(i) for i in range(3)] == [False, True, False]
        fill(store)
        assert store.complete
        assert store.nbytes == sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        for i, n in enumerate((3, 3, 2)):
            assert_same(store.read(i), handles(i, n))
    names = {path.name for path in directory.iterdir()}
    assert names == {"lock", "manifest.json", "shards.jsonl", *(shard(directory, i).name for i in range(3))}


def test_a_shard_is_written_once_by_its_own_rows_and_while_the_store_is_open(full, tmp_path):
    with open_store(full, IDENTITY, GROUPS) as store:
        with refused("Shard 0", "complete already"):
            store.write(0, handles())
        with pytest.raises(IndexError, match="no shard 3 in a store of 3"):
            store.has(3)
    with refused("closed", "with open_store"):
        store.read(0)
    with open_store(tmp_path / "new", IDENTITY, GROUPS) as store:
        with refused("Shard 2 is of rows 6 to 7, 2 sequences; 'bias' has gradients of 3"):
            store.write(2, handles(2, 3))
        with refused("Shard 1", "is not there", "write it first"):
            store.read(1)
    with refused("closed"):
        store.write(1, handles(1))


def test_the_callers_own_errors_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), open_store(tmp_path / "store", IDENTITY, GROUPS):
        raise FileNotFoundError("the caller's")
    with open_store(tmp_path / "store", IDENTITY, GROUPS) as store:  # and the lock is free again
        assert not store.complete


def test_a_store_error_is_what_a_caller_would_catch():
    assert issubclass(StoreError, OSError)
    assert issubclass(StoreError, FKernelError)
    assert str(StoreError("what and why")) == "what and why"


@pytest.mark.parametrize(
    ("identity", "groups", "pieces"),
    [
        ({**IDENTITY, "params": "xyz"}, GROUPS, ['identity.params: stored "abc", asked for "xyz"']),
        ({**IDENTITY, "seed": False}, GROUPS, ["identity.seed: stored 0, asked for false"]),
        ({**IDENTITY, "select": ["w"]}, GROUPS, ['identity.select: stored nothing, asked for ["w"]']),
        ({"params": "abc", "seed": 1}, GROUPS, ['identity.dtype: stored "float32", asked for nothing', "seed"]),
        (IDENTITY, [slice(0, 4), slice(4, 8)], ["groups: stored [[0, 3], [3, 6], [6, 8]], asked for [[0, 4], [4, 8]]"]),
    ],
)
def test_a_store_of_something_else_is_refused_and_left_as_it_is(full, identity, groups, pieces):
    before = {path.name: path.read_bytes() for path in full.iterdir()}
    with refused("is of something else, and is left as it is", "another directory", "delete this one", *pieces):
        open_store(full, identity, groups).__enter__()
    assert before == {path.name: path.read_bytes() for path in full.iterdir()}


def test_a_store_of_a_newer_layout_is_refused(full):
    manifest = json.loads((full / "manifest.json").read_text())
    (full / "manifest.json").write_text(json.dumps({**manifest, "schema": SCHEMA + 1, "more": 0}))
    with refused(f"has layout {SCHEMA + 1}", f"reads layout {SCHEMA}", "the version that made it"):
        open_store(full, IDENTITY, GROUPS).__enter__()


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '"text"'])
def test_a_damaged_manifest_is_refused(full, content):
    (full / "manifest.json").write_text(content)
    with refused("manifest.json", "is damaged", "begin anew"):
        open_store(full, IDENTITY, GROUPS).__enter__()


def test_a_directory_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with refused("no store", "'thesis.tex'", "Nothing was touched", "another directory"):
        open_store(tmp_path, IDENTITY, GROUPS).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_store_that_lost_its_manifest_is_refused(full):
    (full / "manifest.json").unlink()
    with refused("has no manifest.json", "'shard-00000.safetensors'"):
        open_store(full, IDENTITY, GROUPS).__enter__()


@pytest.mark.parametrize(
    "groups",
    [
        [slice(1, 3)],
        [slice(3)],
        [slice(None)],
        [slice(0, None)],
        [slice(0, 4, 2)],
        [slice(0, 3), slice(4, 5)],
        [slice(0, 3), slice(3, 3)],
    ],
)
def test_groups_that_do_not_follow_one_another_are_refused(groups):
    with refused("Group", "follow one another from 0"):
        describe(IDENTITY, groups)


@pytest.mark.parametrize("value", [float("nan"), torch.ones(1), {1, 2}, Path()])
def test_an_identity_that_is_no_json_is_refused(value):
    with refused("identity", "JSON"):
        describe({"x": value}, GROUPS)


def test_differences_are_named_deep_down_and_counted_where_they_are_many():
    assert differences({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": 1.0}}}) == ["a.b.c: stored 1, asked for 1.0"]
    many = differences({str(i): 0 for i in range(9)}, {str(i): 1 for i in range(9)})
    assert len(many) == 6
    assert many[-1] == "and 4 more"
    assert "(402 characters)" in differences({"a": "x" * 400}, {"a": 0})[0]


# ------------------------------------------------------------------------------------------------------- one at a time


HOLD = """
import sys
from fkernel.engine.store import open_store
with open_store(sys.argv[1], {"seed": 0}, [slice(0, 1)]):
    print("open", flush=True)
    sys.stdin.read()
"""


def test_a_store_that_another_process_has_open_is_refused_until_that_ends(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "store")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        with refused("store'", f"in use by process {holder.pid};", "wait", "another directory"):
            open_store(tmp_path / "store", {"seed": 0}, [slice(0, 1)]).__enter__()
        holder.kill()
    with (
        open_store(tmp_path / "store", {"seed": 0}, [slice(0, 1)]),
        refused(f"in use by process {os.getpid()};"),
    ):
        open_store(tmp_path / "store", {"seed": 0}, [slice(0, 1)]).__enter__()


# ------------------------------------------------------------------------------------------------------------- damage


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
    with open_store(full, IDENTITY, GROUPS) as store:
        monkeypatch.setattr(module, "checksum", lambda path: hashed.append(path) or checksum(path))
        for _ in range(3):
            store.read(1)
    assert hashed == [shard(full, 1)]


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


# ----------------------------------------------------------------------------------------------- the writing is stopped


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


def test_a_killed_writer_leaves_every_shard_complete_or_absent(tmp_path):
    out = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert out.returncode == 0, out.stderr
    steps, kills, partial = map(int, out.stdout.split())
    assert steps == 2 * (3 + 4 * 4)  # the manifest's three steps and each shard's four
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


def fail(number: int) -> Any:
    def raise_it(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    return raise_it


def stop_at(monkeypatch: pytest.MonkeyPatch, step: str, stop: Any) -> None:
    """Stop the writing of a shard at a step of it."""
    if step == "in a tensor":
        stop_at_second_chunk(monkeypatch, stop)
    elif step == "at the end of the file":
        monkeypatch.setattr(atomic, "flush_to_disk", lambda path: stop())
    elif step == "when it is moved":
        monkeypatch.setattr(os, "replace", lambda *paths: stop())
    else:
        monkeypatch.setattr(journal, "flush_to_disk", lambda path: stop())


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
        monkeypatch.setattr(journal, "flush_to_disk", lambda path: ctrl_c())
        write(handles(0))  # recorded, but the store does not know
        monkeypatch.setattr(journal, "flush_to_disk", flush_to_disk)
        monkeypatch.setattr(journal.Journal, "add", lambda *args: ctrl_c())
        write(handles(5))  # moved into place, but not recorded
    with open_store(tmp_path / "store", IDENTITY, GROUPS) as store:
        assert not store.has(0)


# -------------------------------------------------------------------------------------------------------------- no room


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
        with refused(f"it needs {needed} bytes and 999 are free (the disk is full)", "0 of 3 shards"):
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


# -------------------------------------------------------------------------------------------- directories that refuse


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("mine")
    with refused(f"Cannot open '{tmp_path / 'file'}': it is a file; name a directory"):
        open_store(tmp_path / "file", IDENTITY, GROUPS).__enter__()
    with refused("Cannot open", "it, or a part of its path, is a file; name a directory"):
        open_store(tmp_path / "file" / "store", IDENTITY, GROUPS).__enter__()
    with refused("Cannot open", "File name too long; choose another directory"):
        open_store(tmp_path / ("x" * 300), IDENTITY, GROUPS).__enter__()
    assert (tmp_path / "file").read_text() == "mine"


@on_linux
def test_a_place_that_refuses_even_root():
    with refused("Cannot open '/proc/fkernel'", "choose another directory"):
        open_store("/proc/fkernel", IDENTITY, GROUPS).__enter__()


@pytest.mark.parametrize(
    ("number", "what"),
    [(errno.EROFS, "its file system is read-only"), (errno.EACCES, "permission is denied"), (errno.EIO, "rror")],
)
def test_a_directory_that_turns_read_only(full, monkeypatch, number, what):
    def no_file(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return fail(number)() if set(mode) & set("wa+") else open(path, mode, *args, **kwargs)

    @contextmanager
    def no_direct_file(path: Any, flags: int = os.O_RDONLY) -> Iterator[int]:
        if flags & os.O_WRONLY:
            fail(number)()
        with open_direct(path, flags) as file:
            yield file

    with open_store(full.with_name("new"), IDENTITY, GROUPS) as store:
        monkeypatch.setattr(locks, "open", no_file, raising=False)
        monkeypatch.setattr(atomic, "open_direct", no_direct_file)
        with refused(f"Cannot write to '{store.directory}'", what, "choose"):
            store.write(0, handles(0))
        assert not store.has(0)
    with refused(f"Cannot lock '{full}'", what, "choose"):
        open_store(full, IDENTITY, GROUPS).__enter__()


UNPRIVILEGED = """
import os, sys
from pathlib import Path
from fkernel.errors import StoreError
from fkernel.engine.store import open_store
os.chdir(sys.argv[1])
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
for name in ("read-only", "read-only/new"):
    try:
        with open_store(name, {"seed": 0}, [slice(0, 1)]):
            print("opened", name)
    except StoreError as error:
        print(error)
"""


def test_a_read_only_directory_for_those_whom_permissions_bind(tmp_path):
    (tmp_path / "place" / "read-only").mkdir(parents=True)
    (tmp_path / "place" / "read-only").chmod(0o555)
    (tmp_path / "place").chmod(0o755)
    command = [sys.executable, "-c", UNPRIVILEGED, str(tmp_path / "place")]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    todo = "permission is denied; choose a directory that you may write to."
    assert out == [f"Cannot lock 'read-only': {todo}", f"Cannot open 'read-only/new': {todo}"]


# ------------------------------------------------------------------------------------------------------------- memory


MEMORY = """
import sys
import torch
from fkernel.func.handles.forms import Factored
from fkernel.engine.store import open_store

def megabytes(field):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(field + ":")]
    return int(line.split()[1]) / 1024

content = {
    "dense": torch.ones(4, 2_000_000),
    "transposed": torch.ones(4, 1000, 1000).mT,
    "sliced": torch.ones(4, 1000, 1100)[:, :, 50:1050],
    "factored": Factored(torch.ones(4, 1000, 2000, dtype=torch.bfloat16), torch.ones(4, 1000, 1000)),
    "zero": torch.zeros(()).expand(4, 50_000, 50_000),
}
with open_store(sys.argv[1] + "/warm", {}, [slice(0, 4)]) as store:
    store.write(0, {"w": torch.ones(4, 1_000_000)})
    store.read(0)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak counts from here
held = megabytes("VmHWM")
with open_store(sys.argv[1] + "/store", {}, [slice(0, 4)]) as store:
    store.write(0, content)
    wrote = megabytes("VmHWM") - held
    del content
    before = megabytes("VmRSS")
    found = store.read(0, ["sliced"])
    part = megabytes("VmRSS") - before
    del found
    before = megabytes("VmRSS")
    found = store.read(0)
    print(store.nbytes / 2**20, wrote, part, megabytes("VmRSS") - before)
"""


@on_linux
def test_writing_and_reading_take_little_memory_of_their_own(tmp_path):
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout
    size, wrote, part, whole = map(float, out.split())
    assert size == pytest.approx((8 + 4 + 4 + 8 / 2 + 4) * 4e6 / 2**20, rel=0.01)
    assert wrote < 16  # 5 to 12 for threads and Python's own; a copy of the smallest whole leaf would add 15 to them
    assert part < 4 * 4e6 / 2**20 + 4
    assert whole < size + 4


# --------------------------------------------------------------------------------------------------------- fingerprint


def batch() -> func.Sequences:
    return func.pad(prompts=[[5, 6], [7]], responses=[[1], [2, 3, 1]])


def test_a_fingerprint_is_the_same_everywhere():
    tree = {"b": torch.tensor([1.0, -2.0], dtype=torch.bfloat16), "a": torch.arange(3)}
    assert fingerprint(tree) == "f69ae4f48cbafc4b57302913b5c543e6216b0661ff3a5ba18a3679f8effa4f3b"
    assert fingerprint(dict(reversed(tree.items()))) == fingerprint(tree)


def test_a_fingerprint_reads_the_same_numbers_on_a_big_endian_machine(monkeypatch):
    swapped = torch.tensor([1, 256], dtype=torch.int16)
    monkeypatch.setattr(sys, "byteorder", "big")
    assert b"".join(tensor_chunks(swapped)) == b"\x00\x01\x01\x00"


def test_a_fingerprint_does_not_ask_how_a_tensor_lies_in_memory():
    x = values(700, 900)
    views = [x.mT.contiguous().mT, x.clone(), torch.cat([x, x])[:700], x.requires_grad_()]
    assert {fingerprint([view]) for view in views} == {fingerprint([x])}
    zeros = torch.zeros(()).expand(3, 1000, 1000)
    assert fingerprint(zeros) == fingerprint(torch.zeros(3, 1000, 1000))


CHANGED: dict[str, Any] = {
    "a bit": {"w": torch.tensor([1.0, 2.0000002]), "v": torch.ones(2)},
    "a sign of zero": {"w": torch.tensor([1.0, 2.0]), "v": torch.ones(2), "z": torch.tensor(-0.0)},
    "a name": {"w": torch.tensor([1.0, 2.0]), "u": torch.ones(2)},
    "two names": {"v": torch.tensor([1.0, 2.0]), "w": torch.ones(2)},
    "a shape": {"w": torch.tensor([[1.0], [2.0]]), "v": torch.ones(2)},
    "another shape": {"w": torch.tensor([[1.0, 2.0]]), "v": torch.ones(2)},
    "a dtype": {"w": torch.tensor([1.0, 2.0]).view(torch.int32), "v": torch.ones(2)},
    "a leaf less": {"w": torch.tensor([1.0, 2.0])},
    "bytes moved to the neighbour": {"w": torch.tensor([1.0]), "v": torch.tensor([1.0, 1.0, 2.0])},
    "a nested tree": {"w": {"": torch.tensor([1.0, 2.0])}, "v": torch.ones(2)},
    "a number": {"w": torch.tensor([1.0, 2.0]), "v": 1},
    "another kind of number": {"w": torch.tensor([1.0, 2.0]), "v": True},
    "a text": {"w": torch.tensor([1.0, 2.0]), "v": "1"},
    "nothing": {"w": torch.tensor([1.0, 2.0]), "v": None},
}


def test_a_fingerprint_tells_contents_apart():
    plain = {"w": torch.tensor([1.0, 2.0]), "v": torch.ones(2)}
    found = [fingerprint(tree) for tree in (plain, {**plain, "z": torch.tensor(0.0)}, *CHANGED.values())]
    assert len(set(found)) == len(found)


def test_a_fingerprint_takes_batches_of_any_make():
    ids, attention, response = batch()
    assert fingerprint(batch()) == fingerprint(func.Sequences(ids, attention, response))
    masked = batch()._replace(response_mask=batch().response_mask.int())
    assert fingerprint(batch()) != fingerprint(masked)
    assert fingerprint((batch(), batch())) != fingerprint(batch())


@pytest.mark.parametrize(
    ("tree", "piece"), [({}, "holds no leaf"), ({"w": {1, 2}}, "['w'] is a set"), (object(), "object")]
)
def test_what_has_no_content_is_refused(tree, piece):
    with pytest.raises(BatchError, match="fingerprint") as caught:
        fingerprint(tree)
    assert piece in str(caught.value)


def test_the_handles_of_the_tests_share_what_they_are_said_to_share():
    content = handles()
    assert content["q.weight"].inputs is content["k.weight"].inputs
    assert tensors(content["unused"])[0].untyped_storage().nbytes() == 4
