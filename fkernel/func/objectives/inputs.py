"""What a loss of a policy is computed from, token by token, and what it must satisfy.

Every field is laid out as `fkernel.func.token_logprobs` returns its values: [n t], over prompt and response. Only
response tokens count: outside of `response_mask` anything may stand, NaN too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fkernel.errors import BatchError, ModelError, NonFiniteError
from fkernel.shapes import Tensor


class LossInputs(NamedTuple):
    """Numbers of n sequences of t tokens that losses are functions of; each loss says which of them it needs.

    Attributes:
        logprobs: ℓ, [n t] nats, of the policy at θ, at the temperature at which the trainer scores.
        response_mask: [n t] bool or 0/1, as `Sequences` has it.
        advantages: A, [n] or [n t].
        weights: w ≥ 0, [n] or [n t]: loss weight of a token without the advantage, what the normaliser makes of it (and
            the accumulation of gradients: `fkernel.rollout.loss_weights`).
        old: ℓ_old, [n t] nats, of the policy before its first step on this batch, as the trainer scored it.
        reference: ℓ_ref, [n t] nats, of the reference policy.
        sampler: [n t] nats, of the inference engine that sampled; NaN where it could not score a token.
        entropies: H, [n t] nats, of the policy at θ (`fkernel.func.token_entropy`).
    """

    logprobs: Tensor
    response_mask: Tensor
    advantages: Tensor | None = None
    weights: Tensor | None = None
    old: Tensor | None = None
    reference: Tensor | None = None
    sampler: Tensor | None = None
    entropies: Tensor | None = None


_ADVICE = {
    "advantages": "give the advantages, [n] or [n t]",
    "weights": "give the loss weight of a token, [n] or [n t], such as fkernel.rollout.loss_weights makes",
    "old": "give log-probabilities [n t] of the policy that sampled; where it was θ itself, old=logprobs",
    "reference": "give log-probabilities [n t] of the reference policy",
    "sampler": "give log-probabilities [n t] of the inference engine that sampled",
    "entropies": "give entropies [n t] of the policy, as token_entropy returns them",
}
_BY_SEQUENCE = ("advantages", "weights")
SAME_TOKENS = "are both of the same tokens, at the same temperature?"


def read(inputs: LossInputs, loss: str, *names: str) -> list[Tensor]:
    """Check the fields that a loss uses, and lay them out in one way.

    Args:
        inputs: what the user gave.
        loss: the public function's name, for messages.
        names: of the fields that it needs.

    Returns:
        The mask as bool, and then each field: [n t], without a graph, of the dtype and device of `logprobs`, 0 outside
        of the response.

    Raises:
        BatchError: a field is None, or of a wrong shape; the mask is not of zeros and ones; a weight is negative.
        NonFiniteError: NaN or infinity on a response token.

    Example:
        >>> given = LossInputs(torch.tensor([[9.0, -1.0]]), torch.tensor([[0, 1]]), advantages=torch.tensor([2.0]))
        >>> read(given, "policy_gradient", "logprobs", "advantages")
        [tensor([[False,  True]]), tensor([[ 0., -1.]]), tensor([[0., 2.]])]
    """
    mask = _mask(inputs)
    return [mask, *(_field(inputs, mask, loss, name) for name in names)]


def check_finite(values: Tensor, name: str, todo: str, of: str = "sequence") -> None:
    """Raise NonFiniteError naming the first row that holds a NaN or an infinity."""
    bad = (~torch.isfinite(values)).flatten(1).any(1).nonzero()
    if len(bad):
        row = int(bad[0])
        raise NonFiniteError(
            f"{name} of {of} {{row}} is not finite ({len(bad)} of {len(values)} {of}s); {todo}.", row=row
        )


def check_setting(name: str, value: float, fits: bool, expected: str) -> None:
    """Raise ModelError unless a setting is in its range."""
    if not fits:
        raise ModelError(f"{name} is {value!r}; expected {expected}.")


def _mask(inputs: LossInputs) -> Tensor:
    mask, logprobs = inputs.response_mask, inputs.logprobs
    if mask.ndim != 2 or logprobs.shape != mask.shape:
        raise BatchError(
            f"logprobs has shape {list(logprobs.shape)}, and response_mask {list(mask.shape)}; expected one shape "
            f"[n t], as token_logprobs and Sequences have it."
        )
    if not logprobs.is_floating_point():
        raise BatchError(f"logprobs is {logprobs.dtype}; expected log-probabilities in a floating-point type.")
    wrong = ((mask != 0) & (mask != 1)).any(1).nonzero()
    if len(wrong):
        raise BatchError(f"response_mask of sequence {int(wrong[0])} holds values other than 0 and 1; masks are 0/1.")
    return mask.to(logprobs.device).bool()


def _field(inputs: LossInputs, mask: Tensor, loss: str, name: str) -> Tensor:
    values: Tensor | None = getattr(inputs, name)
    if values is None:
        raise BatchError(f"{loss} needs {name}, and LossInputs has none; {_ADVICE[name]}.")
    values = values.detach().to(inputs.logprobs)
    if name in _BY_SEQUENCE and values.ndim == 1:
        values = values[:, None].expand(len(values), mask.shape[1])
    if values.shape != mask.shape:
        given, n, t = getattr(inputs, name).shape, *mask.shape
        expected = f"[{n}] or [{n}, {t}]" if name in _BY_SEQUENCE else f"[{n}, {t}]"
        raise BatchError(f"{name} has shape {list(given)}; {loss} expected {expected}, as response_mask has it.")
    values = torch.where(mask, values, 0.0)
    if name == "sampler":
        check_finite(values.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf), name, "only NaN may stand there")
        return values
    check_finite(values, name, f"{loss} needs a finite number for every response token")
    if name == "weights" and bool((values < 0).any()):
        row = int((values < 0).any(1).nonzero()[0])
        raise BatchError(
            f"weights of sequence {row} holds {float(values[row].min()):g}; expected loss weights w ≥ 0: the sign is "
            f"the advantage's."
        )
    return values
