"""How well a prediction met what happened. Correlation alone hides a wrong learning rate, so three numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fkernel.errors import BatchError
from fkernel.shapes import Tensor

ROUNDING = 8
"""Roundoffs of its dtype, relative to ‖x‖, up to which the spread of x is rounding."""


class Calibration(NamedTuple):
    """A prediction held against the realised change.

    Attributes:
        pearson: correlation r; blind to scale and offset.
        slope: b of the least-squares line realised ≈ a + b·predicted; 1 where the scale is right.
        relative_error: ‖predicted − realised‖ / ‖realised‖; sees everything.
    """

    pearson: float
    slope: float
    relative_error: float


def calibrate(predicted: Tensor, realised: Tensor) -> Calibration:
    """Compare a prediction with what happened.

    Args:
        predicted: [n] nats.
        realised: [n] nats.

    Raises:
        BatchError: shapes differ, fewer than two sequences, or all predicted or all realised changes are equal up to
            rounding, so that no ratio is defined.

    Example:
        >>> import torch
        >>> calibrate(torch.tensor([2.0, 4.0, 6.0]), torch.tensor([1.0, 2.0, 3.0]))
        Calibration(pearson=1.0, slope=0.5, relative_error=1.0)
    """
    if predicted.shape != realised.shape or predicted.ndim != 1 or len(predicted) < 2:
        raise BatchError(
            f"predicted has shape {list(predicted.shape)}, realised {list(realised.shape)}; expected the same [n] with "
            f"at least two sequences."
        )
    p, r = predicted.double(), realised.double()
    p0, r0 = p - p.mean(), r - r.mean()
    if not varies(predicted) or not varies(realised):
        raise BatchError(
            "All predicted or all realised changes are equal, up to rounding, so neither correlation nor slope is "
            "defined; take sequences that move by different amounts."
        )
    return Calibration(
        pearson=round(float((p0 / p0.norm()) @ (r0 / r0.norm())), 12),
        slope=float(p0 @ r0 / (p0 @ p0)),
        relative_error=float((p - r).norm() / r.norm()),
    )


def varies(x: Tensor) -> bool:
    """Tell whether numbers differ by more than rounding.

    ‖x − x̄‖ > 8 u ‖x‖,  with u the roundoff of x's dtype; the mean of equal numbers is itself rounded

    Args:
        x: [n].

    Example:
        >>> varies(torch.full((3,), 0.1)), varies(torch.tensor([0.1, 0.2]))
        (False, True)
    """
    unit = torch.finfo(x.dtype if x.is_floating_point() else torch.float64).eps
    wide = x.double()
    return bool((wide - wide.mean()).norm() > ROUNDING * unit * wide.norm())
