"""Adafactor, twice: the second moment of a matrix is a product of two vectors, and steps are relative to θ.

    torch          Δθ = −s ρ u / max(1, RMS(u)/d)      u = h / √V',  V' = r' c'ᵀ / mean(r')
                   ρ = min(lr, (t+1)^−½),  s = max(ε₂, RMS(θ)),  r' = r + (t+1)^γ (mean h² − r), c' likewise
    transformers   Δθ = −s ρ u / max(1, RMS(u)/d)      the same u, with h² + ε₁ in place of h²; then, with β1,
                   m' = β1 m + (1−β1)(…), Δθ = −m'
                   ρ = lr, or min(10⁻², (t+1)^−½) if it is relative (10⁻⁶(t+1) for 10⁻² while warming up);
                   s = 1 unless it scales by the parameter

A parameter's move depends on its whole gradient: not coordinate by coordinate. Decay is decoupled: lr λ θ in torch,
s ρ λ θ in transformers.

Source: torch 2.13's `_single_tensor_adafactor`; transformers 5.23's `Adafactor`; N. Shazeer & M. Stern (2018).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from fkernel.precond.base import DecayingState, Setting, Shape, by_name, root
from fkernel.precond.state import check_state
from fkernel.shapes import Tensor, Tree


@dataclass(frozen=True, eq=False)
class AdafactorState(DecayingState):
    """`torch.optim.Adafactor`'s: the second moment as a product of rows and columns.

    Attributes:
        row_var: {name: [*shape[:-1], 1]} of parameters with more than one dimension.
        col_var: {name: [*shape[:-2], 1, shape[-1]]} of the same.
        variance: {name: [d]} of vectors.
        scale: {name: RMS(θ)}, what a relative step is relative to.
        step: steps taken; one number, or {name: number}.
        lr: largest relative step.
        beta2_decay: γ, exponent of the decay.
        eps1: least root of the second moment; None: the dtype's ε.
        eps2: least scale.
        d: clipping threshold of the update's RMS.
    """

    MOMENTS: ClassVar[tuple[str, ...]] = ("row_var", "col_var", "variance")
    SQUARES: ClassVar[tuple[str, ...]] = MOMENTS

    row_var: Tree
    col_var: Tree
    variance: Tree
    scale: Mapping[str, float]
    step: Setting[int] = 0
    lr: Setting[float] = 1e-2
    beta2_decay: Setting[float] = -0.8
    eps1: Setting[float | None] = None
    eps2: Setting[float] = 1e-3
    d: Setting[float] = 1.0
    decoupled_weight_decay: Setting[bool] = field(default=True, kw_only=True)

    @classmethod
    def shapes(cls, shape: Shape) -> dict[str, Shape]:
        """Rows and columns of what has more than one dimension, a variance of what has not."""
        if len(shape) < 2:
            return {"variance": shape}
        return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}


@dataclass(frozen=True, eq=False)
class TransformersAdafactorState(DecayingState):
    """`transformers.Adafactor`'s.

    Attributes:
        exp_avg_sq_row: {name: [*shape[:-1]]} of parameters with more than one dimension.
        exp_avg_sq_col: {name: [*shape[:-2], shape[-1]]} of the same.
        exp_avg_sq: {name: [d]} of vectors.
        scale: {name: RMS(θ)}, what a step is relative to.
        step: steps taken.
        exp_avg: m, where there is a β1.
        lr: learning rate; None where steps are relative.
        eps: (ε₁ of h², ε₂ the least scale).
        clip_threshold: d.
        decay_rate: exponent of the decay, 1 − (t+1)^decay_rate.
        beta1: decay of m; None: there is none.
        scale_parameter: whether steps are relative to RMS(θ).
        relative_step: whether the learning rate is the optimizer's own.
        warmup_init: whether that one warms up.
    """

    MOMENTS: ClassVar[tuple[str, ...]] = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq")
    OPTIONAL: ClassVar[tuple[str, ...]] = ("exp_avg",)
    SQUARES: ClassVar[tuple[str, ...]] = MOMENTS

    exp_avg_sq_row: Tree
    exp_avg_sq_col: Tree
    exp_avg_sq: Tree
    scale: Mapping[str, float]
    step: Setting[int] = 0
    exp_avg: Tree = field(default_factory=dict)
    lr: Setting[float | None] = None
    eps: Setting[tuple[float, float]] = (1e-30, 1e-3)
    clip_threshold: Setting[float] = 1.0
    decay_rate: Setting[float] = -0.8
    beta1: Setting[float | None] = None
    scale_parameter: Setting[bool] = True
    relative_step: Setting[bool] = True
    warmup_init: Setting[bool] = False
    decoupled_weight_decay: Setting[bool] = field(default=True, kw_only=True)

    @classmethod
    def shapes(cls, shape: Shape) -> dict[str, Shape]:
        """Rows and columns of what has more than one dimension, squares of what has not."""
        if len(shape) < 2:
            return {"exp_avg_sq": shape}
        return {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": (*shape[:-2], shape[-1])}

    @staticmethod
    def decay_step(past: Any) -> float:
        """Tell s ρ, of one parameter's values: as far as decay goes, too."""
        t = past.step + 1
        rate = past.lr
        if past.relative_step:
            rate = min(1e-6 * t if past.warmup_init else 1e-2, t**-0.5)
        return rate * (max(past.eps[1], past.scale) if past.scale_parameter else 1.0)


