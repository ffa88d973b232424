"""The state certificate: the step predicted from the optimizer's state, compared with the step that was taken.

Without the weights after the step, a prediction can only be compared with a step that is executed from the same state:
the two agree whether or not the state was read correctly.
"""

from __future__ import annotations

import torch

from fkernel import tree
from fkernel.boundary import public
from fkernel.distributed import ShardedTree
from fkernel.func import Certificate
from fkernel.shapes import Tensor, Tree

BOUND = 0.05
"""Largest relative error of Δθ; the demo's float32 step is at 5e-4."""


@public
def state_against_step(step: Tree, before: Tree, after: Tree | None) -> Certificate:
    """Compare a predicted step with the weights after it.

    error = ‖Δθ − (θ_after − θ_before)‖ / ‖θ_after − θ_before‖

    Args:
        step: Δθ predicted from the optimizer's state and the batch's gradient, {name: [*shape]}.
        before: θ; where it is in shards, `step` and `after` are of this rank's.
        after: θ after the step that was taken; None where not available.

    Returns:
        The certificate; without `after`, `passed` is None and `detail` says what evidence would be needed.

    Example:
        >>> import torch
        >>> theta, moved = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
        >>> state_against_step({"w": torch.full((2,), 1.5)}, theta, moved).error
        0.5
        >>> state_against_step(moved, theta, None).passed is None
        True
    """
    if after is None:
        detail = (
            "self-consistent: the step is executed here from the same reading of the optimizer's state, so that its "
            "agreement is no evidence; step.after, the checkpoint after the step, would be"
        )
        return Certificate("state", None, float("nan"), BOUND, detail)
    own = before.own if isinstance(before, ShardedTree) else before
    for what, given in (("step", step), ("after", after), ("before", own)):
        if given is not own:
            tree.check_names(given, before, what, "before")
        tree.check_finite(given, what)
    real = {name: after[name].to(leaf) - leaf for name, leaf in own.items()}
    size = float(_norms(real, before).norm())
    if not size:
        return Certificate("state", None, float("nan"), BOUND, "nothing moved between step.after and the checkpoint")
    apart = _norms(tree.axpy(-1.0, real, step), before)
    error = float(apart.norm()) / size
    worst = [*before][int(apart.argmax())]
    detail = f"Δθ from the state, and step.after less the checkpoint: {error:.2%} apart, most in {worst!r}"
    return Certificate("state", error <= BOUND, error, BOUND, detail)


def _norms(x: Tree, params: Tree) -> Tensor:
    """‖x‖ of each parameter, [p] float64, of all ranks' shards where θ is in shards."""
    squares = torch.stack([x[name].double().square().sum() for name in params])
    return (params.summed(squares) if isinstance(params, ShardedTree) else squares).sqrt().cpu()
