"""TRL's own GRPO loss, asked for its gradient at the log-probabilities and entropies that it is computed from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from fkernel.func.objectives import LossInputs, LossTerm
from fkernel.rollout import loss_weights
from fkernel.shapes import Tree
from tests.checkpoint.writers import VOCABULARY
from tests.rollout.test_weights import LONGEST, padded

_G = torch.Generator().manual_seed(10)


def _drawn(shortest: int, longest: int) -> list[list[int]]:
    """Token ids of 12 texts, three groups of four, neither padding nor EOS among them."""
    sizes = torch.randint(shortest, longest + 1, (12,), generator=_G).tolist()
    return [torch.randint(2, VOCABULARY, (size,), generator=_G).tolist() for size in sizes]


PROMPTS, RESPONSES = _drawn(1, 4), _drawn(2, LONGEST)
A = torch.randn(12, generator=_G)
SHIFTS = 0.25 * torch.randn(12, LONGEST, generator=_G) + 0.1 * torch.randn(12, 1, generator=_G)
"""Nats by which the inference engine is off."""
TOKENS = 130
"""Of the generation batch, which has more than these twelve."""
ACCUMULATION, STEPS_PER_GENERATION = 2, 4
USUAL: dict[str, Any] = {
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "beta": 0.0,
    "epsilon_low": 0.1,
    "epsilon_high": 0.3,
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "_entropy_bonus_enabled": False,
    "use_vllm": False,
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_clip_min": None,
    "vllm_importance_sampling_clip_max": 3.0,
}
USUAL_ARGS: dict[str, Any] = {
    "delta": None,
    "use_bias_correction_kl": True,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
    "steps_per_generation": STEPS_PER_GENERATION,
}
RULES: dict[str, str] = {"sapo": "grpo", "cispo": "dapo", "vespo": "dapo", "luspo": "sequence"}
"""By which rule of `loss_weights` TRL divides a loss that is not one of them."""


class Differentiated(NamedTuple):
    """What TRL's loss was computed from, in float32, its gradient there and at the parameters."""

    inputs: LossInputs
    gradient: LossTerm
    params: Tree
    grads: Tree


def differentiated(trainer: Any, **settings: Any) -> Differentiated:
    """Generate as TRL does, move the policy, call `_compute_loss` and differentiate; then the policy is as it was.

    Args:
        trainer: a GRPOTrainer on the CPU, in float32.
        settings: of USUAL and USUAL_ARGS, tool_mask, and by how many nats the old policy's first token is off.
    """
    tool_mask, off_by = settings.pop("tool_mask", None), settings.pop("off_by", 0.0)
    for name, value in {**USUAL, **USUAL_ARGS, **settings}.items():
        setattr(trainer.args if name in USUAL_ARGS else trainer, name, value)
    trainer.current_gradient_accumulation_steps = ACCUMULATION
    model = trainer.model.train()
    with moved(model, scale=5.0):  # a policy that is not uniform
        batch = generated(trainer)
        batch["old_per_token_logps"][0, 0] -= off_by
        if tool_mask is not None:
            batch["tool_mask"] = tool_mask
        with moved(model, noise=0.03):
            l, H = _gradient_at(trainer, batch)
            params = {name: p.detach().clone() for name, p in model.named_parameters()}
            grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    mask = batch["completion_mask"] if tool_mask is None else batch["completion_mask"] * tool_mask
    loss = str({**USUAL, **settings}["loss_type"])
    inputs = LossInputs(
        logprobs=l.detach(),
        response_mask=mask,
        advantages=A,
        weights=loss_weights(
            mask.sum(1).tolist(),
            RULES.get(loss, loss),
            max_completion_length=LONGEST,
            accumulation=ACCUMULATION,
            tokens=TOKENS,
            steps_per_generation=STEPS_PER_GENERATION,
        ),
        old=batch["old_per_token_logps"],
        reference=batch["ref_per_token_logps"],
        sampler=batch.get("sampling_per_token_logps"),
        entropies=H.detach(),
    )
    at_tokens = LossTerm(*(torch.zeros_like(x) if x.grad is None else x.grad for x in (l, H)))
    return Differentiated(inputs, at_tokens, params, grads)


def generated(trainer: Any) -> dict[str, torch.Tensor]:
    """What TRL makes of responses: with vLLM's log-probabilities where `use_vllm` is set, one of them missing.

    Its correction of the sampler's mismatch stands in the middle of the function that samples, so that one is called,
    with responses put in.
    """
    (prompts, prompt_mask), (responses, response_mask) = padded(PROMPTS, True), padded(RESPONSES, False)
    ids, mask = torch.cat([prompts, responses], 1), torch.cat([prompt_mask, response_mask], 1)
    width = responses.shape[1]
    with torch.no_grad():
        l = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)[0]
    sampled: list[list[float | None]] = [
        row[: len(response)] for row, response in zip((l - SHIFTS[:, :width]).tolist(), RESPONSES, strict=True)
    ]
    sampled[0][1] = None
    given = (PROMPTS, RESPONSES, None, ["a"] * len(RESPONSES), sampled if trainer.use_vllm else None, {}, None, None)
    with patch.object(trainer, "_generate", lambda prompts: given), patch.object(trainer, "beta", 0.0):
        batch = trainer._generate_and_score_completions([{"prompt": "1+1="} for _ in RESPONSES])
    reference = l + 0.3 * torch.cos(torch.arange(float(l.numel()))).view_as(l)
    return {**batch, "ref_per_token_logps": reference, "advantages": A, "num_items_in_batch": torch.tensor(TOKENS)}


def _gradient_at(trainer: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """TRL's log-probabilities and entropies, with the loss's gradient in their `grad`."""
    kept: list[torch.Tensor] = []
    score = trainer._get_per_token_logps_and_entropies

    def watched(*given: Any, **options: Any) -> Any:
        l, H, aux = score(*given, **options)
        kept[:] = [l, H]
        l.retain_grad()
        H.retain_grad()
        return l, H, aux

    with patch.object(trainer, "_get_per_token_logps_and_entropies", watched):
        trainer.model.zero_grad()
        trainer._compute_loss(trainer.model, batch).backward()
    return kept[0], kept[1]


@contextmanager
def moved(model: Any, scale: float = 1.0, noise: float = 0.0) -> Iterator[None]:
    """Make another policy of a model, for as long as it is needed."""
    before, g = [p.detach().clone() for p in model.parameters()], torch.Generator().manual_seed(10)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale).add_(noise * p.std() * torch.randn(p.shape, generator=g))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, was in zip(model.parameters(), before, strict=True):
                p.copy_(was)
