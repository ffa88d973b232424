"""Adam's kin: m and v, and what each makes of them; h is the gradient that the rule is given.

    m' = β1 m + (1−β1) h        v' = β2 v + (1−β2) h²        bc1 = 1 − β1^(t+1)        bc2 = 1 − β2^(t+1)

    adamw, adam   Δθ = −lr m'/bc1 / (√(v'/bc2) + ε)                     AMSGrad: the largest v' so far
    nadam         Δθ = −lr ((1−μ)/(1−Π) h + μ₊/(1−Πμ₊) m') / (√(v'/bc2) + ε)
                  μ = β1 (1 − 0.96^((t+1)ψ)/2), μ₊ the next step's, Π the product of all μ so far
    radam         Δθ = −lr m'/bc1 · r √bc2/(√v' + ε)                    −lr m'/bc1 while ρ ≤ 5
                  r² = (ρ−4)(ρ−2)ρ∞ / ((ρ∞−4)(ρ∞−2)ρ),  ρ = ρ∞ − 2(t+1) β2^(t+1)/bc2,  ρ∞ = 2/(1−β2) − 1

Source: torch 2.13's `_single_tensor_adam`, `_single_tensor_nadam`, `_single_tensor_radam`; D. P. Kingma & J. Ba (2015);
S. Reddi et al. (2018) for AMSGrad; T. Dozat (2016) for NAdam; L. Liu et al. (2020) for RAdam.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from fkernel.precond.base import DecayingState, Setting, by_name, root
from fkernel.precond.state import AdamWState, check_state
from fkernel.shapes import Tensor, Tree


@dataclass(frozen=True, eq=False)
class AdamState(DecayingState):
    """`torch.optim.Adam`'s and AdamW's with AMSGrad, climbing, or decay in the gradient; torchao's likewise.

    Attributes:
        step: t, steps taken.
        exp_avg: m.
        exp_avg_sq: v.
        lr: learning rate.
        max_exp_avg_sq: the largest v so far, where `amsgrad` is on.
        beta1: decay of m.
        beta2: decay of v.
        eps: ε.
        amsgrad: whether the largest v' divides.
    """

    MOMENTS: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    OPTIONAL: ClassVar[tuple[str, ...]] = ("max_exp_avg_sq",)
    SQUARES: ClassVar[tuple[str, ...]] = ("exp_avg_sq", "max_exp_avg_sq")

    step: Setting[int]
    exp_avg: Tree
    exp_avg_sq: Tree
    lr: Setting[float]
    max_exp_avg_sq: Tree = field(default_factory=dict)
    beta1: Setting[float] = 0.9
    beta2: Setting[float] = 0.999
    eps: Setting[float] = 1e-8
    amsgrad: Setting[bool] = False


@dataclass(frozen=True, eq=False)
class NAdamState(DecayingState):
    """`torch.optim.NAdam`'s.

    Attributes:
        step: t, steps taken.
        mu_product: Π of the steps taken; 1 before the first.
        exp_avg: m.
        exp_avg_sq: v.
        lr: learning rate.
        beta1: decay of m.
        beta2: decay of v.
        eps: ε.
        momentum_decay: ψ.
    """

    MOMENTS: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    SQUARES: ClassVar[tuple[str, ...]] = ("exp_avg_sq",)

    step: Setting[int]
    mu_product: Setting[float]
    exp_avg: Tree
    exp_avg_sq: Tree
    lr: Setting[float] = 2e-3
    beta1: Setting[float] = 0.9
    beta2: Setting[float] = 0.999
    eps: Setting[float] = 1e-8
    momentum_decay: Setting[float] = 4e-3


@dataclass(frozen=True, eq=False)
class RAdamState(DecayingState):
    """`torch.optim.RAdam`'s.

    Attributes:
        step: t, steps taken.
        exp_avg: m.
        exp_avg_sq: v.
        lr: learning rate.
        beta1: decay of m.
        beta2: decay of v.
        eps: ε.
    """

    MOMENTS: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    SQUARES: ClassVar[tuple[str, ...]] = ("exp_avg_sq",)

    step: Setting[int]
    exp_avg: Tree
    exp_avg_sq: Tree
    lr: Setting[float] = 1e-3
    beta1: Setting[float] = 0.9
    beta2: Setting[float] = 0.999
    eps: Setting[float] = 1e-8


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
    return by_name(_adam, grads, state)


def adam(grads: Tree, state: AdamState) -> Tree:
    """Compute Adam's or AMSGrad's move.

    Args:
        grads: h, {name: [*shape]}.
        state: before the step.

    Example:
        >>> state = AdamState(0, {"w": torch.zeros(1)}, {"w": torch.zeros(1)}, lr=0.5, amsgrad=True)
        >>> adam({"w": torch.tensor([4.0])}, state)
        {'w': tensor([-0.5000])}
    """
    check_state(state, AdamState)
    return by_name(_adam, grads, state)


def nadam(grads: Tree, state: NAdamState) -> Tree:
    """Compute NAdam's move.

    Args:
        grads: h, {name: [*shape]}.
        state: before the step.

    Example:
        >>> state = NAdamState(0, 1.0, {"w": torch.zeros(1)}, {"w": torch.zeros(1)}, lr=0.5)
        >>> nadam({"w": torch.tensor([4.0])}, state)
        {'w': tensor([-0.5282])}
    """
    check_state(state, NAdamState)
    return by_name(_nadam, grads, state)


def radam(grads: Tree, state: RAdamState) -> Tree:
    """Compute RAdam's move.

    Args:
        grads: h, {name: [*shape]}.
        state: before the step.

    Example:
        >>> state = RAdamState(0, {"w": torch.zeros(1)}, {"w": torch.zeros(1)}, lr=0.5)
        >>> radam({"w": torch.tensor([4.0])}, state)  # not rectified yet
        {'w': tensor([-2.])}
    """
    check_state(state, RAdamState)
    return by_name(_radam, grads, state)


def _moments(h: Tensor, past: Any) -> tuple[int, Tensor, Tensor]:
    """t+1, m' and v'."""
    m = past.beta1 * past.exp_avg + (1 - past.beta1) * h
    v = past.beta2 * past.exp_avg_sq + (1 - past.beta2) * h * h
    return past.step + 1, m, v


def _adam(h: Tensor, past: Any) -> Tensor:
    t, m, v = _moments(h, past)
    if getattr(past, "amsgrad", False) and past.max_exp_avg_sq is not None:
        v = torch.maximum(v, past.max_exp_avg_sq)
    return -past.lr * m / (1 - past.beta1**t) / (root(v / (1 - past.beta2**t)) + past.eps)


def _nadam(h: Tensor, past: Any) -> Tensor:
    t, m, v = _moments(h, past)
    now, then = (past.beta1 * (1 - 0.5 * 0.96 ** (k * past.momentum_decay)) for k in (t, t + 1))
    product = past.mu_product * now
    ahead = (1 - now) / (1 - product) * h + then / (1 - product * then) * m
    return -past.lr * ahead / (root(v / (1 - past.beta2**t)) + past.eps)


def _radam(h: Tensor, past: Any) -> Tensor:
    t, m, v = _moments(h, past)
    bc2 = 1 - past.beta2**t
    longest = 2 / (1 - past.beta2) - 1
    rho = longest - 2 * t * past.beta2**t / bc2
    move = -past.lr * m / (1 - past.beta1**t)
    if rho <= 5:
        return move
    rectified = ((rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho)) ** 0.5
    return move * rectified * bc2**0.5 / (root(v) + past.eps)
