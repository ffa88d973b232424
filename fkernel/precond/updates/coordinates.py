"""Optimizers that work coordinate by coordinate and keep one moment or none; h is the gradient that the rule is given.

    sgd        Δθ = −lr b', or −lr (h + μ b') with Nesterov         b' = μ b + (1−τ) h; h itself at first
    rmsprop    Δθ = −lr b',  b' = μ b + h / (√s' + ε)               v' = α v + (1−α) h²,  s' = v', or v' − ḡ'² centered
    adagrad    Δθ = −lr/(1 + t ψ) h / (√v' + ε)                     v' = v + h²
    lion       Δθ = −lr s(β1 m + (1−β1) h)                          s = sign, or x/√(x²+w²) of width w

Source: torch 2.13's `_single_tensor_sgd`, `_single_tensor_rmsprop`, `_single_tensor_adagrad`; T. Tieleman & G. Hinton
(2012); J. Duchi et al. (2011); X. Chen et al., "Symbolic discovery of optimization algorithms" (2023), which torch has
not and bitsandbytes has.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from fkernel.precond.base import DecayingState, Setting, by_name, root
from fkernel.precond.state import check_state
from fkernel.shapes import Tensor, Tree


@dataclass(frozen=True, eq=False)
class SGDState(DecayingState):
    """`torch.optim.SGD`'s.

    Attributes:
        momentum_buffer: b of the parameters that have been stepped with momentum, {name: [*shape]}.
        lr: learning rate.
        momentum: μ.
        dampening: τ.
        nesterov: whether h is looked ahead with.
    """

    OPTIONAL: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    momentum_buffer: Tree = field(default_factory=dict)
    lr: Setting[float] = 1e-3
    momentum: Setting[float] = 0.0
    dampening: Setting[float] = 0.0
    nesterov: Setting[bool] = False


@dataclass(frozen=True, eq=False)
class RMSpropState(DecayingState):
    """`torch.optim.RMSprop`'s.

    Attributes:
        square_avg: v, {name: [*shape]}.
        lr: learning rate.
        alpha: decay of v.
        eps: ε.
        momentum: μ.
        centered: whether v' is made a variance.
        momentum_buffer: b, where there is momentum.
        grad_avg: ḡ, where it is centered.
    """

    MOMENTS: ClassVar[tuple[str, ...]] = ("square_avg",)
    OPTIONAL: ClassVar[tuple[str, ...]] = ("momentum_buffer", "grad_avg")
    SQUARES: ClassVar[tuple[str, ...]] = ("square_avg",)

    square_avg: Tree
    lr: Setting[float] = 1e-2
    alpha: Setting[float] = 0.99
    eps: Setting[float] = 1e-8
    momentum: Setting[float] = 0.0
    centered: Setting[bool] = False
    momentum_buffer: Tree = field(default_factory=dict)
    grad_avg: Tree = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class AdagradState(DecayingState):
    """`torch.optim.Adagrad`'s.

    Attributes:
        step: t, steps taken.
        sum: v, {name: [*shape]}.
        lr: learning rate.
        lr_decay: ψ.
        eps: ε.
    """

    MOMENTS: ClassVar[tuple[str, ...]] = ("sum",)
    SQUARES: ClassVar[tuple[str, ...]] = ("sum",)

    step: Setting[int]
    sum: Tree
    lr: Setting[float] = 1e-2
    lr_decay: Setting[float] = 0.0
    eps: Setting[float] = 1e-10


@dataclass(frozen=True, eq=False)
class LionState(DecayingState):
    """Lion's, in 32 bits or as dequantised; decay is decoupled.

    Attributes:
        exp_avg: m, {name: [*shape]}.
        lr: learning rate.
        beta1: of the interpolation that is stepped along.
        width: w of the smooth sign x/√(x²+w²); 0 is the sign itself, whose derivative is 0 wherever it has one.
        beta2: decay of m, which matters for the next step only.
    """

    MOMENTS: ClassVar[tuple[str, ...]] = ("exp_avg",)

    exp_avg: Tree
    lr: Setting[float] = 1e-4
    beta1: Setting[float] = 0.9
    width: float = 0.0
    beta2: Setting[float] = 0.99
    decoupled_weight_decay: Setting[bool] = field(default=True, kw_only=True)


def sgd(grads: Tree, state: SGDState) -> Tree:
    """Compute the move of stochastic gradient descent.

    Args:
        grads: h, {name: [*shape]}.
        state: before the step.

    Example:
        >>> sgd({"w": torch.tensor([2.0])}, SGDState({"w": torch.tensor([4.0])}, lr=1.0, momentum=0.5))
        {'w': tensor([-4.])}
    """
    check_state(state, SGDState)
    return by_name(_sgd, grads, state)


def rmsprop(grads: Tree, state: RMSpropState) -> Tree:
    """Compute RMSprop's move.

    Args:
        grads: h, {name: [*shape]}.
        state: before the step.

    Example:
        >>> rmsprop({"w": torch.tensor([2.0])}, RMSpropState({"w": torch.tensor([4.0])}, lr=1.0, alpha=0.5, eps=0.0))
        {'w': tensor([-1.])}
    """
    check_state(state, RMSpropState)
    return by_name(_rmsprop, grads, state)


def adagrad(grads: Tree, state: AdagradState) -> Tree:
    """Compute Adagrad's move.

    Args:
        grads: h, {name: [*shape]}.
        state: before the step.

    Example:
        >>> adagrad({"w": torch.tensor([3.0])}, AdagradState(0, {"w": torch.tensor([16.0])}, lr=1.0))
        {'w': tensor([-0.6000])}
    """
    check_state(state, AdagradState)
    return by_name(_adagrad, grads, state)


def lion(grads: Tree, state: LionState) -> Tree:
    """Compute Lion's move.

    Args:
        grads: h, {name: [*shape]}.
        state: before the step.

    Example:
        >>> lion({"w": torch.tensor([-3.0])}, LionState({"w": torch.zeros(1)}, lr=0.5))
        {'w': tensor([0.5000])}
    """
    check_state(state, LionState)
    return by_name(_lion, grads, state)


def _sgd(h: Tensor, past: Any) -> Tensor:
    if not past.momentum:
        return -past.lr * h
    b = h if past.momentum_buffer is None else past.momentum * past.momentum_buffer + (1 - past.dampening) * h
    return -past.lr * (h + past.momentum * b if past.nesterov else b)


def _rmsprop(h: Tensor, past: Any) -> Tensor:
    s = past.alpha * past.square_avg + (1 - past.alpha) * h * h
    if past.centered:
        mean = (1 - past.alpha) * h if past.grad_avg is None else torch.lerp(past.grad_avg, h, 1 - past.alpha)
        s = s - mean * mean
    move = h / (root(s) + past.eps)
    if past.momentum and past.momentum_buffer is not None:
        move = past.momentum * past.momentum_buffer + move
    return -past.lr * move


def _adagrad(h: Tensor, past: Any) -> Tensor:
    return -past.lr / (1 + past.step * past.lr_decay) * h / (root(past.sum + h * h) + past.eps)


def _lion(h: Tensor, past: Any) -> Tensor:
    x = past.beta1 * past.exp_avg + (1 - past.beta1) * h
    return -past.lr * (x / (x * x + past.width**2).sqrt() if past.width else x.sign())
