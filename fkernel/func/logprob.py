"""log π of a response, its tokens, and the entropies of the distributions they were drawn from.

With logits z[i] at position i, which predict token i+1, and the temperature τ,

    log π(x_t | x_<t) = z[t−1, x_t]/τ − logsumexp_v z[t−1, v]/τ
    S(x; θ)           = Σ_{t: response_mask[t]} log π(x_t | x_<t)
    H_t               = −Σ_v p_v log p_v,   p = softmax(z[t−1]/τ)

The log-softmax is taken at the temperature at which the response was sampled, over the whole vocabulary. The EOS that
ended a response is one of its tokens; padding is excluded. Position 0 has no prediction and holds 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from einops import rearrange

from fkernel.boundary import public
from fkernel.errors import ModelError
from fkernel.func.inputs.batch import Sequences, check_tokens
from fkernel.func.inputs.objective import Function, Objective, TokenWeights, bare
from fkernel.func.trust.checks import certify_values
from fkernel.shapes import Float, Tensor, Tree

LogitsFn = Callable[[Tree, Tensor, Tensor], Tensor]
"""(params, input_ids [n t], attention_mask [n t]) -> logits [n t v], such as `make_functional` returns."""


@public
def sequence_logprob(apply: LogitsFn, temperature: float = 1.0) -> Objective:
    """Return S: the log-probability of each response, in nats.

    S(x; θ) = Σ_{t in response} log π_θ(x_t | x_<t)

    Args:
        apply: (params, input_ids, attention_mask) -> logits [n t v], as `make_functional` returns it.
        temperature: τ > 0, the sampling temperature that the logits are divided by.

    Returns:
        (params, Sequences[n t]) -> [n], nats.

    Raises:
        ModelError: the temperature is not a positive number.
        BatchError: (when called) a sequence cannot be scored.
        NonFiniteError: (when called) a log-probability is NaN or infinite; it names the sequence.

    Example:
        >>> uniform = lambda params, ids, mask: params["w"] * torch.zeros(*ids.shape, 4)
        >>> from fkernel.func import pad
        >>> logprob = sequence_logprob(uniform)
        >>> logprob({"w": torch.ones(())}, pad([[0]], [[1, 2]]))  # two tokens, log ¼ each
        tensor([-2.7726])
    """
    objective = _objective(apply, temperature, _sequence, "log π")
    return replace(objective, tokens=TokenWeights(temperature, _ones))


def _ones(batch: Sequences) -> tuple[Sequences, Tensor, None]:
    """ω of S, [n t]: 1 on the response; and no entropies."""
    return batch, batch.response_mask, None


def summed_in_float64(f: Function) -> Function:
    """Return f with its sum over tokens in float64; f itself, without checks, where it is no such sum.

    Rounding a response's sum of thousands of nats to float32 loses more than a step changes; rounding each token's few
    nats does not. So differences between S of two θ are differences of sums in float64.

    Example:
        >>> from fkernel.func import pad
        >>> uniform = lambda params, ids, mask: params["w"] * torch.zeros(*ids.shape, 4)
        >>> summed_in_float64(sequence_logprob(uniform))({"w": torch.ones(())}, pad([[0]], [[1, 2]])).dtype
        torch.float64
    """
    if not isinstance(f, Objective) or f.tokens is None:
        return bare(f)
    weights, apply = f.tokens, f.apply

    def total(params: Tree, batch: Any) -> Float[Tensor, " n"]:
        sequences, omega, eta = weights.of(batch)
        log_p, H = token_statistics(apply, weights.temperature, params, sequences, eta is not None)
        each = omega.double() * log_p.double()
        if eta is not None and H is not None:
            each = each + eta.double() * H.double()
        return torch.where(sequences.response_mask.bool(), each, 0.0).sum(1)

    return total


@public
def token_logprobs(apply: LogitsFn, temperature: float = 1.0) -> Objective:
    """Return log π(x_t | x_<t) for every token.

    Arguments and errors as in `sequence_logprob`, which is its sum over t.

    Returns:
        (params, Sequences[n t]) -> [n t], nats, 0 outside of the response.

    Example:
        >>> from fkernel.func import pad
        >>> uniform = lambda params, ids, mask: params["w"] * torch.zeros(*ids.shape, 4)
        >>> token_logprobs(uniform)({"w": torch.ones(())}, pad([[0]], [[1, 2]]))  # log ¼ each
        tensor([[ 0.0000, -1.3863, -1.3863]])
    """
    return _objective(apply, temperature, _tokens, "a token's log π")


@public
def token_entropy(apply: LogitsFn, temperature: float = 1.0) -> Objective:
    """Return H_t, the entropy of the distribution that token t was sampled from.

    H_t = −Σ_v p_v log p_v,  p = softmax(z[t−1]/τ)

    Arguments and errors as in `sequence_logprob`.

    Returns:
        (params, Sequences[n t]) -> [n t], nats, 0 outside of the response.

    Example:
        >>> from fkernel.func import pad
        >>> uniform = lambda params, ids, mask: params["w"] * torch.zeros(*ids.shape, 4)
        >>> token_entropy(uniform)({"w": torch.ones(())}, pad([[0]], [[1, 2]]))  # log 4 each
        tensor([[0.0000, 1.3863, 1.3863]])
    """
    return _objective(apply, temperature, _entropy, "a token's entropy")


def _objective(apply: LogitsFn, temperature: float, statistic: Callable[..., Tensor], name: str) -> Objective:
    if not 0 < temperature < float("inf"):
        raise ModelError(f"temperature is {temperature!r}; expected a positive number (1.0 leaves the logits alone).")
    limits = [getattr(apply, limit, None) for limit in ("vocab_size", "max_length", "padding_idx")]

    def check(batch: Sequences) -> None:
        check_tokens(batch, *limits)

    return Objective(partial(statistic, apply, temperature), check, name, apply, certify_values)


def _logits(apply: LogitsFn, temperature: float, params: Tree, batch: Sequences) -> Float[Tensor, "n s v"]:
    """Return the logits for positions 1 … t−1, divided by τ, in at least float32."""
    z = apply(params, batch.input_ids, batch.attention_mask)[:, :-1]
    return z.to(torch.promote_types(z.dtype, torch.float32)) / temperature


def _on_response(values: Float[Tensor, "n s"], batch: Sequences) -> Float[Tensor, "n t"]:
    """Zero everything outside of the response, and prepend position 0."""
    masked = torch.where(batch.response_mask[:, 1:].bool(), values, 0.0)
    return torch.nn.functional.pad(masked, (1, 0))


def token_statistics(
    apply: LogitsFn, temperature: float, params: Tree, batch: Sequences, entropies: bool = True
) -> tuple[Float[Tensor, "n t"], Float[Tensor, "n t"] | None]:
    """Compute (log π, H) of every token of one forward pass, unchecked; 0 outside of the response, H None if unwanted.

    Arguments as in `token_logprobs`.
    """
    z = _logits(apply, temperature, params, batch)
    target = rearrange(batch.input_ids[:, 1:], "n s -> n s 1")
    log_p = _on_response(z.gather(-1, target).squeeze(-1) - z.logsumexp(-1), batch)
    return log_p, _entropies(z, batch) if entropies else None


def _tokens(apply: LogitsFn, temperature: float, params: Tree, batch: Sequences) -> Float[Tensor, "n t"]:
    return token_statistics(apply, temperature, params, batch, entropies=False)[0]


def _sequence(apply: LogitsFn, temperature: float, params: Tree, batch: Sequences) -> Float[Tensor, " n"]:
    return _tokens(apply, temperature, params, batch).sum(1)


def _entropy(apply: LogitsFn, temperature: float, params: Tree, batch: Sequences) -> Float[Tensor, "n t"]:
    return _entropies(_logits(apply, temperature, params, batch), batch)


def _entropies(z: Float[Tensor, "n s v"], batch: Sequences) -> Float[Tensor, "n t"]:
    log_p = z.log_softmax(-1)
    # A masked token (log p = −inf) contributes 0 log 0 = 0, with derivative 0.
    finite = torch.where(log_p == -torch.inf, 0.0, log_p)
    return _on_response(-(log_p.exp() * finite).sum(-1), batch)
