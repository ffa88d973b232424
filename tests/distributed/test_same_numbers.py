"""One process, two and four give the same numbers in float64: kernels, influence, a step explained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import fkernel as fk
from fkernel import Strategy
from fkernel.distributed import group_of
from fkernel.engine import Problem, SortedBatch, blocks
from fkernel.func.handles import ProductSpec
from tests.distributed.cases import diagonal, inputs, state_of, step_of_shards, symmetric
from tests.distributed.ranks import results
from tests.distributed.shards import dealt, everything, weightless
from tests.models import MODELS
from tests.test_layered import collected, spec

ROUNDING = 1e-12


@cache
def alone(name: str) -> dict[str, torch.Tensor]:
    return everything(None, name)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))


@pytest.mark.turns(6)
@pytest.mark.parametrize(("name", "ranks"), [("few", 1), ("own", 3), ("gpt2", 2), ("few", 4), ("lora", 2)])
def test_any_number_of_ranks_gives_the_same_on_each(name, ranks):
    expected = alone(name)
    for found in results(ranks, everything, name):
        assert found.keys() == expected.keys()
        errors = {what: apart(found[what], expected[what]) for what in expected}
        assert max(errors.values()) <= ROUNDING, {what: e for what, e in errors.items() if e > ROUNDING}


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_step_from_shards_of_the_optimizers_state_is_the_step(ranks):
    expected = step_of_shards(None, "gpt2")
    for found in results(ranks, step_of_shards, "gpt2"):
        assert found.keys() == expected.keys()
        for what, value in expected.items():
            assert apart(found[what], value) <= ROUNDING, what


FORMS = {
    "whole": Strategy("sequences", "E", None, None, 14),
    "layers, E held": Strategy("layers", "E", None, None, 0),
    "layers, tiles of U in blocks": Strategy("layers", "U", 14, 14, 14, 2),
}


def products(mesh: Any) -> dict[str, torch.Tensor]:
    """Every product that a contraction knows, along a path, by every strategy; and of E alone."""
    S, params, E, U, case = inputs("gpt2")
    step, group = case.tree(23, 0.05), None if mesh is None else group_of(mesh)
    sides = SortedBatch("E", E, S), SortedBatch("U", U, S)
    forms = FORMS if mesh is not None else {"whole": Strategy("sequences", "E", None, None, None)}
    found: dict[str, torch.Tensor] = {}
    for name, how in forms.items():
        problem = Problem(params, *sides, spec(case), "gauss2", step, group=group)
        found |= {f"{name}: {what}": sums for what, sums in collected(problem, how).items()}
        alone = ProductSpec(x=spec(case).x)
        blocks_of_E = blocks(Problem(params, sides[0], None, alone, "midpoint", step, group=group), how)
        rows = torch.full((len(sides[0]),), torch.nan, dtype=torch.float64)
        for block in blocks_of_E:
            rows[block.at] = block.rows("norm")
        found[f"{name}: E alone"] = rows
    return found


def test_all_products_by_every_strategy_are_those_of_one_process():
    expected = products(None)
    for found in results(3, products):
        assert len(found) == len(FORMS) * len(expected)
        for name, sums in found.items():
            assert apart(sums, expected[f"whole: {name.partition(': ')[2]}"]) <= ROUNDING, name


def refused(mesh: Any, change: str) -> str:
    """What a rank raises where rank 1 is given something else, or all are given what no one takes."""
    S, params, E, U, _ = inputs("few")
    own, P = mesh.get_local_rank() == 1, fk.precond.diagonal(diagonal(params))
    if change == "batch" and own:
        U = U._replace(input_ids=U.input_ids + 1)
    if change == "order" and own:
        params = dict(reversed(params.items()))
    if change == "parameters" and own:
        params = {name: leaf + (name == "norm.weight") * 1e-9 for name, leaf in params.items()}
    if change == "microbatch":
        return error_of(lambda: fk.kernel(S, params, E, U, P, microbatch=1 + own, mesh=mesh))
    if change == "D" and own:
        P = fk.precond.diagonal(diagonal(params, 8))
    if change == "everyone":
        U = U._replace(input_ids=U.input_ids + 1000)
    if change == "memory":
        return error_of(lambda: fk.kernel(S, params, E, U, P, memory=1000, mesh=mesh))
    if change == "store":
        how = fk.Strategy("store", "E", 10, 10, 10)
        return error_of(lambda: fk.kernel(S, params, E, U, P, strategy=how, mesh=mesh))
    return error_of(lambda: fk.kernel(S, params, E, U, P, mesh=mesh))


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except fk.FKernelError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("batch", "ProcessError: The ranks disagree about U: rank 1 has"),
        ("order", "ProcessError: The ranks disagree about params: rank 1 has"),
        ("parameters", "ProcessError: The ranks disagree about params: rank 1 has"),
        ("microbatch", "ProcessError: The ranks disagree about memory, microbatch and strategy: rank 1 has"),
        ("D", "ProcessError: The ranks disagree about the preconditioner: rank 1 has"),
        ("everyone", "BatchError: In U: "),
        ("memory", "BatchError: memory=1000 bytes of each of 2 ranks is too small"),
        ("store", 'BatchError: The strategy "store" is for one process'),
    ],
    ids=["batch", "order", "parameters", "microbatch", "D", "everyone", "memory", "store"],
)
def test_ranks_that_were_given_different_things_compute_nothing(change, message):
    for error in results(2, refused, change):
        assert error.startswith(message), error


def refused_in_shards(mesh: Any) -> dict[str, str]:
    """What a rank raises where θ is in shards, and something else does not go with them; and what was certified."""
    _, params, E, U, case = inputs("own")
    S, own, group = weightless("own"), dealt(mesh, "own"), group_of(mesh)
    P, w = fk.precond.identity(), case.weights
    wide = fk.func.sequence_logprob(replace(S.apply, own_width=True))
    cut = {**own, "norm.weight": own["norm.weight"][:1]}
    sgd = fk.precond.fresh_state("sgd", params, lr=0.1)
    with torch.device("meta"):
        torch.manual_seed(0)
        without = fk.func.sequence_logprob(fk.func.make_functional(MODELS["own"](1))[0])
    few = {name: leaf for name, leaf in own.items() if name != "norm.weight"}
    found = {
        "P": error_of(lambda: fk.kernel(S, own, E, U, symmetric(params), mesh=mesh)),
        "model": error_of(lambda: fk.kernel(wide, own, E, U, P, mesh=mesh)),
        "shape": error_of(lambda: fk.kernel(S, cut, E, U, P, mesh=mesh)),
        "state": error_of(lambda: fk.explain_step(S, own, E, U, w, sgd, mesh=mesh)),
        "memory": error_of(lambda: fk.kernel(S, own, E, U, P, memory=1000, mesh=mesh)),
        "missing": error_of(lambda: fk.kernel(without, few, E, U, P, mesh=mesh)),
        "alone": error_of(lambda: fk.kernel(S, own, E, U, P)),
    }
    if group.rank == 1:
        own = dict(reversed(own.items()))
    found["order"] = error_of(lambda: fk.kernel(S, own, E, U, P, mesh=mesh))
    if group.rank == 1:
        own = {**dict(reversed(own.items())), "norm.bias": own["norm.bias"] * torch.nan}
    found["values"] = error_of(lambda: fk.kernel(S, own, E, U, P, mesh=mesh))
    fk.kernel(S, dealt(mesh, "own"), E, U, P, memory="80MiB", mesh=mesh)
    fk.explain_step(S, dealt(mesh, "own"), E, U, w, state_of(params), mesh=mesh)
    found["certified"] = ", ".join(sorted({one.name for one in fk.func.certificates(S) if one.passed}))
    return found


def differences(mesh: Any) -> torch.Tensor:
    """How far the derivative is from differences along a step, and they from each other, as a certificate says it."""
    S, params, E, U, case = inputs("lora")
    state, θ = state_of(params), params
    if mesh is not None:
        S, θ = weightless("lora"), dealt(mesh, "lora")
    fk.explain_step(S, θ, E, U, case.weights, state, mesh=mesh)
    (found,) = (one for one in fk.func.certificates(S) if one.name == "derivative")
    return torch.tensor([found.error, found.bound], dtype=torch.float64)


@pytest.mark.turns(6)
def test_differences_along_a_step_that_are_gathered_once_are_those_of_one_process():
    expected = differences(None)
    for found in results(2, differences):
        assert apart(found, expected) <= 1e-6  # of differences, which are small


@pytest.mark.turns(6)
def test_what_does_not_go_with_shards_is_refused_by_name_and_the_rest_is_certified_on_every_rank():
    for found in results(2, refused_in_shards):
        assert found.pop("certified") == "derivative, rows, values"
        messages = {
            "P": "BatchError: params are in shards, and P (function) is no diagonal",
            "model": "ModelError: params are in shards, so that f has to be computed layer by layer, and cannot",
            "shape": "ProcessError: Rank 0 of 2 failed (1 more failed): kernel: TreeError: params['norm.weight'] has",
            "state": "BatchError: params are in shards, and the optimizer's state is of SGDState",
            "memory": "BatchError: memory=1000 bytes of each of 2 ranks is too small beside parameters in shards",
            "missing": "ModelError: 'norm.weight' lie on the meta device and hold no values",
            "alone": "TreeError: params['embed.weight'] has shape",
            "order": "ProcessError: The ranks disagree about params: rank 1 has",
            "values": "ProcessError: Rank 1 of 2 failed: kernel: NonFiniteError: params['norm.bias'] holds 4",
        }
        for what, message in messages.items():
            assert message in found[what], (what, found[what])  # of one rank, or as all of them make it


def sent(mesh: Any) -> tuple[int, float]:
    """Bytes that this rank sends to others for a kernel, and those that the formula says."""
    S, params, E, U, case = inputs("own")
    counted, exchange = [0], dist.all_to_all_single

    def counting(out: Any, rows: torch.Tensor, received: Any, parts: Any, **more: Any) -> Any:
        counted[0] += (sum(parts) - parts[mesh.get_local_rank()]) * rows.element_size()
        return exchange(out, rows, received, parts, **more)

    with patch.object(dist, "all_to_all_single", counting):
        fk.kernel(S, params, E, U, fk.precond.identity(), microbatch=case.microbatch, mesh=mesh)
    n, P, W = len(case.E) + len(case.U), fk.tree.size(params), mesh.size()
    return counted[0], n * P * 8 * (W - 1) / W**2


def test_the_bytes_on_the_wire_are_the_formulas():
    every = results(2, sent)
    assert sum(counted for counted, _ in every) == pytest.approx(sum(said for _, said in every), rel=0.05)
