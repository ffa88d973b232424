"""A run's account on several ranks is the account of one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from fkernel import func, tree
from fkernel.distributed import group_of, shard_tree, sharded
from fkernel.engine import RunStep, Sweep, account, explain_step, loss_gradient
from fkernel.engine.planning import LONG
from tests.distributed.cases import inputs, state_of
from tests.distributed.ranks import results
from tests.distributed.shards import dealt, weightless
from tests.distributed.test_same_numbers import ROUNDING, apart
from tests.models import MODELS
from tests.test_run_account import TEMPERATURE, accounted, run


def in_shards(mesh: Any, step: RunStep, dealt: bool) -> RunStep:
    """A step as a rank has it whose θ is in shards: of `dealt`, `DTensor`s, as FSDP2's modules have them."""
    from torch.distributed.tensor import distribute_tensor

    group = group_of(mesh)
    with func.without_weights():
        f = func.weighted_logprob(func.make_functional(MODELS["own"](3))[0], TEMPERATURE)
    own = {
        what: shard_tree(group, tree)
        for what, tree in (("exp_avg", step.state.exp_avg), ("exp_avg_sq", step.state.exp_avg_sq))
    }
    params: Any = {name: distribute_tensor(leaf, mesh) for name, leaf in step.params.items()} if dealt else None
    params = shard_tree(group, step.params) if params is None else params
    delta = None if step.delta is None else shard_tree(group, step.delta)
    return replace(step, f=f, params=params, state=replace(step.state, **own), delta=delta)


def fields(
    mesh: Any, options: dict[str, Any], resumed: bool = False, shards: str | None = None
) -> dict[str, torch.Tensor]:
    """Every column of an account of the run's last steps."""
    taken, kept = run()._replace(steps=run().steps[-3:]), list[Sweep]()
    if mesh is not None and shards is not None:
        with func.without_weights():
            S = func.sequence_logprob(func.make_functional(MODELS["own"](3))[0])
        steps = [in_shards(mesh, step, shards == "DTensors") for step in taken.steps]
        taken = taken._replace(S=S, steps=steps)

    def keep(sweep: Sweep) -> None:
        kept.append(sweep._replace(rows={name: leaf.clone() for name, leaf in sweep.rows.items()}))

    result = accounted(taken, mesh=mesh, on_step=keep, **options)
    if resumed:
        steps = taken.steps[::-1]
        result = account(taken.S, taken.E, steps, mesh=mesh, resume=kept[1], **options)
    columns = {f"step {i}": C for i, C in enumerate(result.contributions)}
    return columns | {name: value for name, value in result._asdict().items() if isinstance(value, torch.Tensor)}


@pytest.mark.turns(6)
@pytest.mark.parametrize(
    ("ranks", "options", "resumed", "shards"),
    [
        (4, {"path": "gauss2", "microbatch": 1}, True, None),
        (2, {"memory": "40MiB"}, False, None),
        (4, {"path": "gauss2"}, True, "shards"),
        (2, {"memory": 150_000}, False, "DTensors"),
    ],
)
def test_any_number_of_ranks_gives_the_same_account(ranks, options, resumed, shards):
    expected = fields(None, {**options, "memory": None})
    size = expected["realised"].norm()
    for found in results(ranks, fields, options, resumed, shards):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if name in ("arithmetic", "unexplained", "older"):  # nothing, or what rounding makes of a difference of θ
                assert float((found[name] - value).norm()) <= 1e-9 * float(size)
            else:
                assert apart(found[name], value) <= ROUNDING, name


def of_adapters(mesh: Any) -> dict[str, torch.Tensor]:
    """Every column of an account of two steps that train adapters alone; what is frozen is in shards too."""
    S, params, E, U, case = inputs("lora")
    θ, state, steps = params, state_of(params), list[RunStep]()
    for _ in range(2):
        _, step = explain_step(S, θ, E, U, case.weights, state)
        g = loss_gradient(S, θ, U, case.weights)[0]
        steps.append(RunStep(S, θ, U, case.weights, state, delta=step.total))
        θ, state = tree.add(θ, step.total), _next(state, g)
    if mesh is not None:
        group, S, frozen = group_of(mesh), weightless("lora"), dealt(mesh, "lora")
        steps = [_dealt(group, replace(step, f=S), frozen) for step in steps]
    result = account(S, E, steps[::-1], mesh=mesh)
    columns = {f"step {i}": C for i, C in enumerate(result.contributions)}
    return columns | {name: value for name, value in result._asdict().items() if isinstance(value, torch.Tensor)}


def _next(state: Any, g: dict[str, torch.Tensor]) -> Any:
    """AdamW's state after a step."""
    m = {name: state.beta1[name] * m + (1 - state.beta1[name]) * g[name] for name, m in state.exp_avg.items()}
    v = {name: state.beta2[name] * v + (1 - state.beta2[name]) * g[name] ** 2 for name, v in state.exp_avg_sq.items()}
    return replace(state, exp_avg=m, exp_avg_sq=v, step={name: t + 1 for name, t in state.step.items()})


def _dealt(group: Any, step: RunStep, frozen: dict[str, torch.Tensor]) -> RunStep:
    moments = {what: shard_tree(group, getattr(step.state, what)) for what in ("exp_avg", "exp_avg_sq")}
    own = {name: leaf.requires_grad_() for name, leaf in shard_tree(group, step.params).items()}
    delta = shard_tree(group, step.delta or {})
    return replace(step, params={**frozen, **own}, state=replace(step.state, **moments), delta=delta)


@pytest.mark.turns(6)
def test_adapters_in_shards_have_the_account_of_one_process():
    expected = of_adapters(None)
    for found in results(2, of_adapters):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            of_nats = name in (
                "realised",
                "arithmetic",
                "unexplained",
                "older",
            )  # differences of nats
            assert float((found[name] - value).norm()) <= ROUNDING * (1.0 if of_nats else float(value.norm())), name


def gathered(mesh: Any, sequences: int) -> int:
    """How often ranks gather for the account of a step of so many sequences."""
    S, params, E, _, _ = inputs("own")
    U = func.pad([[1, 2]] * sequences, [[3 + i % 7] * 10 for i in range(sequences)])
    weights = torch.ones(sequences, dtype=torch.float64)
    step = RunStep(S, params, U, weights, state_of(params), delta=tree.scale(1e-3, params))
    step = _dealt(group_of(mesh), replace(step, f=weightless("own")), {})
    with patch.object(sharded, "gather_shards", wraps=sharded.gather_shards) as counted:
        account(weightless("own"), E, [step], mesh=mesh)
    return counted.call_count


@pytest.mark.turns(6)
def test_an_account_gathers_as_often_for_many_sequences_as_for_few():
    assert 2 * 2 * LONG < 90 * 62, "the many are walked in tiles where memory is short"
    assert results(2, gathered, 200) == results(2, gathered, 4)
