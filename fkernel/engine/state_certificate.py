"""The state certificate: the step predicted from the optimizer's state, compared with the step that was taken.

Without the weights after the step, a prediction can only be compared with a step that is executed from the same state:
the two agree whether or not the state was read correctly.
"""

from __future__ import annotations

from fkernel import tree
from fkernel.boundary import public
from fkernel.func import Certificate
from fkernel.shapes import Tree

BOUND = 0.05
"""Largest relative error of Δθ; the demo's float32 step is at 5e-4."""


@public
def state_against_step(step: Tree, before: Tree, after: Tree | None) -> Certificate:
    """Compare a predicted step with the weights after it.

    error = ‖Δθ − (θ_after − θ_before)‖ / ‖θ_after − θ_before‖

    Args:
        step: Δθ predicted from the optimizer's state and the batch's gradient, {name: [*shape]}.
        before: θ.
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
    for what, given in (("step", step), ("after", after), ("before", before)):
        if given is not before:
            tree.check_names(given, before, what, "before")
        tree.check_finite(given, what)
    real = {name: after[name].to(leaf) - leaf for name, leaf in before.items()}
    size = float(tree.norm(real))
    if not size:
        return Certificate("state", None, float("nan"), BOUND, "nothing moved between step.after and the checkpoint")
    error = float(tree.norm(tree.axpy(-1.0, real, step))) / size
    worst = max(real, key=lambda name: float((step[name] - real[name]).norm()))
    detail = f"Δθ from the state, and step.after less the checkpoint: {error:.2%} apart, most in {worst!r}"
    return Certificate("state", error <= BOUND, error, BOUND, detail)
