"""Checks of prompts, tokens and recorded log-probabilities, before anything expensive is computed.

What would make a number wrong raises an error; what may be meant, but a reader should know, gives a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from fkernel.errors import RolloutError, RolloutWarning, listing
from fkernel.rollout.record import SequenceRecord

TOLERANCE = 1e-3
"""Nats by which a token's log-probability may differ between sampling and teacher forcing: float32 stays below 1e-4."""


def check_recorded(
    recorded: Sequence[float], recomputed: Sequence[float], name: str, tolerance: float = TOLERANCE
) -> None:
    """Compare log-probabilities recorded at sampling with those of teacher forcing.

    Raises:
        RolloutError: one differs by more than the tolerance: the model, its temperature, the tokens or their positions
            were not the same.
    """
    if len(recorded) != len(recomputed):
        raise RolloutError(f"{name}: {len(recorded)} log-probabilities were recorded for {len(recomputed)} tokens.")
    off = [abs(a - b) for a, b in zip(recorded, recomputed, strict=True)]
    worst = max(range(len(off)), key=lambda t: off[t] if off[t] == off[t] else float("inf"))
    if not off[worst] <= tolerance:
        raise RolloutError(
            f"{name}: log π of token {worst} was {recorded[worst]:.6g} at sampling and is {recomputed[worst]:.6g} "
            f"now, which differs by more than {tolerance:g} nats. Was it sampled from another checkpoint, at another "
            f"temperature, or from other tokens?"
        )


def check_temperature(sampled: float, scored: float) -> None:
    """Warn where sequences were sampled at one temperature and are scored at another.

    A policy gradient is of the distribution that was sampled from; trainers score at the sampling temperature.
    """
    if sampled != scored:
        warnings.warn(
            f"The sequences were sampled at temperature {sampled:g} and are scored at {scored:g}; trainers score at "
            f"the temperature that they sample at (sequence_logprob(apply, temperature={sampled:g})).",
            RolloutWarning,
            stacklevel=2,
        )


def check_truncated(records: Sequence[SequenceRecord]) -> None:
    """Warn of responses that were cut off at max_new_tokens: their reward is of an unfinished text."""
    cut = [record.sequence_id for record in records if record.truncated]
    if cut:
        warnings.warn(
            f"{len(cut)} of {len(records)} responses were cut off before their end ({', '.join(cut[:3])}, …); more "
            f"max_new_tokens would let them end.",
            RolloutWarning,
            stacklevel=2,
        )


def check_abstained(records: Sequence[SequenceRecord], reward: str) -> None:
    """Warn of responses that a reward function could not judge: it returned None."""
    names = [record.sequence_id for record in records if record.abstained]
    if names:
        warnings.warn(
            f"The reward {reward} returned None for {len(names)} of {len(records)} responses ({listing(names)}). They "
            f"are left out of their group's baseline; their advantage is 0, so that they move nothing.",
            RolloutWarning,
            stacklevel=2,
        )


def encode(tokenizer: Any, text: str, name: str, add_special_tokens: bool = True) -> list[int]:
    """Tokenize a prompt, with the special tokens that the tokenizer puts before one, once.

    Args:
        tokenizer: the policy's.
        text: the whole prompt.
        name: of the prompt, for messages.
        add_special_tokens: False for the text of a chat template, which has them already, or has none.

    Raises:
        RolloutError: there is no token, BOS stands there twice, or an EOS was put behind.
    """
    bos, eos = tokenizer.bos_token, tokenizer.eos_token_id
    # A template that begins with BOS has said so; the tokenizer would put a second one before it.
    adds = add_special_tokens and not (bos and text.startswith(bos))
    ids = list(tokenizer.encode(text, add_special_tokens=adds))
    if not ids:
        raise RolloutError(f"{name}: the prompt {text[:40]!r} has no token; is it empty, or outside of the vocabulary?")
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        raise RolloutError(f"{name}: the prompt begins with two BOS tokens; leave {bos!r} out of the template.")
    _check_read(tokenizer, text, ids, name)
    if ids[-1] == eos and tokenizer.eos_token and not text.endswith(tokenizer.eos_token):
        raise RolloutError(
            f"{name}: the tokenizer put its EOS behind the prompt, so the response would begin after the end; build "
            f"it with add_eos_token=False."
        )
    return ids


def _check_read(tokenizer: Any, text: str, ids: Sequence[int], name: str) -> None:
    """Warn where decoding the tokens does not give the text back: characters outside of the vocabulary are dropped."""
    read, meant = ("".join(part.split()) for part in (tokenizer.decode(list(ids)), text))
    if meant not in read:
        lost = sorted({*meant} - {*read})
        warnings.warn(
            f"{name}: the tokenizer reads the prompt otherwise than it is written"
            f"{f', without {lost[:5]}' if lost else ''}; the policy is asked {read[:60]!r}.",
            RolloutWarning,
            stacklevel=3,
        )


def check_concatenation(
    tokenizer: Any, prompt: str, response: str, ids: Sequence[int], name: str, add_special_tokens: bool = True
) -> None:
    """Warn where prompt + response, tokenized as one text, are other tokens than those that are scored.

    Both are right; they are different sequences. A sampler puts the response's tokens behind the prompt's, so that is
    what is scored.
    """
    bos = tokenizer.bos_token
    adds = add_special_tokens and not (bos and prompt.startswith(bos))
    joint = list(tokenizer.encode(prompt + response, add_special_tokens=adds))
    if joint != [*ids]:
        at = next((i for i, (a, b) in enumerate(zip(joint, ids, strict=False)) if a != b), min(len(joint), len(ids)))
        warnings.warn(
            f"{name}: tokenized as one text, prompt and response are {len(joint)} tokens and differ from the "
            f"{len(ids)} that are scored from token {at} on; the boundary between the two falls inside a token.",
            RolloutWarning,
            stacklevel=2,
        )


def check_room(model: Any, lengths: Sequence[int], room: int, names: Sequence[str]) -> None:
    """Check that prompts, and what may follow them, fit into the model's context.

    Raises:
        RolloutError: one does not; it names the prompt and what would fit.
    """
    config = getattr(model, "config", None)
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if context is None:
        return
    worst = max(range(len(lengths)), key=lambda i: lengths[i])
    if lengths[worst] >= context:
        raise RolloutError(
            f"{names[worst]}: the prompt has {lengths[worst]} tokens, the model's context holds {context} and no "
            f"response would fit behind it; drop or shorten the prompt."
        )
    if lengths[worst] + room > context:
        raise RolloutError(
            f"{names[worst]}: a prompt of {lengths[worst]} tokens and {room} new ones exceed the model's context of "
            f"{context}; at most {context - lengths[worst]} fit (max_new_tokens)."
        )
