"""What ranks send is what `cost_on_ranks` predicts, and exchanging a few sequences at a time changes no number."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

from benchmarks.ranks_cost import LAYERS, counting, prepared
from fkernel import func
from fkernel.func.trust.comparisons import NAMES
from tests.distributed.ranks import results
from tests.distributed.test_same_numbers import FORMS, ROUNDING, apart, products


def sent(mesh: Any) -> tuple[float, float]:
    """Bytes that this rank sends for a step explained layer by layer, and those that are predicted."""
    explain, cost = prepared("tiny", 8, 4, 12, mesh)
    with patch("fkernel.engine.step.choose", lambda *args: LAYERS), counting(mesh.size(), mesh.get_local_rank()) as own:
        explain()
    return sum(own.values()), sum(cost.sent.values())


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_send_the_bytes_that_are_predicted(ranks):
    every = results(ranks, sent)
    assert sum(own for own, _ in every) == pytest.approx(sum(said for _, said in every), rel=0.05)


def sent_in_shards(mesh: Any) -> tuple[float, float]:
    """The same where θ is in shards, without certificates, some of which an earlier step has settled."""
    explain, cost = prepared("tiny", 8, 4, 12, mesh, in_shards=True)
    with func.skip_certificates(*NAMES):
        explain()  # settles the cut
        with counting(mesh.size(), mesh.get_local_rank()) as own:
            explain()
    return sum(own.values()), sum(cost.sent.values()) - cost.sent["certificates"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_send_the_bytes_that_are_predicted_of_parameters_in_shards(ranks):
    every = results(ranks, sent_in_shards)
    assert sum(own for own, _ in every) == pytest.approx(sum(said for _, said in every), rel=0.05)


def products_one_by_one(mesh: Any) -> dict[str, Any]:
    with patch("fkernel.engine.layerwise_over_ranks.BUCKET", 1):
        return products(mesh)


def test_products_are_the_same_where_sequences_are_exchanged_one_by_one():
    expected = products(None)
    for found in results(3, products_one_by_one):
        assert len(found) == len(FORMS) * len(expected)
        for name, sums in found.items():
            assert apart(sums, expected[f"whole: {name.partition(': ')[2]}"]) <= ROUNDING, name
