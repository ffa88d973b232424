"""SequenceRecord: one sequence with its tokens, texts, per-token statistics, rewards, token weights and provenance.

Token weights describe what a loss L did with the sequence, token by token, whatever the loss was:

    ω_ut = ∂L/∂log π(u_t),   η_ut = ∂L/∂H(u_t),   ∇L = Σ_u Σ_t ω_ut ∇log π(u_t) + η_ut ∇H(u_t)

in named parts (advantage, kl, entropy, ratio, reward:format, …) whose sum is the loss's ω.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fkernel.errors import RolloutError, listing
from fkernel.io import hash_json

Finish = Literal["eos", "stop_string", "length", "given"]
"""Why a response ended: its own end of sequence, a stop string, no more room; or it was written by hand."""
TOKEN_WEIGHTS = ("token_weights", "entropy_weights")
"""Fields of a record that hold one number a response token for each part of a loss."""


@dataclass(frozen=True)
class Provenance:
    """Where a sequence came from.

    Attributes:
        global_prompt_id: the prompt's place in its source; stable across batches, filters and machines.
        split: of the source.
        source: the prompt source's name, "custom" for hand-written prompts.
        group: which draw of a prompt in its batch; completions of one draw share it, and their advantages are relative.
        completion: which completion of the draw.
        custom: whether the prompt or the response was written by hand.
        seed: the batch's; None where nothing was drawn.
    """

    global_prompt_id: str
    split: str
    source: str
    group: int
    completion: int
    custom: bool = False
    seed: int | None = None


@dataclass(frozen=True)
class SequenceRecord:
    """A prompt, a response, and their statistics. Per-token fields have one number a response token.

    Attributes:
        sequence_id: display id, such as U-000-01: batch, draw, completion. It is never renumbered.
        prompt_ids: tokens of the prompt.
        response_ids: tokens of the response; an EOS that ended it belongs to it, and nothing after it.
        prompt: the prompt's text.
        response: the response's text, without the EOS.
        logprobs: log π(token), temperature 1, nothing truncated, nats.
        logqs: log q(token), q the distribution that was sampled from: temperature, top-k and top-p applied.
        entropies: of π (temperature 1, whole vocabulary) where the token was drawn, nats.
        finish: why it ended.
        provenance: where it came from.
        reward: None where none was given, or the reward function returned None.
        advantage: A; None where none was given.
        weight: w, the loss weight: the loss is −Σ w A S; None where none was given.
        metadata: whatever the caller adds; JSON.
        abstained: whether the reward function returned None, as for a response that it cannot judge. Unless a reward
            is set later, advantages of the others are made without it, and its own is 0.
        token_weights: {part: ω of each response token}, ∂L/∂log π by named part; their sum is the loss's. The loss's
            sign: a positive ω lowers its token. Empty where the loss is described by advantage and weight alone.
        entropy_weights: {part: η of each response token}, ∂L/∂H; empty where no entropy was in the loss.
        rewards: {reward function: its value}; None where that function returned None. Empty where only the total is
            known; else reward is Σ reward_weights · rewards.
        reward_weights: {reward function: its weight in the total}; the same names as rewards.

    Raises:
        RolloutError: reward, advantage, weight, a token weight or a value of a reward function is NaN or infinite; a
            part has not one number for each response token; or rewards and reward_weights name different functions.
    """

    sequence_id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    prompt: str
    response: str
    logprobs: tuple[float, ...]
    logqs: tuple[float, ...]
    entropies: tuple[float, ...]
    finish: Finish
    provenance: Provenance
    reward: float | None = None
    advantage: float | None = None
    weight: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    abstained: bool = False
    token_weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    entropy_weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    reward_weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that what multiplies a gradient is finite, and that token weights fit the response."""
        named = {name: getattr(self, name) for name in ("reward", "advantage", "weight")}
        named |= {f"reward {name!r}": value for name, value in self.rewards.items()}
        named |= {f"weight of the reward {name!r}": value for name, value in self.reward_weights.items()}
        for name, value in named.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise RolloutError(
                    f"{self.sequence_id}: its {name} is {value}; expected a finite number, or None where there is none."
                )
        if {*self.rewards} != {*self.reward_weights}:
            raise RolloutError(
                f"{self.sequence_id}: its rewards are of {listing([*self.rewards]) or 'no function'}, and its "
                f"reward_weights of {listing([*self.reward_weights]) or 'none'}; expected one weight for each."
            )
        for kind in TOKEN_WEIGHTS:
            for part, values in getattr(self, kind).items():
                self._check_part(kind, part, values)

    def _check_part(self, kind: str, part: Any, values: tuple[float, ...]) -> None:
        if not isinstance(part, str) or not part:
            raise RolloutError(f"{self.sequence_id}: {kind} has a part named {part!r}; expected a text.")
        if len(values) != len(self.response_ids):
            raise RolloutError(
                f"{self.sequence_id}: {kind}[{part!r}] has {len(values)} numbers for a response of "
                f"{len(self.response_ids)} tokens; expected one for each, the EOS included."
            )
        wrong = next((t for t, value in enumerate(values) if not math.isfinite(value)), None)
        if wrong is not None:
            raise RolloutError(
                f"{self.sequence_id}: {kind}[{part!r}] of response token {wrong} is {values[wrong]}; expected a finite "
                f"number, 0 for a token that this part of the loss leaves out."
            )

    @property
    def logprob(self) -> float:
        """S = log π(response | prompt), nats."""
        return sum(self.logprobs)

    @property
    def truncated(self) -> bool:
        """Whether it was cut off at max_new_tokens."""
        return self.finish == "length"

    @property
    def content_hash(self) -> str:
        """A hash over the tokens of prompt and response, the same in every batch.

        Example:
            >>> given = Provenance("custom-0", "custom", "custom", 0, 0)
            >>> one = SequenceRecord("U-000-00", (1,), (2,), "a", "b", (-1.0,), (-1.0,), (0.5,), "eos", given)
            >>> two = SequenceRecord("E-003-00", (1,), (2,), "a", "b", (-2.0,), (-2.0,), (0.1,), "eos", given)
            >>> one.content_hash == two.content_hash
            True
        """
        return hash_json([self.prompt_ids, self.response_ids])[:16]


@dataclass(frozen=True)
class CustomSample:
    """A sequence that is written by hand: a prompt and the response whose probability is in question.

    Attributes:
        prompt: the question, put into the template; or the whole text that the policy reads, with `raw`.
        response: what is to be scored, token by token.
        metadata: whatever the caller adds; JSON.
        raw: whether the prompt is the whole text, such as `SequenceRecord.prompt`; it is read as the texts of the
            generator's template are: with a chat template, no special token is added to it.
        ended: whether the response ends with the tokenizer's EOS.
    """

    prompt: str
    response: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    raw: bool = False
    ended: bool = True


def sequence_id(prefix: str, group: int, completion: int) -> str:
    """Make a display id.

    Example:
        >>> sequence_id("U", 0, 1)
        'U-000-01'
    """
    return f"{prefix}-{group:03d}-{completion:02d}"
