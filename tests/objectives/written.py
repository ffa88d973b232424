"""Losses as their papers write them, one sequence at a time, in plain torch: what ω and η are held against.

Nothing here comes from `fkernel`. A `Row` has the response tokens of one sequence; advantages and weights are of each.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch


class Row(NamedTuple):
    """One sequence's response: ℓ and H carry a graph."""

    l: torch.Tensor
    H: torch.Tensor
    A: torch.Tensor
    w: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor
    m: torch.Tensor


def rows(inputs: Any, l: torch.Tensor, H: torch.Tensor, factor: torch.Tensor | None = None) -> list[Row]:
    """Cut a batch into rows; a factor of 1 where there is none."""
    out = []
    for i, mask in enumerate(inputs.response_mask.bool()):
        spread = [leaf[i] if leaf.ndim == 1 else leaf[i][mask] for leaf in (inputs.advantages, inputs.weights)]
        A, w = (leaf.expand(int(mask.sum())) for leaf in spread)
        m = torch.ones_like(l) if factor is None else factor
        old, reference = inputs.old[i][mask], inputs.reference[i][mask]
        out.append(Row(l[i][mask], H[i][mask], A, w, old, reference, m[i][mask]))
    return out


def ratio(row: Row, level: str) -> torch.Tensor:
    return (row.l - row.old).exp() if level == "token" else (row.l - row.old).mean().exp()


def policy_gradient(row: Row) -> torch.Tensor:
    return -(row.w * row.m * row.A * row.l).sum()


def clipped(row: Row, low: float, high: float, delta: float | None, level: str) -> torch.Tensor:
    r = ratio(row, level)
    capped = r if delta is None else r.clamp(max=delta)
    return -(row.w * row.m * torch.minimum(capped * row.A, r.clamp(1 - low, 1 + high) * row.A)).sum()


def cispo(row: Row, cap: float, level: str) -> torch.Tensor:
    return -(row.w * row.m * ratio(row, level).detach().clamp(max=cap) * row.A * row.l).sum()


def sapo(row: Row, positive: float, negative: float, level: str) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for t, A in enumerate(row.A):
        r = ratio(row, level) if level == "sequence" else ratio(row, level)[t]
        tau = positive if A > 0 else negative
        total = total - row.w[t] * row.m[t] * A * 4 / tau / (1 + torch.exp(-tau * (r - 1)))
    return total


def drift(row: Row, low: float, high: float, kl: float, both: bool) -> torch.Tensor:
    """prime-rl's default_loss_fn, and with `both` its ipo_loss_fn, of one sample."""
    log_ratio = row.l - row.old
    moved = (row.l.exp() - row.old.exp()).detach()
    above, below = moved > high, moved < -low
    invalid = (above | below) if both else torch.where(row.A > 0, above, below)
    return (row.w * (-(~invalid * row.A * log_ratio.exp()) + kl * log_ratio**2)).sum()


def vespo(row: Row, positive: tuple[float, float], negative: tuple[float, float], corrected: bool) -> torch.Tensor:
    W = (row.l - row.old).sum().exp().detach()
    W = W * row.m.clamp(min=1e-8).prod() if corrected else W
    W = W.clamp(1e-8, math.exp(20.0))
    total = torch.zeros((), dtype=torch.float64)
    for t, A in enumerate(row.A):
        k, decay = positive if A >= 0 else negative
        total = total - row.w[t] * W**k * torch.exp(decay * (1 - W)) * A * row.l[t]
    return total


def k3(row: Row) -> torch.Tensor:
    return (row.ref - row.l).exp() - (row.ref - row.l) - 1


def kl(row: Row, beta: float) -> torch.Tensor:
    return beta * (row.w * k3(row)).sum()


def corrected_kl(row: Row, beta: float, level: str) -> torch.Tensor:
    return beta * (row.w * ratio(row, level) * k3(row)).sum()


def entropy_bonus(row: Row, coefficient: float) -> torch.Tensor:
    return -coefficient * (row.w * row.m * row.H).sum()


def cross_entropy(row: Row) -> torch.Tensor:
    return -(row.w * row.l).sum()