def adafactor(grads: Tree, state: AdafactorState) -> Tree:
    """Compute Adafactor's move as torch has it, its factored second moment and its clipping included.

    Args:
        grads: h, {name: [*shape]}.
        state: before the step.

    Example:
        >>> state = AdafactorState({}, {}, {"w": torch.zeros(1)}, {"w": 1.0}, lr=0.5)
        >>> adafactor({"w": torch.tensor([4.0])}, state)
        {'w': tensor([-0.5000])}
    """
    check_state(state, AdafactorState)
    return by_name(_adafactor, grads, state)


def transformers_adafactor(grads: Tree, state: TransformersAdafactorState) -> Tree:
    """Compute Adafactor's move as transformers has it.

    Args:
        grads: h, {name: [*shape]}.
        state: before the step.

    Example:
        >>> state = TransformersAdafactorState({}, {}, {"w": torch.zeros(1)}, {"w": 1.0})
        >>> transformers_adafactor({"w": torch.tensor([4.0])}, state)
        {'w': tensor([-0.0100])}
    """
    check_state(state, TransformersAdafactorState)
    return by_name(_transformers_adafactor, grads, state)


def _adafactor(h: Tensor, past: Any) -> Tensor:
    t = past.step + 1
    share, rate = t**past.beta2_decay, min(past.lr, t**-0.5)
    eps1 = torch.finfo(h.dtype).eps if past.eps1 is None else past.eps1
    if h.ndim > 1:
        rows = torch.lerp(past.row_var, h.square().mean(-1, keepdim=True), share)
        columns = torch.lerp(past.col_var, h.square().mean(-2, keepdim=True), share)
        v = rows @ columns / rows.mean(-2, keepdim=True).clamp(min=eps1)
    else:
        v = torch.lerp(past.variance, h * h, share)
    update = h * v.clamp(min=eps1 * eps1).rsqrt()
    size = root(update.square().mean()) / past.d
    return -max(past.eps2, past.scale) * rate * update / size.clamp(min=1.0)


def _transformers_adafactor(h: Tensor, past: Any) -> Tensor:
    share = (past.step + 1) ** past.decay_rate
    square = h * h + past.eps[0]
    if h.ndim > 1:
        rows = torch.lerp(past.exp_avg_sq_row, square.mean(-1), share)
        columns = torch.lerp(past.exp_avg_sq_col, square.mean(-2), share)
        inverse = (rows / rows.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1) * columns.unsqueeze(-2).rsqrt()
    else:
        inverse = torch.lerp(past.exp_avg_sq, square, share).rsqrt()
    update = h * inverse
    size = root(update.square().mean()) / past.clip_threshold
    move = TransformersAdafactorState.decay_step(past) * update / size.clamp(min=1.0)
    if past.beta1 is None:
        return -move
    return -((1 - past.beta1) * move + (0.0 if past.exp_avg is None else past.beta1 * past.exp_avg))
