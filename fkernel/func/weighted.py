"""A loss as a column of the kernel: token log-probabilities and entropies, weighted by constants.

A loss sees θ through ℓ_ut = log π_θ(u_t | u_<t) of its sequences, and perhaps their entropies H_ut, alone. So it has,
at θ, the gradient of a weighted sum of them:

    ∇L = Σ_u Σ_t ω_ut ∇ℓ_ut + η_ut ∇H_ut,   ω_ut = ∂L/∂ℓ_ut,  η_ut = ∂L/∂H_ut, held constant
    f_u(θ) = Σ_t ω_ut ℓ_ut + η_ut H_ut,      ∇L = Σ_u ∇f_u

and column u of the kernel is f_u: −⟨∇S_e, P ∇f_u⟩ is what sequence u's share of the loss does to sequence e. Losses and
their ω are in `fkernel.func.objectives`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fkernel import tree
from fkernel.boundary import public
from fkernel.errors import BatchError, NonFiniteError
from fkernel.func.inputs.batch import Sequences
from fkernel.func.inputs.objective import Objective, TokenWeights
from fkernel.func.logprob import LogitsFn, token_logprobs, token_statistics
from fkernel.shapes import Tensor, Tree


class Weighted(NamedTuple):
    """Sequences with constants for every token.

    Attributes:
        sequences: n sequences of t tokens.
        token_weights: ω, [n t], laid out as `token_logprobs` is; what is outside of the response counts nothing.
        entropy_weights: η, [n t], laid out alike; None where no entropy has a weight.
    """

    sequences: Sequences
    token_weights: Tensor
    entropy_weights: Tensor | None = None


@public
def weighted_logprob(apply: LogitsFn, temperature: float = 1.0) -> Objective:
    """Make a loss's column: the weighted sum of a response's token log-probabilities and entropies.

    f(u; θ) = Σ_{t in response} ω_ut log π_θ(u_t | u_<t) + η_ut H_ut,   H_ut the entropy that u_t was drawn with

    Both sides of a kernel take this f: `Weighted(E, E.response_mask)` is S.

    Args:
        apply: (params, input_ids, attention_mask) -> logits [n t v], as `make_functional` returns it.
        temperature: τ > 0, the sampling temperature that the logits are divided by.

    Returns:
        (params, Weighted of n) -> [n], nats times the unit of ω; ω and η have no derivative. A plain tuple
        (Sequences, ω, η or None) does as well.

    Raises:
        ModelError: the temperature is not a positive number.
        BatchError: (when called) the batch is not `Weighted`, ω or η is not [n t], or a sequence cannot be scored.
        NonFiniteError: (when called) ω, η or a log-probability is NaN or infinite; it names the sequence.

    Example:
        >>> from fkernel.func import pad
        >>> uniform = lambda params, ids, mask: params["w"] * torch.zeros(*ids.shape, 4)
        >>> batch = Weighted(pad([[0]], [[1, 2]]), torch.tensor([[0.0, 1.0, -0.5]]))
        >>> weighted_logprob(uniform)({"w": torch.ones(())}, batch)  # (1 − ½) log ¼
        tensor([-0.6931])
    """
    scored = token_logprobs(apply, temperature)

    def weights(batch: Any) -> tuple[Sequences, Tensor, Tensor | None]:
        sequences, omega, eta = Weighted(*batch)
        t = sequences.input_ids.shape[1]  # the engine cuts shared padding off, and the weights go with it
        return sequences, omega[:, :t].detach(), None if eta is None else eta[:, :t].detach()

    def weighted(params: Tree, batch: Any) -> Tensor:
        sequences, omega, eta = weights(batch)
        log_p, H = token_statistics(apply, temperature, params, sequences, eta is not None)
        total = (omega.to(log_p) * log_p).sum(1)
        return total if eta is None or H is None else total + (eta.to(H) * H).sum(1)

    def check(batch: Any) -> None:
        if not isinstance(batch, tuple) or len(batch) not in (2, 3) or not isinstance(batch[0], Sequences):
            raise BatchError(
                f"weighted_logprob was given {type(batch).__name__}; expected Weighted(sequences, token_weights), such "
                f"as Weighted(batch, batch.response_mask), which makes it sequence_logprob."
            )
        sequences, omega, eta = Weighted(*batch)
        expected = sequences.input_ids.shape
        for name, given in (("token_weights", omega), ("entropy_weights", eta)):
            if given is None:
                continue
            if given.shape != expected:
                raise BatchError(
                    f"{name} has shape {list(given.shape)} for sequences of {list(expected)}; expected one weight a "
                    f"token."
                )
            _check_finite(given, name)
        scored.check(sequences)

    return Objective(weighted, check, "the weighted log π", apply, tokens=TokenWeights(temperature, weights))


def _check_finite(values: Tensor, name: str) -> None:
    """Raise NonFiniteError naming the first row that holds a NaN or an infinity."""
    if not tree.all_finite(values):
        row = int((~torch.isfinite(values)).reshape(len(values), -1).any(1).nonzero()[0])
        raise NonFiniteError(
            f"{name} of sequence {{row}} is not finite; every token needs a finite weight, 0 where it has none.",
            row=row,
        )
