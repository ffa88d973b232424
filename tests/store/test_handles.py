"""What is written is read, to the last bit, and takes little memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fkernel import func
from fkernel.engine.store import open_store
from fkernel.func.handles.forms import Factored, materialize_into, nbytes, shape_of, tensors
from tests.store.common import (
    DTYPES,
    GROUPS,
    IDENTITY,
    ROOT,
    assert_same,
    handles,
    on_linux,
    refused,
    shard,
    values,
    written,
)


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


def test_the_handles_of_the_tests_share_what_they_are_said_to_share():
    content = handles()
    assert content["q.weight"].inputs is content["k.weight"].inputs
    assert tensors(content["unused"])[0].untyped_storage().nbytes() == 4


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
