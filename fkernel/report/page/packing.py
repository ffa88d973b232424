"""Arrays, sequences and whole pages as JSON that may stand in an HTML file."""

from __future__ import annotations

import base64
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from fkernel.report.blocks import numbers
from fkernel.study import SequenceInfo

T = TypeVar("T", bound=Hashable)

TYPES = {"f": "<f4", "i": "<i4", "d": "<f8"}
"""What an array is packed as: a matrix in float32, a column in the precision that it has, indices in int32."""


def packed(values: np.ndarray | None) -> dict[str, Any] | None:
    """An array as base64 of its bytes, little-endian, with its type and shape; None where there is none.

    Example:
        >>> packed(np.array([1.5], dtype=np.float32))
        {'type': 'f', 'shape': [1], 'bytes': 'AADAPw=='}
    """
    if values is None:
        return None
    kind = "i" if values.dtype.kind in "iub" else "d" if values.dtype == np.float64 and values.ndim == 1 else "f"
    data = np.ascontiguousarray(values, dtype=TYPES[kind]).tobytes()
    return {"type": kind, "shape": [*values.shape], "bytes": base64.b64encode(data).decode("ascii")}


def packed_sequences(rows: Sequence[Mapping[str, Any]], columns: Iterable[str]) -> dict[str, Any]:
    """Sequences by column; a prompt that several share is there once.

    Args:
        rows: of each sequence `id`, `prompt`, `response`, `prompt_id`, and numbers.
        columns: names of the numbers; one that no sequence has is left out.
    """
    prompts, prompt = _places(row["prompt"] for row in rows)
    prompt_ids, prompt_id = _places(row["prompt_id"] for row in rows)
    values = {name: [row.get(name) for row in rows] for name in columns}
    known = {name: column for name, column in values.items() if any(value is not None for value in column)}
    return {
        "ids": [row["id"] for row in rows],
        "responses": [row["response"] for row in rows],
        "prompts": prompts,
        "prompt": prompt,
        "prompt_ids": prompt_ids,
        "prompt_id": prompt_id,
        "numbers": {name: numbers([np.nan if value is None else value for value in v]) for name, v in known.items()},
    }


def info_rows(sequences: Sequence[SequenceInfo]) -> list[dict[str, Any]]:
    """Sequences of a study as `packed_sequences` takes them."""
    return [vars(info) for info in sequences]


def as_json(data: Any) -> str:
    r"""JSON that ends no `<script>` and begins no comment, whatever texts it holds.

    Example:
        >>> as_json("</script>")
        '"\\u003c/script\\u003e"'
    """
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _places(values: Iterable[T]) -> tuple[list[T], list[int]]:
    """(values without repetitions, the place of each)."""
    place = dict[T, int]()
    places = [place.setdefault(value, len(place)) for value in values]
    return [*place], places
