"""What the last step leaves behind, as JSON that people and the explaining side read: samples and numbers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fkernel.demo.sampling import Sample
from fkernel.demo.task import Problem


@dataclass(frozen=True)
class Record:
    """A sample and its place in the loss.

    Attributes:
        sample: the sample.
        advantage: A_u, reward minus the mean of its group.
        weight: w_u of the loss −Σ w_u A_u S_u.
    """

    sample: Sample
    advantage: float
    weight: float


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file; NaN and infinity are errors, since JSON has no such numbers."""
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Write records, one flat object each, in their order."""
    write_json(path, [_to_json(record) for record in records])


def read_records(path: Path) -> list[Record]:
    """Read what `write_records` wrote."""
    return [_from_json(item) for item in read_json(path)]


def _to_json(record: Record) -> dict[str, Any]:
    s = record.sample
    return {
        "id": s.id,
        "group": s.group,
        "problem_id": s.problem.id,
        "prompt": s.problem.prompt,
        "answer": s.problem.answer,
        "response": s.text,
        "prompt_ids": list(s.prompt_ids),
        "response_ids": list(s.response_ids),
        "truncated": s.truncated,
        "reward": s.reward,
        "advantage": record.advantage,
        "weight": record.weight,
    }


def _from_json(item: dict[str, Any]) -> Record:
    sample = Sample(
        id=item["id"],
        group=item["group"],
        problem=Problem(item["problem_id"], item["prompt"], item["answer"]),
        prompt_ids=tuple(item["prompt_ids"]),
        response_ids=tuple(item["response_ids"]),
        text=item["response"],
        truncated=item["truncated"],
        reward=item["reward"],
    )
    return Record(sample, item["advantage"], item["weight"])
