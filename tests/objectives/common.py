"""Inputs of losses that are drawn at random, and how far two gradients are apart."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from fkernel.func.objectives import LossInputs, LossTerm

NOWHERE = float("nan")
"""What stands outside of the response: nothing may look at it."""


def random_inputs(seed: int, n: int = 3, longest: int = 5, by_token: bool = False) -> LossInputs:
    """Prompts of 1 to 3 tokens and responses of 1 to `longest`, with every field; advantages of both signs, and a 0."""
    g = torch.Generator().manual_seed(seed)
    t = 3 + longest
    start = torch.randint(1, 4, (n, 1), generator=g)
    end = start + torch.randint(1, longest + 1, (n, 1), generator=g)
    mask = (torch.arange(t) >= start) & (torch.arange(t) < end)

    def near(values: torch.Tensor, scale: float) -> torch.Tensor:
        return values + scale * torch.randn(n, t, generator=g, dtype=torch.float64)

    logprobs = near(torch.full((n, t), -2.0, dtype=torch.float64), 0.5)
    old = near(logprobs, 0.4)
    advantages = torch.randn(n, t, generator=g, dtype=torch.float64)
    advantages[0], advantages[1:2, :] = advantages[0].abs(), -advantages[1:2].abs()
    if n > 2:
        advantages[2:3, ::2] = 0.0
    weights = torch.rand(n, t, generator=g, dtype=torch.float64)

    def laid(values: torch.Tensor) -> torch.Tensor:
        return torch.where(mask, values, NOWHERE)

    sampler = torch.where(torch.rand(n, t, generator=g) < 0.1, NOWHERE, near(old, 0.3))
    return LossInputs(
        logprobs=laid(logprobs),
        response_mask=mask.int() if seed % 2 else mask,
        advantages=laid(advantages) if by_token else advantages[:, 0],
        weights=laid(weights) if by_token else weights[:, 0],
        old=laid(old),
        reference=laid(near(logprobs, 0.6)),
        sampler=laid(sampler),
        entropies=laid(torch.rand(n, t, generator=g, dtype=torch.float64)),
    )


drawn = st.builds(
    random_inputs,
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(2, 5),
    longest=st.integers(1, 6),
    by_token=st.booleans(),
)


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative error by norm; of nothing at all, the norm itself."""
    scale = float(theirs.norm())
    return float((ours - theirs).norm()) / (scale if scale else 1.0)


def apart(ours: LossTerm, theirs: LossTerm) -> float:
    """The greater of the two gaps; None is 0."""
    etas = [torch.zeros_like(ours.omega) if term.eta is None else term.eta for term in (ours, theirs)]
    return max(gap(ours.omega, theirs.omega), gap(*etas))
