"""A run's step as the ranks of a mesh hold it, after they agree on it: whole, or this rank's shards of it."""

from __future__ import annotations

from dataclasses import replace

from fkernel.distributed import Group, ShardedTree, agree
from fkernel.engine.adjoint import Executed, RunStep
from fkernel.engine.over_ranks import described
from fkernel.engine.params_in_shards import agreed_params, agreed_state, agreed_tree
from fkernel.precond import AdamWState
from fkernel.shapes import Tree


def agreed_step(step: RunStep, group: Group | None) -> RunStep:
    """Return a step of what this rank holds, after the ranks agree on it.

    Where θ is in shards, moments, Δθ and the others may be shards, `DTensor`s or whole.

    Args:
        step: as the caller gave it.
        group: the ranks; None for this process alone.

    Raises:
        ProcessError: the ranks have different things.
        TreeError: a leaf is neither whole nor this rank's shard, or is a `DTensor` and there is no mesh.
        ModelError: θ is in shards, and f has no model that could be computed layer by layer.
    """
    which = f"step {step.number}"
    if group is not None:
        agree(group, which, described([step.U, step.weights, step.clip]))
    θ = agreed_params(step.f, step.params, group, f"params of {which}")
    if group is None:
        return step

    def own(vector: Tree, what: str) -> Tree:
        return agreed_tree(vector, θ, group, f"{what} of {which}") or {}

    executed = step.executed
    if executed is not None:
        executed = Executed(own(executed.delta, "executed.delta"), own(executed.exp_avg, "executed.exp_avg"))
    state, what = step.state, f"the optimizer's state of {which}"
    if isinstance(θ, ShardedTree):
        state = agreed_state(state, θ, group, what)
        assert isinstance(state, AdamWState)
    else:
        agree(group, what, described(vars(state)))
    return replace(
        step,
        params=θ,
        state=state,
        delta=None if step.delta is None else own(step.delta, "delta"),
        executed=executed,
        older={age: own(m, f"older[{age}]") for age, m in step.older.items()},
    )
