"""What a loss does to tokens: its gradient at their log-probabilities and entropies, in parts that add up.

A loss L of a language model that sees θ through log-probabilities ℓ_ut and entropies H_ut of tokens has the gradient

    ∇L = Σ_u Σ_t ( ω_ut ∇ℓ_ut + η_ut ∇H_ut ),   ω_ut = ∂L/∂ℓ_ut,   η_ut = ∂L/∂H_ut

whatever it is: ω and η are what autograd hands back at the trainer's two tensors. They are the LOSS's gradient, which
an optimizer goes down: a token of positive ω is lowered by the step, one of negative ω raised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from fkernel.errors import BatchError, ModelError
from fkernel.func.objectives.inputs import check_finite
from fkernel.shapes import Tensor


class LossTerm(NamedTuple):
    """One part of a loss, as its gradient at every token.

    Attributes:
        omega: ω = ∂L/∂ℓ, [n t], 0 outside of the response.
        eta: η = ∂L/∂H, [n t], 0 outside of the response; None where the part does not look at entropies.
    """

    omega: Tensor
    eta: Tensor | None = None


def term_of(mask: Tensor, omega: Tensor) -> LossTerm:
    """A part that looks at log-probabilities alone, 0 outside of the response whatever ω is there."""
    return LossTerm(torch.where(mask, omega, 0.0))


def total(terms: Mapping[str, LossTerm]) -> LossTerm:
    """Add the parts of a loss up.

    ω = Σ_parts ω_part,  η = Σ_parts η_part

    Args:
        terms: {part: its ω, η}, such as {**clipped_ratio(inputs), **kl_penalty(inputs, beta=0.04)}.

    Returns:
        The whole loss's ω and η; η is None where no part has one.

    Raises:
        BatchError: there is no part, or two parts are of different shapes.

    Example:
        >>> total({"advantage": LossTerm(torch.tensor([[0.0, -1.0]])), "kl": LossTerm(torch.tensor([[0.0, 0.25]]))})
        LossTerm(omega=tensor([[ 0.0000, -0.7500]]), eta=None)
    """
    if not terms:
        raise BatchError("There is no part to add up; give the parts of a loss, {name: LossTerm}.")
    shapes = {tuple(leaf.shape): name for name, term in terms.items() for leaf in term if leaf is not None}
    if len(shapes) > 1:
        given = ", ".join(f"{name!r} has {list(shape)}" for shape, name in shapes.items())
        raise BatchError(f"Parts of one loss have one shape [n t]; {given}.")
    etas = [term.eta for term in terms.values() if term.eta is not None]
    omega = torch.stack([term.omega for term in terms.values()]).sum(0)
    return LossTerm(omega, torch.stack(etas).sum(0) if etas else None)


def from_autograd(loss: Callable[..., Tensor], logprobs: Tensor, entropies: Tensor | None = None) -> LossTerm:
    """Ask autograd for ω and η of any loss.

    ω = ∂ loss(ℓ, H)/∂ℓ,  η = ∂ loss(ℓ, H)/∂H

    For losses that have no function here, and the reference for those that have one.

    Args:
        loss: loss(logprobs), or loss(logprobs, entropies) where these are given, -> a scalar. What it holds constant
            it must detach itself, as it did in training, and what is no response token it must leave out.
        logprobs: ℓ, [n t] nats, of the policy at θ.
        entropies: H, [n t] nats.

    Returns:
        ω, and η where entropies are given, 0 for what the loss does not look at.

    Raises:
        ModelError: the loss is not one number, or depends on none of its arguments.
        NonFiniteError: ω or η is NaN or infinite.

    Example:
        >>> advantages, mask = torch.tensor([[2.0]]), torch.tensor([[0, 1, 1]])
        >>> from_autograd(lambda l: -(l * advantages * mask).mean(), torch.zeros(1, 3)).omega
        tensor([[-0.0000, -0.6667, -0.6667]])
    """
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (logprobs, entropies) if leaf is not None]
    with torch.enable_grad():
        value = loss(*leaves)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        given = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ModelError(
            f"The loss returned {given}; expected one number that depends on its arguments, by operations that "
            f"autograd follows (no .detach(), .item() or numpy on the way)."
        )
    grads = torch.autograd.grad(value, leaves, torch.ones_like(value), allow_unused=True, materialize_grads=True)
    for name, grad in zip(("∂loss/∂logprobs", "∂loss/∂entropies"), grads, strict=False):
        check_finite(grad, name, "look for log, exp or a division by 0 in the loss, masked tokens included")
    return LossTerm(*grads)
