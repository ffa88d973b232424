"""Losses of pairs: a chosen and a rejected response, whose whole log-probabilities are compared."""

from __future__ import annotations

import math
from typing import Any

import torch

from fkernel.errors import BatchError
from fkernel.func.objectives.inputs import LossInputs, check_finite, check_setting, read
from fkernel.func.objectives.terms import LossTerm, term_of
from fkernel.shapes import Tensor


def preference(inputs: LossInputs, pairs: Tensor, beta: float, weights: Tensor | None = None) -> dict[str, LossTerm]:
    """Compute ω of DPO's loss, one constant a sequence.

    m_i = β[(S_ci − S_ref,ci) − (S_ri − S_ref,ri)],  S_u = Σ_t ℓ_ut,  L = −Σ_i w_i log σ(m_i)
    ω_ct = −Σ_i w_i β σ(−m_i) over the pairs whose chosen response is c, +Σ_i … over those whose rejected one it is

    The loss raises m, and says nothing of either response alone. A chosen response falls (likelihood displacement)
    where the kernel ties it more to the rejected ones than to the chosen ones.

    Args:
        inputs: with reference.
        pairs: [k 2] int64, rows of the chosen response and of the rejected one; a response may be in several pairs.
        beta: β > 0; TRL's beta.
        weights: w, [k], ≥ 0; None: 1/k each, the mean over pairs. TRL divides it by the accumulated micro-batches too.

    Returns:
        {"preference": ω [n t]}.

    Raises:
        ModelError: β is not a positive number.
        BatchError: pairs are not [k 2] rows of the batch, or one is of one response; weights are not [k], or negative.
        NonFiniteError: a log-probability of a response token is NaN or infinite.

    Example:
        >>> logprobs, mask = torch.tensor([[0.0, -1.0], [0.0, -2.0]]), torch.tensor([[0, 1], [0, 1]])
        >>> given = LossInputs(logprobs, mask, reference=logprobs)
        >>> preference(given, torch.tensor([[0, 1]]), beta=0.1)["preference"].omega
        tensor([[ 0.0000, -0.0500],
                [ 0.0000,  0.0500]])

    Source: R. Rafailov et al., "Direct preference optimization" (2023), eq. 7; N. Razin et al., "Unintentional
    unalignment" (2024); TRL 1.16's DPOTrainer, loss_type="sigmoid".
    """
    check_setting("beta", beta, 0 < beta < math.inf, "a positive number")
    mask, logprobs, reference = read(inputs, "preference", "logprobs", "reference")
    chosen, rejected = _rows(pairs, len(mask)).to(logprobs.device).T
    w = logprobs.new_full((len(chosen),), 1 / len(chosen)) if weights is None else _weights(weights, len(chosen))
    score = beta * (logprobs - reference).sum(1)
    pull = w.to(score) * beta * torch.sigmoid(score[rejected] - score[chosen])
    each = torch.zeros_like(score).index_add_(0, chosen, -pull).index_add_(0, rejected, pull)
    return {"preference": term_of(mask, each[:, None].expand_as(logprobs))}


def _rows(pairs: Tensor, n: int) -> Tensor:
    given: Any = pairs
    if not isinstance(given, Tensor) or given.ndim != 2 or given.shape[1] != 2 or not len(given):
        shape = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise BatchError(f"pairs is {shape}; expected [k 2], the rows of chosen and rejected responses, k ≥ 1.")
    if given.dtype != torch.int64:
        raise BatchError(f"pairs is {given.dtype}; rows of a batch are int64 (tensor.long()).")
    wrong = ((pairs < 0) | (pairs >= n)).any(1) | (pairs[:, 0] == pairs[:, 1])
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise BatchError(f"pairs[{first}] is {pairs[first].tolist()}; expected two different rows of {n} sequences.")
    return pairs


def _weights(weights: Tensor, k: int) -> Tensor:
    if weights.shape != (k,):
        raise BatchError(f"weights has shape {list(weights.shape)}; there are {k} pairs, so expected [{k}].")
    check_finite(weights[:, None], "weights", "every pair needs a finite weight", of="pair")
    if bool((weights < 0).any()):
        first = int((weights < 0).nonzero()[0])
        raise BatchError(f"weights[{first}] is {float(weights[first]):g}; expected weights ≥ 0.")
    return weights.detach()
