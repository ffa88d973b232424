"""Rows of a trainer's dump as records: sequences named by group, numbers of response tokens, everything checked.

What a loss needs token by token, and a record has no field for, is in its metadata under `PER_TOKEN`, one number for
each response token:

    loss_mask             1 where the loss is about the token; left out where it is about all of them
    advantages            A of each token; left out where all tokens of the loss have one, which is the record's
                          advantage
    weights               by which the loss multiplies the token, beside its normaliser; left out where all are 1
    old_logprobs          log π of the trainer before its first step on these rows, at its temperature
    reference_logprobs    log π of the reference policy

and log-probabilities of the engine that sampled are the record's `logqs`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from fkernel.errors import RolloutError
from fkernel.io import hash_json
from fkernel.rollout import Provenance, SequenceRecord

PER_TOKEN = "per_token"
"""Key of a record's metadata: {name: one number a response token}."""
COUNTED = "counted"
"""Key of a record's metadata: [tokens, sequences] that a mean of means divides it by, where the file says so."""
STEP = "step"
"""Key of a record's metadata: the trainer's number of the step."""


class Options(NamedTuple):
    """What a dump does not say, as far as it is known; `fkernel.record.read` says what each is."""

    tokenizer: Any = None
    vocabulary: int | None = None
    max_new_tokens: int | None = None
    prompts: Sequence[Sequence[int]] | None = None
    reward_weights: Mapping[str, float] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    ranks: int | None = None
    minibatch: int | None = None


class Row(NamedTuple):
    """One sequence of a dump.

    Attributes:
        place: file and line, for messages.
        prompt_ids: tokens of the prompt.
        response_ids: tokens of the response, masked ones too.
        group: what the completions of one prompt share.
        mask: whether the loss is about each response token; None where it is about all.
        advantages: A, one a response token, or one of all; None where there is none.
        weights: by which the loss multiplies each response token, beside its normaliser; None for 1.
        old: log π of the trainer before its first step on these rows.
        sampler: log π of the engine that sampled.
        reference: log π of the reference policy.
        reward: the total.
        rewards: of each reward function, with `reward_weights`.
        reward_weights: of each.
        texts: of prompt and response, where the file has them.
        counted: (tokens, sequences) that a mean over sequences of means over tokens divides this one by, where the file
            says so; None for its own tokens of the loss, and all sequences.
        ended: whether the response ended by itself; None where nothing tells.
        facts: whatever else, JSON.
    """

    place: str
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    group: Hashable
    mask: Sequence[bool] | None = None
    advantages: Sequence[float] | float | None = None
    weights: Sequence[float] | None = None
    old: Sequence[float] | None = None
    sampler: Sequence[float] | None = None
    reference: Sequence[float] | None = None
    reward: float | None = None
    rewards: Mapping[str, float | None] = {}
    reward_weights: Mapping[str, float] = {}
    texts: tuple[str, str] | None = None
    counted: tuple[int, int] | None = None
    ended: bool | None = None
    facts: Mapping[str, Any] = {}


def split(place: str, ids: Sequence[int], mask: Sequence[bool]) -> int:
    """Tell where the response begins in a sequence of prompt and response: at the first token of the loss.

    Args:
        place: of the row, for messages.
        ids: of the whole sequence.
        mask: whether the loss is about each token.

    Returns:
        The number of the prompt's tokens; all but one where the loss is about none.

    Raises:
        RolloutError: the first token is in the loss, or there are fewer than two.

    Example:
        >>> split("a.jsonl, line 1", [5, 6, 7, 8], [False, False, True, False])
        2
    """
    if len(ids) < 2:
        raise RolloutError(f"{place} is a sequence of {len(ids)} tokens; expected a prompt and a response.")
    first = next((i for i, kept in enumerate(mask) if kept), len(ids) - 1)
    if not first:
        raise RolloutError(
            f"{place}: its first token is in the loss, and nothing predicts it; expected a mask that begins behind the "
            f"prompt. Is it shifted by one?"
        )
    return first


