"""A store is created, resumed and locked, or refused and left as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fkernel.engine.store import open_store
from fkernel.engine.store.manifest import SCHEMA, describe, differences
from fkernel.errors import FKernelError, StoreError
from tests.store.common import GROUPS, IDENTITY, ROOT, assert_same, fill, handles, refused, shard


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
