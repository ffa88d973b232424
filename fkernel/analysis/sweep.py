"""Range of validity of a prediction: predicted against realised change for steps of many sizes.

Every part of AdamW's step is proportional to the learning rate, so the step at s times the rate is s Δθ:

    first_e(s) = s ⟨∇S_e, Δθ⟩     second_e(s) = first_e(s) + s² ½ ΔθᵀH_eΔθ     realised_e(s) = S_e(θ + sΔθ) − S_e(θ)

As s falls, the error of the first falls as s², of the second as s³, down to the rounding floor. For large s the
expansion breaks down. Between the two is the range in which a prediction holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch

from fkernel import func, tree
from fkernel.analysis.decomposition import rounding_floor
from fkernel.boundary import public
from fkernel.engine import reuse_memory
from fkernel.engine.planning import usual_microbatch
from fkernel.errors import BatchError, NonFiniteError
from fkernel.func import evaluate_in_float64
from fkernel.func.inputs import Function
from fkernel.shapes import Tensor, Tree

DECADES = tuple(10 ** (i / 3) for i in range(-18, 7))
"""Eight decades, from a millionth of the step to a hundred times it, three scales in each."""


class Sweep(NamedTuple):
    """Changes of E at every size of the step.

    Attributes:
        scales: [k] s, multiples of the step, smallest first.
        first: [k n_E] predicted, first order.
        second: [k n_E] predicted, with curvature.
        realised: [k n_E] realised change; NaN where f was not finite.
        floor: [n_E] size of the rounding in `realised`, `rounding_floor`.
    """

    scales: Tensor
    first: Tensor
    second: Tensor
    realised: Tensor
    floor: Tensor

    @property
    def noise(self) -> Tensor:
        """[k] ‖floor‖ / ‖realised‖: an error below it is rounding."""
        return self.floor.norm() / self.realised.norm(dim=1)

    def error(self, order: Literal["first", "second"] = "first") -> Tensor:
        """[k] ‖predicted − realised‖ / ‖realised‖."""
        predicted = self.first if order == "first" else self.second
        return (predicted - self.realised).norm(dim=1) / self.realised.norm(dim=1)

    def holds(self, within: float = 0.01, order: Literal["first", "second"] = "first") -> tuple[float, float] | None:
        """Return the widest range of scales in which the relative error is at most `within`; None if none."""
        good = (self.error(order) <= within).tolist()
        best, start = (0, 0), None
        for i, ok in enumerate([*good, False]):
            if ok and start is None:
                start = i
            if not ok and start is not None:
                best, start = max(best, (start, i), key=lambda run: run[1] - run[0]), None
        low, high = best
        return None if low == high else (float(self.scales[low]), float(self.scales[high - 1]))


@public
def step_sweep(
    f: Function, params: Tree, E: Any, step: Tree, scales: Sequence[float] = DECADES, *, microbatch: int | None = None
) -> Sweep:
    """Predict and measure the effect of a step at several sizes.

    Args:
        f: S, (params, batch) -> [n].
        params: θ.
        E: the sequences.
        step: Δθ, {name: [*shape]}, such as `adamw_step(…).total`.
        scales: multiples of it, such as learning rates relative to the step's own.
        microbatch: as in `fkernel.kernel`.

    Returns:
        A Sweep: one jvp, one curvature, one gradient of every sequence, and one evaluation for each scale.

    Raises:
        BatchError: no scale is given, or one is not positive.

    Example:
        >>> f = lambda params, x: (x @ params["w"]).square()
        >>> sweep = step_sweep(f, {"w": torch.ones(2)}, torch.eye(2), {"w": torch.ones(2)}, [0.1, 1.0])
        >>> sweep.first[1].tolist(), sweep.realised[1].tolist(), sweep.second[1].tolist()
        ([2.0, 2.0], [3.0, 3.0], [3.0, 3.0])
    """
    if not len(scales) or min(scales) <= 0:
        raise BatchError(f"scales are {[*scales]}; expected one or more positive multiples of the step.")
    m = usual_microbatch(microbatch, E)
    with reuse_memory():
        slope, bend = func.jvp(f, m)(params, E, step), 0.5 * func.curvature(f, m)(params, E, step)
        S = evaluate_in_float64(f, m)
        before = S(params, E)
        realised = torch.stack([_evaluated(S, tree.axpy(s, step, params), E, before) - before for s in sorted(scales)])
        realised = realised.to(slope)
        floor = rounding_floor(f, params, E, microbatch=m)
    s = torch.tensor(sorted(scales), dtype=slope.dtype, device=slope.device)[:, None]
    return Sweep(s[:, 0], s * slope, s * slope + s * s * bend, realised, floor)


def _evaluated(S: Function, params: Tree, E: Any, like: Tensor) -> Tensor:
    """S at θ + sΔθ; NaN for all of E where it overflows."""
    try:
        return S(params, E)
    except NonFiniteError:
        return torch.full_like(like, torch.nan)
