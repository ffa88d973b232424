"""What ranks send and hold is what `cost_on_ranks` predicts; exchanging a few sequences at a time changes no number."""

from __future__ import annotations

import weakref
from typing import Any
from unittest.mock import patch

import pytest
import torch

from benchmarks.models import SHAPES
from benchmarks.ranks_cost import LAYERS, counting, prepared
from fkernel.distributed import ShardedTree, group_of
from fkernel.func.inputs.leaves import leaves_of
from tests.distributed.live import LiveBytes
from tests.distributed.ranks import results
from tests.distributed.test_same_numbers import FORMS, ROUNDING, apart, products


def sent(mesh: Any) -> tuple[float, float]:
    """Bytes that this rank sends for a step explained layer by layer, and those that are predicted."""
    explain, cost = prepared("tiny", 8, 4, 12, mesh)
    with patch("fkernel.engine.step.choose", lambda *args: LAYERS), counting(mesh.size(), mesh.get_local_rank()) as own:
        explain()
    return sum(own.values()), sum(cost.sent.values())


@pytest.mark.turns(6)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_send_the_bytes_that_are_predicted(ranks):
    every = results(ranks, sent)
    assert sum(own for own, _ in every) == pytest.approx(sum(said for _, said in every), rel=0.05)


def sent_in_shards(mesh: Any, n_U: int, n_E: int, T: int, tied: bool) -> tuple[float, float]:
    """The same where θ is in shards, certificates included."""
    shape = {**SHAPES["tiny"], "vocab_size": 256}
    own_tables = {} if tied else {"tie_word_embeddings": False}
    with patch.dict(SHAPES, {f"tied {tied}": {**shape, **own_tables}}):
        explain, cost = prepared(f"tied {tied}", n_U, n_E, T, mesh, in_shards=True)
    with counting(mesh.size(), mesh.get_local_rank()) as own:
        explain()
    return sum(own.values()), sum(cost.sent.values())


@pytest.mark.turns(6)
@pytest.mark.parametrize(
    ("ranks", "n_U", "n_E", "T", "tied"),
    [(2, 8, 4, 12, True), (4, 8, 4, 12, True), (2, 64, 2, 40, True), (2, 6, 1, 12, False), (4, 4, 8, 12, False)],
)
def test_ranks_send_the_bytes_that_are_predicted_of_parameters_in_shards(ranks, n_U, n_E, T, tied):
    """Whatever the batches: 64 sequences of 40 tokens are more than walk at once by default."""
    every = results(ranks, sent_in_shards, n_U, n_E, T, tied)
    assert sum(own for own, _ in every) == pytest.approx(sum(said for _, said in every), rel=0.05)


def alive(mesh: Any, in_shards: bool) -> tuple[float, float]:
    """The most bytes of tensors that this rank has at once while a step is explained, and those that are predicted."""
    explain, cost = prepared("small", 8, 4, 12, mesh, in_shards)
    with patch("fkernel.engine.step.choose", lambda *args: LAYERS), LiveBytes() as seen:
        explain()
    predicted = sum(cost.memory.values())
    if in_shards:  # the test made shards of a θ that it has whole
        predicted += cost.memory["parameters, in shards"] * (mesh.size() - 1)
    return float(seen.peak), predicted


@pytest.mark.turns(6)
@pytest.mark.parametrize(("ranks", "in_shards"), [(2, True), (4, True), (2, False), (4, False)])
def test_tensors_of_a_rank_take_the_bytes_that_are_predicted(ranks, in_shards):
    for own, predicted in results(ranks, alive, in_shards):
        assert own == pytest.approx(predicted, rel=0.15)


def kept_of_a_pass(mesh: Any) -> list[bool]:
    """Whether what an operation returned and kept for its gradient is there once the pass is let go."""
    group, made = group_of(mesh), list[Any]()
    x = torch.ones(3, 2)

    def f(params: Any, batch: Any) -> torch.Tensor:
        y = (batch @ params["w"]).exp()
        made.append(weakref.ref(y.untyped_storage()))
        return y

    value = leaves_of(ShardedTree(group, {"w": torch.ones(2)}, {"w": (2 * group.size,)})).value(
        f, x.repeat(1, group.size)
    )
    del value  # without a backward pass, which would let go of what is kept in any case
    return [storage() is not None for storage in made]


def test_a_pass_over_parameters_in_shards_is_let_go():
    for kept in results(2, kept_of_a_pass):
        assert kept == [False]


def products_one_by_one(mesh: Any) -> dict[str, Any]:
    with patch("fkernel.engine.layerwise_over_ranks.BUCKET", 1):
        return products(mesh)


@pytest.mark.turns(6)
def test_products_are_the_same_where_sequences_are_exchanged_one_by_one():
    expected = products(None)
    for found in results(3, products_one_by_one):
        assert len(found) == len(FORMS) * len(expected)
        for name, sums in found.items():
            assert apart(sums, expected[f"whole: {name.partition(': ')[2]}"]) <= ROUNDING, name
