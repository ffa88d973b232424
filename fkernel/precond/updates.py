"""Optimizers as pure functions of the gradient, F: (g, state) → Δθ, for `secant`, `broyden` and `linearized`.

    adamw        Δθ = −lr (β1 m + (1−β1) g)/bc1 / (√(v'/bc2)+ε)      v' = β2 v + (1−β2) g²
    rmsprop      Δθ = −lr g / (√v' + ε)                              v' = α v + (1−α) g²
    adafactor    Δθ = −α g / √V' / max(1, RMS(g/√V')/d)              V' = r' c'ᵀ / mean(r'), a product of two vectors
    lion         Δθ = −lr s(β1 m + (1−β1) g)                         s = sign, or x/√(x²+w²) of width w
    muon         Δθ = −lr κ NS((1−μ) g + μ b')                       b' = μ b + (1−μ) g,  κ = √max(1, o/i)
                                                                     NS(b') without Nesterov; NS: Newton-Schulz

Decoupled weight decay does not depend on g and is left out. Each is what `torch.optim` executes (Lion is not in it);
what torch's documentation of Muon says, g + μ b' with b' = μ b + g, is not. Where v' = 0, which is a coordinate that
never had a gradient, √v' is differentiated as the constant that it is for a gradient that stays 0.

Source: D. P. Kingma & J. Ba (2015); T. Tieleman & G. Hinton (2012); N. Shazeer & M. Stern, "Adafactor" (2018); X. Chen
et al., "Symbolic discovery of optimization algorithms" (2023); K. Jordan et al., "Muon" (2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fkernel.errors import OptimizerStateError
from fkernel.precond.state import AdamWState, check_state
from fkernel.shapes import Tensor, Tree

Rate = float | Mapping[str, float]
"""One number for all parameters, or {name: number}, as parameter groups have it."""


def adamw(grads: Tree, state: AdamWState) -> Tree:
    """Compute AdamW's move, without decay; v' depends on g here.

    Args:
        grads: g = c ∇L, {name: [*shape]}.
        state: before the step.

    Example:
        >>> from fkernel.precond import adamw_init
        >>> adamw({"w": torch.tensor([4.0])}, adamw_init({"w": torch.zeros(1)}, lr=0.5))
        {'w': tensor([-0.5000])}
    """
    check_state(state)
    moved: Tree = {}
    for name, g in grads.items():
        t, beta1, beta2 = state.step[name] + 1, state.beta1[name], state.beta2[name]
        m = beta1 * state.exp_avg[name] + (1 - beta1) * g
        v = beta2 * state.exp_avg_sq[name] + (1 - beta2) * g * g
        root = _root(v / (1 - beta2**t)) + state.eps[name]
        moved[name] = -state.lr[name] * m / (1 - beta1**t) / root
    return moved


@dataclass(frozen=True, eq=False)
class RMSpropState:
    """`torch.optim.RMSprop`'s, neither centered nor with momentum.

    Attributes:
        square_avg: v, {name: [*shape]}.
        lr: learning rate; one number, or {name: number}, as the next two.
        alpha: decay of v.
        eps: ε.
    """

    square_avg: Tree
    lr: Rate = 1e-2
    alpha: Rate = 0.99
    eps: Rate = 1e-8


def rmsprop(grads: Tree, state: RMSpropState) -> Tree:
    """Compute RMSprop's move.

    Args:
        grads: g, {name: [*shape]}.
        state: before the step.

    Example:
        >>> rmsprop({"w": torch.tensor([2.0])}, RMSpropState({"w": torch.tensor([4.0])}, lr=1.0, alpha=0.5, eps=0.0))
        {'w': tensor([-1.])}
    """
    check_state(state, RMSpropState)
    moved: Tree = {}
    for name, g in grads.items():
        alpha = _of(state.alpha, name)
        root = _root(alpha * state.square_avg[name] + (1 - alpha) * g * g) + _of(state.eps, name)
        moved[name] = -_of(state.lr, name) * g / root
    return moved


@dataclass(frozen=True, eq=False)
class AdafactorState:
    """`torch.optim.Adafactor`'s: the second moment as a product of rows and columns.

    Attributes:
        row_var: {name: [*shape[:-1], 1]} of parameters with more than one dimension.
        col_var: {name: [*shape[:-2], 1, shape[-1]]} of the same.
        variance: {name: [d]} of vectors.
        scale: {name: RMS(θ)}, what a relative step is relative to.
        step: steps taken; one number, or {name: number}.
        lr: largest relative step.
        beta2_decay: exponent of the decay, 1 − t^beta2_decay.
        eps1: least root of the second moment; None: the dtype's ε.
        eps2: least scale.
        d: clipping threshold of the update's RMS.
    """

    row_var: Tree
    col_var: Tree
    variance: Tree
    scale: dict[str, float]
    step: int | Mapping[str, int] = 0
    lr: float = 1e-2
    beta2_decay: float = -0.8
    eps1: float | None = None
    eps2: float = 1e-3
    d: float = 1.0


def adafactor(grads: Tree, state: AdafactorState) -> Tree:
    """Compute Adafactor's move, its factored second moment and its clipping included.

    Args:
        grads: g, {name: [*shape]}.
        state: before the step.

    Example:
        >>> state = AdafactorState({}, {}, {"w": torch.zeros(1)}, {"w": 1.0}, lr=0.5)
        >>> adafactor({"w": torch.tensor([4.0])}, state)
        {'w': tensor([-0.5000])}
    """
    check_state(state, AdafactorState)
    moved: Tree = {}
    for name, g in grads.items():
        t = _of(state.step, name) + 1
        share, rate = t**state.beta2_decay, min(state.lr, t**-0.5)
        eps1 = torch.finfo(g.dtype).eps if state.eps1 is None else state.eps1
        if g.ndim > 1:
            rows = torch.lerp(state.row_var[name], g.square().mean(-1, keepdim=True), share)
            columns = torch.lerp(state.col_var[name], g.square().mean(-2, keepdim=True), share)
            v = rows @ columns / rows.mean(-2, keepdim=True).clamp(min=eps1)
        else:
            v = torch.lerp(state.variance[name], g * g, share)
        update = g * v.clamp(min=eps1 * eps1).rsqrt()
        size = _root(update.square().mean()) / state.d
        moved[name] = -max(state.eps2, state.scale[name]) * rate * update / size.clamp(min=1.0)
    return moved


@dataclass(frozen=True, eq=False)
class LionState:
    """Lion's.

    Attributes:
        exp_avg: m, {name: [*shape]}.
        lr: learning rate.
        beta1: of the interpolation that is stepped along.
        width: w of the smooth sign x/√(x²+w²); 0 is the sign itself, whose derivative is 0 wherever it has one.
    """

    exp_avg: Tree
    lr: float = 1e-4
    beta1: float = 0.9
    width: float = 0.0


def lion(grads: Tree, state: LionState) -> Tree:
    """Compute Lion's move.

    Args:
        grads: g, {name: [*shape]}.
        state: before the step.

    Example:
        >>> lion({"w": torch.tensor([-3.0])}, LionState({"w": torch.zeros(1)}, lr=0.5))
        {'w': tensor([0.5000])}
    """
    check_state(state, LionState)
    moved: Tree = {}
    for name, g in grads.items():
        x = state.beta1 * state.exp_avg[name] + (1 - state.beta1) * g
        moved[name] = -state.lr * (x / (x * x + state.width**2).sqrt() if state.width else x.sign())
    return moved


@dataclass(frozen=True, eq=False)
class MuonState:
    """`torch.optim.Muon`'s; for matrices.

    Attributes:
        momentum_buffer: b, {name: [o i]}.
        lr: learning rate.
        momentum: μ.
        nesterov: whether g is looked ahead with.
        coefficients: of the quintic iteration.
        steps: iterations.
        eps: least norm.
    """

    momentum_buffer: Tree
    lr: float = 1e-3
    momentum: float = 0.95
    nesterov: bool = True
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    steps: int = 5
    eps: float = 1e-7


def muon(grads: Tree, state: MuonState) -> Tree:
    """Compute Muon's move; torch executes the iteration in bfloat16, this one in g's dtype.

    Args:
        grads: g, {name: [o i]}.
        state: before the step.

    Raises:
        OptimizerStateError: a parameter is no matrix.

    Example:
        >>> move = muon({"w": torch.eye(2)}, MuonState({"w": torch.zeros(2, 2)}, lr=1.0))["w"]
        >>> bool((move.diagonal() < -0.6).all())
        True
    """
    check_state(state, MuonState)
    moved: Tree = {}
    for name, g in grads.items():
        if g.ndim != 2:
            raise OptimizerStateError(
                f"Muon orthogonalises matrices; {name!r} has shape {list(g.shape)}. Give such parameters to another "
                f"optimizer, as trainings do (`precond.partition`)."
            )
        b = torch.lerp(state.momentum_buffer[name], g, 1 - state.momentum)
        ahead = torch.lerp(g, b, state.momentum) if state.nesterov else b
        moved[name] = -state.lr * max(1.0, g.shape[0] / g.shape[1]) ** 0.5 * _orthogonal(ahead, state)
    return moved


def _orthogonal(x: Tensor, state: MuonState) -> Tensor:
    """Newton-Schulz: singular values towards 1."""
    a, b, c = state.coefficients
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / _root(x.square().sum()).clamp(min=state.eps)
    for _ in range(state.steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def _of(rate: Rate, name: str) -> float:
    """Give a parameter's own number."""
    return rate[name] if isinstance(rate, Mapping) else rate


def _root(v: Tensor) -> Tensor:
    """√v, with derivative 0 where v is 0: there its own is infinite, times that of v, which is 0."""
    dark = v == 0
    return torch.where(dark, 0.0, torch.where(dark, 1.0, v).sqrt())
