"""Agreement of predicted and realised changes, in three numbers: correlation alone hides a wrong learning rate."""

from __future__ import annotations

from typing import NamedTuple

from fkernel import tree
from fkernel.boundary import public
from fkernel.engine.correlation import pearson, varies
from fkernel.errors import BatchError
from fkernel.shapes import Tensor


class Calibration(NamedTuple):
    """Agreement of a prediction with the realised change.

    Attributes:
        pearson: correlation r; independent of scale and offset.
        slope: b of the least-squares line realised ≈ a + b·predicted; 1 where the scale is right.
        relative_error: ‖predicted − realised‖ / ‖realised‖; sensitive to scale, offset and noise.
    """

    pearson: float
    slope: float
    relative_error: float


@public
def calibrate(predicted: Tensor, realised: Tensor) -> Calibration:
    """Compare a prediction with the realised change.

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
    changes = {"predicted": predicted, "realised": realised}
    tree.check_tensors(changes, "changes")
    if predicted.shape != realised.shape or predicted.ndim != 1 or len(predicted) < 2:
        raise BatchError(
            f"predicted has shape {list(predicted.shape)}, realised {list(realised.shape)}; expected the same [n] with "
            f"at least two sequences."
        )
    tree.check_finite(changes, "changes")
    p, r = predicted.double(), realised.double()
    p0, r0 = p - p.mean(), r - r.mean()
    if not varies(predicted) or not varies(realised):
        raise BatchError(
            "All predicted or all realised changes are equal, up to rounding, so neither correlation nor slope is "
            "defined; take sequences that move by different amounts."
        )
    return Calibration(
        pearson=pearson(predicted, realised),
        slope=float(p0 @ r0 / (p0 @ p0)),
        relative_error=float((p - r).norm() / r.norm()),
    )
