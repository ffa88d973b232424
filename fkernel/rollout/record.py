"""One sequence and everything that is known of it: tokens, texts, per-token statistics, reward, where it came from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fkernel.errors import RolloutError
from fkernel.io import hash_json

Finish = Literal["eos", "stop_string", "length", "given"]
"""Why a response ended: its own end of sequence, a stop string, no more room; or it was written by hand."""


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
    """A prompt, a response, and what is known of them. Per-token fields have one number a response token.

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

    Raises:
        RolloutError: reward, advantage or weight is NaN or infinite.
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

    def __post_init__(self) -> None:
        """Check that what multiplies a gradient is finite."""
        for name in ("reward", "advantage", "weight"):
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise RolloutError(
                    f"{self.sequence_id}: its {name} is {value}; expected a finite number, or None where there is none."
                )

    @property
    def logprob(self) -> float:
        """S = log π(response | prompt), nats."""
        return sum(self.logprobs)

    @property
    def truncated(self) -> bool:
        """Whether it ended for want of room."""
        return self.finish == "length"

    @property
    def content_hash(self) -> str:
        """Name what was said, whatever batch it is in: a hash over the tokens of prompt and response.

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
