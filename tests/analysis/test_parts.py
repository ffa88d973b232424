"""A kernel, its contributions and its norms in parts: layers and kinds add up to the whole."""

from __future__ import annotations

import math

import pytest
import torch

import fkernel as fk
from fkernel import func
from fkernel.analysis import by_part, missed, shares, summed
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


def test_a_part_that_lies_in_two_groups_is_refused():
    """Groups of parts of parts: nothing is put into the wrong one, and nothing is lost."""
    names = ["h.0.mlp.up.weight", "h.0.mlp.down.weight", "h.1.mlp.up.weight", "wte.weight"]
    J = {name: torch.full((1, 2), float(i + 1)) for i, name in enumerate(names)}
    parts = func.contract_by(J, J, by_part)
    with pytest.raises(fk.TreeError, match=r"'layer 0 · MLP' has parameters of 2 groups, 'up', 'down'; expected"):
        summed(parts, names, lambda name: name.split(".")[-2])
    with pytest.raises(fk.TreeError, match=r"of 2 groups, 'h.0.mlp.up.weight', 'h.0.mlp.down.weight'"):
        summed(parts, names, lambda name: name)
    # one parameter a part: as fine a key as any is then whole
    alone = {name: J[name] for name in names if "down" not in name}
    found = summed(func.contract_by(alone, alone, by_part), alone, lambda name: name)
    assert {name: K.item() for name, K in found.items()} == {name: 2 * J[name][0, 0].item() ** 2 for name in alone}


def test_parts_and_names_are_of_the_same_parameters():
    names = ["h.0.mlp.up.weight", "wte.weight"]
    parts = {by_part(name): torch.ones(1) for name in names}
    with pytest.raises(fk.TreeError, match="parts has 'embedding', which names lacks"):
        summed(parts, names[:1], func.by_kind)
    with pytest.raises(fk.TreeError, match="parts lacks 'head', which names has"):
        summed(parts, [*names, "lm_head.weight"], func.by_kind)
    with pytest.raises(fk.TreeError, match=r"parts lacks 'layer 0 · MLP', which names has; parts has 'MLP'"):
        summed({"MLP": torch.ones(1), "embedding": torch.ones(1)}, names, func.by_kind)