def records_of(rows: Sequence[Row], source: str, step: int, options: Options) -> tuple[SequenceRecord, ...]:
    """Make the records of a step: named U-003-05 by group and completion, in the file's order.

    Args:
        rows: of the step.
        source: the trainer's name.
        step: as the trainer numbers it.
        options: tokenizer, for texts that the file has not, and vocabulary.

    Raises:
        RolloutError: a sequence has no prompt or no response, or a token outside of the vocabulary.
    """
    groups, counts, records = dict[Hashable, int](), dict[int, int](), list[SequenceRecord]()
    for row in rows:
        _check_tokens(row, options)
        group = groups.setdefault(row.group, len(groups))
        counts[group] = counts.get(group, -1) + 1
        records.append(_record(row, source, step, group, counts[group], options.tokenizer))
    return tuple(records)


def _check_tokens(row: Row, options: Options) -> None:
    for what, ids in (("prompt", row.prompt_ids), ("response", row.response_ids)):
        if not ids:
            raise RolloutError(f"{row.place} has a {what} of no token.")
    size = options.vocabulary
    if size is None and options.tokenizer is not None:
        size = len(options.tokenizer)
    outside = [] if size is None else [i for i in (*row.prompt_ids, *row.response_ids) if not 0 <= i < size]
    if outside:
        raise RolloutError(
            f"{row.place} has the token {outside[0]}, and the vocabulary has {size}; is it another model's dump?"
        )


def _record(row: Row, source: str, step: int, group: int, completion: int, tokenizer: Any) -> SequenceRecord:
    prompt, response = row.texts or _texts(tokenizer, row)
    place = hash_json([*row.prompt_ids])[:12]
    advantage, per_token = _advantage(row)
    if row.mask is not None and not all(row.mask):
        per_token["loss_mask"] = [int(kept) for kept in row.mask]
    if row.weights is not None and any(weight != 1 for weight in row.weights):
        per_token["weights"] = [*row.weights]
    if row.old is not None:
        per_token["old_logprobs"] = [*row.old]
    if row.reference is not None:
        per_token["reference_logprobs"] = [*row.reference]
    finish = "given" if row.ended is None else "eos" if row.ended else "length"
    return SequenceRecord(
        sequence_id=f"U-{group:03d}-{completion:02d}",
        prompt_ids=tuple(row.prompt_ids),
        response_ids=tuple(row.response_ids),
        prompt=prompt,
        response=response,
        logprobs=(),
        logqs=() if row.sampler is None else tuple(row.sampler),
        entropies=(),
        finish=finish,
        provenance=Provenance(f"prompt-{place}", "train", source, group, completion),
        reward=row.reward,
        advantage=advantage,
        metadata={
            STEP: step,
            "place": row.place,
            **({PER_TOKEN: per_token} if per_token else {}),
            **({COUNTED: [*row.counted]} if row.counted else {}),
            **row.facts,
        },
        abstained=bool(row.rewards) and row.reward is None,
        rewards=dict(row.rewards),
        reward_weights=dict(row.reward_weights),
    )


def _advantage(row: Row) -> tuple[float | None, dict[str, Any]]:
    """One advantage of a sequence, where all tokens of its loss have the same; else one for each token."""
    if row.advantages is None or isinstance(row.advantages, float | int):
        return row.advantages, {}
    mask = row.mask or [True] * len(row.response_ids)
    different = {value for value, kept in zip(row.advantages, mask, strict=True) if kept}
    if len(different) < 2:
        return next(iter(different), 0.0), {}
    return None, {"advantages": [*row.advantages]}


def _texts(tokenizer: Any, row: Row) -> tuple[str, str]:
    if tokenizer is None:
        return "", ""
    response = [*row.response_ids]
    ended = response[-1] == getattr(tokenizer, "eos_token_id", None)
    return str(tokenizer.decode([*row.prompt_ids])), str(tokenizer.decode(response[: len(response) - ended]))
