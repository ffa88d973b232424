"""Values that plans may hold: what is no number, no text or no name is refused before anything is computed.

YAML makes yes and no booleans, which Python counts as 1 and 0; .inf is a number to pydantic. Both would pass.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

LARGEST = 2**63
"""Whole numbers are below it, as torch's are."""
NAME = r"[\w-][\w.-]*"
LONGEST = 120
"""Bytes of a name, of which files are named."""
MANY = 1_000_000
"""Sequences that one batch may have."""


class Strict(BaseModel):
    """Frozen; unknown keys are errors, and so are values that are no numbers or no texts."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _values(cls, data: Any) -> Any:
        for name, value in data.items() if isinstance(data, dict) else ():
            if name in cls.model_fields:
                check_values(name, value, _takes_booleans([*_kinds(cls.model_fields[name].annotation)]))
        return data


def check_values(place: str, value: Any, booleans: bool) -> None:
    """Check the numbers and texts in a value.

    Args:
        place: where the value stands, for messages.
        value: as a file has it; what is no list, dictionary, number or text is left to others.
        booleans: whether there may be true and false.

    Raises:
        ValueError: a number that is not finite or has more than 64 bits, a text that no file can hold, or a boolean in
            place of a number.

    Example:
        >>> check_values("steps", [1, True], booleans=False)
        Traceback (most recent call last):
        ValueError: steps.1 is true; expected a number or a text, and texts such as yes and no stand in quotes
    """
    match value:
        case bool():
            if not booleans:
                given = str(value).lower()
                raise ValueError(
                    f"{place} is {given}; expected a number or a text, and texts such as yes and no stand in quotes"
                )
        case float():
            if not math.isfinite(value):
                raise ValueError(f"{place} is {value}; expected a finite number")
        case int():
            if abs(value) >= LARGEST:
                raise ValueError(f"{place} is a number of {value.bit_length()} bits; expected one below 2⁶³")
        case str():
            if any("\ud800" <= letter <= "\udfff" for letter in value):
                raise ValueError(f"{place} has half of a surrogate pair (\\ud800 to \\udfff), which is no text")
        case list() | tuple():
            for number, each in enumerate(value):
                check_values(f"{place}.{number}", each, booleans)
        case dict():
            for key, each in value.items():
                check_values(f"a key of {place}", key, True)
                check_values(f"{place}.{key}", each, booleans)


def _takes_booleans(kinds: list[Any]) -> bool:
    """Whether a field may hold a boolean; what is in a model's fields, the model looks after."""
    models = any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds)
    return bool in kinds or Any in kinds or (models and int not in kinds)


def _name(name: str) -> str:
    if not re.fullmatch(NAME, name):
        raise ValueError("expected a name of letters, digits, _ and -, with dots only after the first of them")
    if len(name.encode()) > LONGEST:
        raise ValueError(f"expected a name of at most {LONGEST} bytes, since files are named so")
    return name


def _path(path: str) -> str:
    long = any(len(part.encode()) > 255 for part in path.split("/"))  # no file system takes it
    if not path.strip() or "\0" in path or long:
        raise ValueError("expected the path of a file or a directory")
    return path


Name = Annotated[str, Field(json_schema_extra={"pattern": f"^{NAME}$"}), AfterValidator(_name)]
"""What requests, analyses and sequences written by hand may be called."""
Place = Annotated[str, AfterValidator(_path)]
"""A path."""


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types in an annotation."""
    yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _kinds(part)
