"""A kernel, its contributions and its norms in parts: layers and kinds add up to the whole."""

from __future__ import annotations

import math

import pytest
import torch

import fkernel as fk
from fkernel import func
from fkernel.analysis import by_part, missed, norms_by, shares, summed
from tests.cases import EXAMPLES


@pytest.fixture(params=EXAMPLES, ids=lambda case: case.model_name)
def case(request):
    return request.param


@pytest.mark.parametrize("key", [func.by_kind, func.by_layer])
def test_parts_add_up_to_groups_and_groups_to_the_whole(case, key):
    S, params, E, U = case.engine(fk)
    D = {name: leaf.abs() + 0.1 for name, leaf in case.tree(51).items()}
    x, y = (func.per_sequence_handles(S)(params, batch) for batch in (E, U))
    whole = func.contract(x, y, diagonal=D)
    groups = summed(func.contract_by(x, y, by_part, diagonal=D), params, key)
    straight = func.contract_by(x, y, key, diagonal=D)
    assert set(groups) == set(straight)
    for group, K in straight.items():
        torch.testing.assert_close(groups[group], K, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.stack([*groups.values()]).sum(0), whole, rtol=1e-10, atol=1e-12)


def test_norms_add_up(case):
    S, params, E, _ = case.engine(fk)
    D = {name: leaf.abs() for name, leaf in case.tree(52).items()}
    J = func.per_sequence_handles(S)(params, E)
    parts, whole = norms_by(J, diagonal=D), func.squared_norms(J, diagonal=D)
    for i in range(2):
        total = torch.stack([norms[i] for norms in parts.values()]).sum(0)
        torch.testing.assert_close(total, whole[i], rtol=1e-10, atol=0.0)


def test_what_is_left_out_is_missed_as_much_as_the_kernel_without_it_is_wrong(case):
    S, params, E, U = case.engine(fk)
    x, y = (func.per_sequence_handles(S)(params, batch) for batch in (E, U))
    kinds = func.contract_by(x, y)
    inner = [name for name in params if func.by_kind(name) not in ("embedding", "positions", "head")]
    assert len(inner) < len(params) or case.model_name == "own"
    without = func.contract({n: x[n] for n in inner}, {n: y[n] for n in inner})
    whole = func.contract(x, y)
    assert missed(kinds) == pytest.approx(float((whole - without).norm() / whole.norm()), rel=1e-9)


def test_shares_add_up_to_one():
    groups = {"a": torch.tensor([1.0, -3.0]), "b": torch.tensor([-1.0, 3.0])}
    assert sum(shares(groups).values()) == pytest.approx(1)
    assert math.isnan(missed(groups, ["a"]))  # they cancel: nothing moved
    assert shares({"a": torch.tensor([1.0, -3.0]), "b": torch.tensor([0.0, 1.0])}) == {"a": 0.8, "b": 0.2}
    assert shares({"a": torch.zeros(2)}) == {"a": 0.0}
