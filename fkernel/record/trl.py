"""Recording TRL's GRPO and RLOO trainers: their method that returns log-probabilities and entropies is tapped.

    _get_per_token_logps_and_entropies      log π and H of a micro-batch's completions → tap
    compute_loss                            the micro-batch itself: advantages, log-probabilities of others, the loss
    _generate_and_score_completions         which group and rewards a row has; rows are numbered, and shuffled later

Of several processes each generates and trains on rows of its own; rewards are gathered from all, and a group of
completions may be spread over processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from fkernel.errors import ModelError
from fkernel.io import is_json
from fkernel.shapes import Tensor

LOGPS, GENERATE, REWARDS = (
    "_get_per_token_logps_and_entropies",
    "_generate_and_score_completions",
    "_calculate_rewards",
)
ROWS = "fkernel_rows"
"""Key under which rows are numbered in what the trainer generates."""
OTHERS = {
    "old_per_token_logps": "old_logprobs",
    "ref_per_token_logps": "reference_logprobs",
    "sampling_per_token_logps": "sampling_logprobs",
    "importance_sampling_ratio": "sampling_ratio",
    "tool_mask": "tool_mask",
}
KEPT = 3
"""Generations whose rows are remembered."""


class PolicyGradient:
    """The trainer's methods, with the recorder listening; each method here makes one of the trainer's."""

    methods = (LOGPS, "compute_loss", GENERATE, REWARDS)
    head = "trl"

    def __init__(self, recorder: Any, trainer: Any) -> None:
        self.recorder, self.trainer = recorder, trainer
        self._inputs: Mapping[str, Any] | None = None
        self._rewards: Tensor | None = None
        self._rows, self._generations = dict[int, dict[str, Any]](), 0

    def hidden(self) -> dict[str, bool]:
        """What this kind of trainer refuses, and whether it is there."""
        kernel = bool(getattr(getattr(self.trainer, "args", None), "use_liger_kernel", False))
        return {
            "a liger loss, which computes log-probabilities within the loss (use_liger_kernel=False)": (
                kernel and hasattr(self.trainer, "compute_liger_loss")
            )
        }

    def compute_loss(self, before: Any) -> Any:
        """Remember the micro-batch while its loss is computed."""

        def compute_loss(model: Any, inputs: Any, *rest: Any, **others: Any) -> Any:
            inputs = self._inputs = _with_reference(inputs)
            try:
                loss = before(model, inputs, *rest, **others)
            finally:
                self._inputs = None
            step = self.recorder.opened
            if step is not None and step.taps and torch.is_grad_enabled():
                step.note(loss=(loss[0] if isinstance(loss, tuple) else loss).detach())
            return loss

        return compute_loss

    def get_per_token_logps_and_entropies(self, before: Any) -> Any:
        """Tap log-probabilities that have a gradient."""

        def tapped(model: Any, input_ids: Tensor, attention_mask: Tensor, *rest: Any, **others: Any) -> Any:
            out = before(model, input_ids, attention_mask, *rest, **others)
            logp, entropy = out[0], out[1]
            if self._inputs is None or not logp.requires_grad:
                return out
            if self._inputs.get("pixel_values") is not None:
                raise ModelError(
                    "The micro-batch holds images, which a recording does not keep; only texts are recorded."
                )
            self._correct_reference(self._inputs, logp)
            self.recorder.tap(
                logp,
                input_ids=input_ids,
                attention_mask=attention_mask,
                response_mask=self._inputs["completion_mask"],
                entropy=entropy,
                **self._metadata(self._inputs, logp),
            )
            return out

        return tapped

    def _correct_reference(self, inputs: Mapping[str, Any], logp: Tensor) -> None:
        """Where the penalty is weighed by a ratio, let the reference's gradient tell the ratio's share too."""
        reference, args = inputs.get("ref_per_token_logps"), self.trainer.args
        if reference is None or not reference.requires_grad or not getattr(args, "use_bias_correction_kl", False):
            return
        apart, mask = reference.detach() - logp.detach(), inputs["completion_mask"]
        mask = mask if inputs.get("tool_mask") is None else mask * inputs["tool_mask"]
        whole = getattr(self.trainer, "importance_sampling_level", "token") == "sequence"
        reference.register_hook(lambda grad: with_ratio(grad, apart, mask if whole else None))

    def calculate_rewards(self, before: Any) -> Any:
        """Keep what each reward function said."""

        def calculate_rewards(*rest: Any, **others: Any) -> Any:
            self._rewards = before(*rest, **others)
            return self._rewards

        return calculate_rewards

    def generate_and_score_completions(self, before: Any) -> Any:
        """Number the rows that were generated, and remember group and rewards of each."""

        def generate(inputs: Any, *rest: Any, **others: Any) -> Any:
            self._rewards = None
            output = before(inputs, *rest, **others)
            if self.trainer.model.training and isinstance(output, dict):
                output[ROWS] = self._numbered(inputs, len(output["prompt_ids"])).to(output["prompt_ids"].device)
            return output

        return generate

    def _numbered(self, inputs: Any, n: int) -> Tensor:
        self._generations += 1
        numbers = torch.arange(n) + self._generations * 2**32
        first = int(getattr(self.trainer.accelerator, "process_index", 0)) * n  # of this process, among the rows of all
        oldest = (self._generations - KEPT) * 2**32
        self._rows = {number: row for number, row in self._rows.items() if number >= oldest}
        for i, number in enumerate(numbers.tolist()):
            extra = inputs[i] if len(inputs) == n and isinstance(inputs[i], Mapping) else {}
            facts = {"data": {key: value for key, value in extra.items() if key != "prompt" and is_json(value)}}
            group = f"{self._generations}-{(first + i) // self.trainer.num_generations}"
            self._rows[number] = {"group": group, **self._reward(first + i), **(facts if facts["data"] else {})}
        return numbers

    def _reward(self, i: int) -> dict[str, Any]:
        """What the reward functions said of row i of all processes."""
        names = getattr(self.trainer, "reward_func_names", None)
        if self._rewards is None or names is None or i >= len(self._rewards):
            return {}
        values = [value if math.isfinite(value) else None for value in self._rewards[i].tolist()]
        weights = dict(zip(names, self.trainer.reward_weights.tolist(), strict=True))
        known = [weight * value for weight, value in zip(weights.values(), values, strict=True) if value is not None]
        return {
            "rewards": dict(zip(names, values, strict=True)),
            "reward_weights": weights,
            "reward": sum(known) if known else None,
        }

    def _metadata(self, inputs: Mapping[str, Any], logp: Tensor) -> dict[str, Any]:
        b = len(logp)
        numbers = inputs[ROWS].tolist() if ROWS in inputs else []
        rows = [self._rows.get(number, {}) for number in numbers] or [{} for _ in range(b)]
        given: dict[str, Any] = {
            name: [row.get(name) for row in rows] for name in dict.fromkeys(key for row in rows for key in row)
        }
        if "advantages" in inputs:
            whole = inputs["advantages"].ndim == 1
            given["advantage" if whole else "advantages"] = inputs["advantages"]
        if "old_logps" in inputs:
            given["old_logprob"] = inputs["old_logps"]
        leaves = {name: inputs[key] for key, name in OTHERS.items() if inputs.get(key) is not None}
        return given | {name: leaf for name, leaf in leaves.items() if leaf.shape == logp.shape}


def with_ratio(grad: Tensor, apart: Tensor, mask: Tensor | None) -> Tensor:
    """Minus the whole gradient of a KL penalty that is weighed by a ratio, from its gradient at the reference alone.

    L = n ρ k(d),  k = e^d − d − 1,  d = log π_ref − log π:   −∂L/∂log π = G − n k ∂ρ/∂log π,  G = ∂L/∂log π_ref

    Args:
        grad: [b k] G.
        apart: [b k] d.
        mask: [b k] of the response, where ρ is the sequence's: its log is the mean over it; None for each token's own.

    Example:
        >>> with_ratio(torch.tensor([[2.0]]), torch.tensor([[1.0]]), None).round(decimals=4)
        tensor([[1.1640]])
    """
    slope = apart.expm1()
    own = grad * torch.where(slope == 0, 0.0, (slope - apart) / torch.where(slope == 0, 1.0, slope))  # n ρ k
    if mask is None:
        return grad - own
    kept = mask.to(own)
    return grad - kept * (own * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1.0)


def _with_reference(inputs: Any) -> Any:
    """The micro-batch with the reference's log-probabilities as a leaf: its gradient is that of the KL penalty."""
    reference = inputs.get("ref_per_token_logps") if isinstance(inputs, Mapping) else None
    if reference is None or not torch.is_grad_enabled():
        return inputs
    return {**inputs, "ref_per_token_logps": reference.detach().clone().requires_grad_()}
