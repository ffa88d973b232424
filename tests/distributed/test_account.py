"""A run's account on several ranks is the account of one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fkernel import func
from fkernel.distributed import group_of, shard_tree
from fkernel.engine import RunStep, Sweep, account
from tests.distributed.ranks import results
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


@pytest.mark.turns(4)
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
