"""JSON that others wrote: what is read is what stands there.

Python's parser takes the last of two equal keys, and raises RecursionError at deep nesting. Here both are errors of the
document, a ValueError as everything else that is wrong with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def parse_json(text: str | bytes, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """Parse JSON.

    Args:
        text: the document.
        parse_constant: called with NaN, Infinity and -Infinity, which Python writes and JSON has not; None reads them.

    Raises:
        ValueError: it is no JSON, an object has a key twice, or it is nested too deeply.

    Example:
        >>> parse_json('{"lr": 1, "lr": 2}')
        Traceback (most recent call last):
        ValueError: the key 'lr' is there twice
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=parse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} is there twice")
    return made
