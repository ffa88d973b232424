"""The identity of a store: written once, and compared with the requested one at every later opening."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fkernel.errors import StoreError

SCHEMA = 1
"""Version of a store's layout; a change that an older reader would misread raises it."""
_MOST = 6
_ABSENT = object()


def describe(identity: Mapping[str, Any], groups: Sequence[slice]) -> dict[str, Any]:
    """Build the manifest of a store.

    Args:
        identity: {field: JSON value}, everything that its gradients depend on.
        groups: the rows of each shard, contiguous from 0.

    Raises:
        StoreError: the identity is not JSON, or the groups are not contiguous.

    Example:
        >>> describe({"seed": 0}, [slice(0, 2), slice(2, 3)])
        {'schema': 1, 'identity': {'seed': 0}, 'groups': [[0, 2], [2, 3]]}
    """
    end = 0
    for at, rows in enumerate(groups):
        if rows.start != end or rows.step not in (None, 1) or rows.stop is None or rows.stop <= end:
            raise StoreError(
                f"Group {at} of a store is {rows}; expected slices of rows that follow one another from 0, none empty: "
                f"this one begins at {end}."
            )
        end = rows.stop
    try:
        plain = json.loads(json.dumps(dict(identity), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"A store's identity is written as JSON, and this one cannot be ({error}); give texts, finite numbers, "
            f"lists and dictionaries with texts as keys."
        ) from error
    return {"schema": SCHEMA, "identity": plain, "groups": [[int(rows.start), int(rows.stop)] for rows in groups]}


def differences(stored: Mapping[str, Any], spec: Mapping[str, Any]) -> list[str]:
    """List the differences of two manifests, each with the stored and the requested value.

    Args:
        stored: one manifest.
        spec: the other.

    Example:
        >>> differences({"identity": {"seed": 0, "dtype": "bf16"}}, {"identity": {"seed": 1, "dtype": "bf16"}})
        ['identity.seed: stored 0, asked for 1']
    """
    lines = list(_differences(stored, spec, ""))
    return lines if len(lines) <= _MOST else [*lines[: _MOST - 1], f"and {len(lines) - _MOST + 1} more"]


def _differences(stored: Any, spec: Any, place: str) -> Iterator[str]:
    if isinstance(stored, Mapping) and isinstance(spec, Mapping):
        for key in [*stored, *(key for key in spec if key not in stored)]:
            where = f"{place}.{key}" if place else str(key)
            yield from _differences(stored.get(key, _ABSENT), spec.get(key, _ABSENT), where)
    # As texts, since in Python 1 == 1.0 == True.
    elif (ours := _shown(stored)) != (theirs := _shown(spec)):
        yield f"{place}: stored {_short(ours)}, asked for {_short(theirs)}"


def _shown(value: Any) -> str:
    return "nothing" if value is _ABSENT else json.dumps(value, sort_keys=True)


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]} … ({len(text)} characters)"
