"""One process, two and four give the same numbers in float64: kernels, influence, a step explained."""

from __future__ import annotations

from collections.abc import Callable
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
from tests.distributed.cases import answers, diagonal, inputs, step_of_shards
from tests.distributed.ranks import results
from tests.test_layered import collected, spec

ROUNDING = 1e-12


@cache
def alone(name: str) -> dict[str, torch.Tensor]:
    return answers(None, name)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))


@pytest.mark.parametrize(("name", "ranks"), [("few", 1), ("own", 2), ("own", 4), ("gpt2", 4), ("few", 4), ("lora", 2)])
def test_any_number_of_ranks_gives_the_same_on_each(name, ranks):
    expected = alone(name)
    for found in results(ranks, answers, name):
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
