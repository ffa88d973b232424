"""How valid things are spoilt: values of JSON trees, lines, bytes."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 10**9, 2**63, -(2**70), 10**400, 0.0, -0.5, 1e-300, 1e300, 1.5),
    *(float("nan"), float("inf"), float("-inf")),
)
TEXTS = (
    *(
        "",
        " ",
        "x",
        "x" * 300,
        "..",
        "../x",
        "/",
        "a/b",
        "\0",
        "\x1b]0;t\x07",
        "\ud800",
        "é",
        "ß" * 200,
        "*",
        "[",
        "[/x]",
    ),
    *("NaN", "null", "1", "-1", "none", "logprob", "math", "grpo", "hub:x/y", "a.b", "os.system", "json.dumps"),
)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": None}, {"x": {}}, [1, "a"])


def junk(draw: random.Random) -> Any:
    """Draw a value that rarely fits."""
    return copy.deepcopy(draw.choice(draw.choice((NUMBERS, TEXTS, OTHERS))))


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Walk through the dictionaries and lists of a tree."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from places(tree[key])


def spoilt(tree: Any, draw: random.Random) -> tuple[str, Any]:
    """Change one thing in a copy of a tree of JSON: a value, a key, an element; returns what, and the copy."""
    tree = copy.deepcopy(tree)
    holder, key = draw.choice([*places(tree)])
    how = draw.choice(("value", "value", "value", "gone", "key", "twice", "deep"))
    old = holder[key]
    if how == "gone":
        del holder[key]
    elif how == "key" and isinstance(holder, dict):
        holder[draw.choice(TEXTS)] = holder.pop(key)
    elif how == "twice" and isinstance(holder, list):
        holder.append(copy.deepcopy(old))
    elif how == "deep":
        holder[key] = [old] if draw.random() < 0.5 else {str(key): old}
    else:
        holder[key] = junk(draw)
    return f"{how} at {key!r}: {str(old)[:40]!r}", tree


def spoilt_bytes(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """Flip a bit, zero or copy a stretch, cut, or add to bytes."""
    changed = bytearray(data)
    how = draw.choice(("flip", "zero", "cut", "add", "copy", "empty"))
    place = draw.randrange(max(1, len(changed)))
    if how == "flip" and changed:
        changed[place] ^= 1 << draw.randrange(8)
    elif how == "zero":
        changed[place : place + 64] = bytes(len(changed[place : place + 64]))
    elif how == "cut":
        del changed[place:]
    elif how == "add":
        changed[place:place] = draw.choice((b"\0", b"{", b"\xff\xfe", b"NaN", b"\n", b"1e999"))
    elif how == "copy":
        changed[place:place] = changed[: draw.randrange(1, 200)]
    else:
        changed.clear()
    return f"{how} at byte {place}", bytes(changed)


def one_file(directory: Path, draw: random.Random) -> Path:
    """Draw a file below a directory."""
    return draw.choice(sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "lock"))
