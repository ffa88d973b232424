"""Muon: momentum made orthogonal. A parameter's move depends on its whole gradient: not coordinate by coordinate.

    Δθ = −lr κ NS((1−μ) h + μ b')       b' = μ b + (1−μ) h;  NS(b') without Nesterov; NS: Newton-Schulz
    κ = √max(1, o/i), or 0.2 √max(o, i) where it is to match AdamW's moves

What torch's documentation of Muon says, g + μ b' with b' = μ b + g, is not what it executes. Decay is decoupled.

Source: torch 2.13's `_single_tensor_muon`; K. Jordan et al., "Muon" (2024); J. Liu et al. (2025) for the second κ.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from fkernel.errors import OptimizerStateError
from fkernel.precond.base import DecayingState, Setting, by_name, root
from fkernel.precond.state import check_state
from fkernel.shapes import Tensor, Tree


@dataclass(frozen=True, eq=False)
class MuonState(DecayingState):
    """`torch.optim.Muon`'s; for matrices.

    Attributes:
        momentum_buffer: b, {name: [o i]}.
        lr: learning rate.
        momentum: μ.
        nesterov: whether g is looked ahead with.
        coefficients: of the quintic iteration.
        steps: iterations.
        eps: least norm.
        adjust_lr_fn: which κ: "original" (as None is) or "match_rms_adamw".
    """

    MOMENTS: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    momentum_buffer: Tree
    lr: Setting[float] = 1e-3
    momentum: Setting[float] = 0.95
    nesterov: Setting[bool] = True
    coefficients: Setting[tuple[float, float, float]] = (3.4445, -4.7750, 2.0315)
    steps: Setting[int] = 5
    eps: Setting[float] = 1e-7
    adjust_lr_fn: Setting[str | None] = None
    weight_decay: Setting[float] = field(default=0.1, kw_only=True)
    decoupled_weight_decay: Setting[bool] = field(default=True, kw_only=True)


def muon(grads: Tree, state: MuonState) -> Tree:
    """Compute Muon's move; torch executes the iteration in bfloat16, this one in g's dtype.

    Args:
        grads: h, {name: [o i]}.
        state: before the step.

    Raises:
        OptimizerStateError: a parameter is no matrix.

    Example:
        >>> move = muon({"w": torch.eye(2)}, MuonState({"w": torch.zeros(2, 2)}, lr=1.0))["w"]
        >>> bool((move.diagonal() < -0.6).all())
        True
    """
    check_state(state, MuonState)
    for name, g in grads.items():
        if g.ndim != 2:
            raise OptimizerStateError(
                f"Muon orthogonalises matrices; {name!r} has shape {list(g.shape)}. Give such parameters to another "
                f"optimizer, as trainings do (`precond.MixedState`)."
            )
    return by_name(_muon, grads, state)


def _muon(h: Tensor, past: Any) -> Tensor:
    b = torch.lerp(past.momentum_buffer, h, 1 - past.momentum)
    ahead = torch.lerp(h, b, past.momentum) if past.nesterov else b
    o, i = h.shape
    size = 0.2 * max(o, i) ** 0.5 if past.adjust_lr_fn == "match_rms_adamw" else max(1.0, o / i) ** 0.5
    return -past.lr * size * _orthogonal(ahead, past)


def _orthogonal(x: Tensor, past: Any) -> Tensor:
    """Newton-Schulz: singular values towards 1."""
    a, b, c = past.coefficients
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / root(x.square().sum()).clamp(min=past.eps)
    for _ in range(past.steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
