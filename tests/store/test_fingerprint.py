"""A fingerprint tells contents apart, and nothing else."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from fkernel import func
from fkernel.errors import BatchError
from fkernel.io import fingerprint, tensor_chunks
from tests.store.common import values


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
