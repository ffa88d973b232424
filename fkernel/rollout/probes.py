"""Probes: sequences whose probability one asks about, from a file of prompts and responses or a saved batch.

{"prompt": "3+5=", "response": "88"}                        a line; the prompt is the whole text, as a recording has it
{"name": "eights", "prompt": …, "response": …, "ended": false, "reward": 0.0}
{"prompt_ids": [5, 3], "response_ids": [8, 1]}               tokens, where texts are not enough
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fkernel.errors import RolloutError, listing
from fkernel.func import pad
from fkernel.io import parse_json
from fkernel.rollout.batch import GeneratedBatch
from fkernel.rollout.files import load_batch
from fkernel.rollout.generator import SampleGenerator
from fkernel.rollout.record import CustomSample, Provenance, SequenceRecord
from fkernel.rollout.scoring import score

TEXTS, TOKENS = {"prompt", "response"}, {"prompt_ids", "response_ids"}
KEYS = {"name", "id", "ended", "raw", "reward", "metadata", *TEXTS, *TOKENS}


def probe_name(place: int) -> str:
    """Name a sequence written by hand by its place in a list, from 0.

    Example:
        >>> probe_name(0)
        'probe-1'
    """
    return f"probe-{place + 1}"


def read_probes(path: str | Path, generator: SampleGenerator) -> GeneratedBatch:
    """Read probes.

    Args:
        path: a .jsonl file, one probe a line, or a directory that `save_batch` wrote.
        generator: of the policy; texts go through its tokenizer, and with "raw": false through its template.

    Returns:
        The probes; those without a "name" (or "id") are named probe-1, probe-2, ….

    Raises:
        RolloutError: the file cannot be read, a line is no probe, or two have one id.
    """
    place = Path(path)
    if place.is_dir():
        return load_batch(place)
    try:
        lines = [line for line in place.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RolloutError(f"The probes at {str(place)!r} cannot be read: {error}.") from error
    if not lines:
        raise RolloutError(f"{str(place)!r} holds no probe; expected a line of JSON for each.")
    return probes_of([_parsed(place, i, line) for i, line in enumerate(lines, 1)], generator)


def probes_of(rows: list[dict[str, Any]], generator: SampleGenerator) -> GeneratedBatch:
    """Make probes of rows, as a file's lines hold them.

    Args:
        rows: mappings.
        generator: of the policy.

    Raises:
        RolloutError: as `read_probes`.
    """
    made = [_probe(_checked(row, i), i, generator) for i, row in enumerate(rows)]
    twice = [name for name, times in Counter(each.ids[0] for each in made).items() if times > 1]
    if twice:
        raise RolloutError(f"Two probes have the name {twice[0]!r}; give each one of its own.")
    return GeneratedBatch.merge(made)


def _parsed(place: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise RolloutError(f"Line {number} of {str(place)!r} is no JSON: {error}.") from error
    if not isinstance(row, dict) or not ({*row} >= TEXTS or {*row} >= TOKENS) or {*row} - KEYS:
        given = f"the keys {listing(sorted(row))}" if isinstance(row, dict) else type(row).__name__
        raise RolloutError(
            f"Line {number} of {str(place)!r} has {given}; expected prompt and response, or prompt_ids and "
            f"response_ids, and perhaps {listing(sorted(KEYS - TEXTS - TOKENS))}."
        )
    return row


Token = Annotated[int, Field(ge=0, lt=2**63)]


class _Row(BaseModel):
    """A probe's keys."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: str | None = None
    id: str | int | None = None
    prompt: str = ""
    response: str = ""
    prompt_ids: list[Token] = Field(default_factory=list)
    response_ids: list[Token] = Field(default_factory=list)
    metadata: dict[str, Any] = Field(default_factory=dict)
    raw: bool = True
    ended: bool = True
    reward: float | None = None


def _checked(row: dict[str, Any], i: int) -> dict[str, Any]:
    try:
        json.dumps(row, allow_nan=False, ensure_ascii=False).encode()  # a text of half a pair is none
        given = {key: list(value) if isinstance(value, tuple) else value for key, value in row.items()}
        return _Row.model_validate(given).model_dump(exclude_unset=True)
    except ValidationError as error:
        details = [(".".join(map(str, each["loc"])), each["msg"], each["input"]) for each in error.errors()]
        lines = "; ".join(f"{place}: {text} (it is {str(value)[:60]!r})" for place, text, value in details)
        raise RolloutError(f"The probe number {i + 1} is none: {lines}.") from None
    except (TypeError, ValueError) as error:
        raise RolloutError(f"The probe number {i + 1} cannot be written as JSON: {error}.") from None


def _probe(row: dict[str, Any], i: int, generator: SampleGenerator) -> GeneratedBatch:
    name = str(row.get("name", row.get("id", probe_name(i))))
    if {*row} >= TOKENS:
        record = _of_tokens(row, name, generator)
        return GeneratedBatch((record,), None, None, generator.tokenizer.pad_token_id or 0)
    sample = CustomSample(
        row["prompt"], row["response"], row.get("metadata", {}), row.get("raw", True), row.get("ended", True)
    )
    made = generator.build_custom_sequence(sample, name=name)
    return replace(made, records=(replace(made.records[0], reward=row.get("reward")),))


def _of_tokens(row: dict[str, Any], name: str, generator: SampleGenerator) -> SequenceRecord:
    prompt, response = (tuple(map(int, row[key])) for key in ("prompt_ids", "response_ids"))
    decode = generator.tokenizer.decode
    if not prompt or not response:
        raise RolloutError(f"The probe {name!r} has {len(prompt)} prompt tokens and {len(response)} of a response.")
    where = Provenance(name, "custom", "custom", 0, 0, custom=True)
    (known,) = score(generator.model, pad([prompt], [response]), generator.sampling)
    return SequenceRecord(
        sequence_id=name,
        prompt_ids=prompt,
        response_ids=response,
        prompt=str(decode(list(prompt))),
        response=str(decode(list(response))),
        **known._asdict(),
        finish="given",
        provenance=where,
        reward=row.get("reward"),
        metadata=row.get("metadata", {}),
    )
