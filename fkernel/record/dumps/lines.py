"""Files of JSON lines as trainers write them: one row a line, every line whole, every number finite.

A row that a killed process left half written, a NaN, and a row that is no object are errors that name file and line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fkernel.errors import RolloutError, listing
from fkernel.io import parse_json


class Line(NamedTuple):
    """One row of a dump.

    Attributes:
        place: file and line, for messages.
        values: its fields.
    """

    place: str
    values: dict[str, Any]

    def get(self, name: str) -> Any:
        """A field.

        Raises:
            RolloutError: there is none.
        """
        if name not in self.values:
            raise RolloutError(f"{self.place} has no {name!r}; it has {listing(sorted(self.values), 12)}.")
        return self.values[name]

    def numbers(self, name: str, like: str, length: int, start: int = 0, stop: int | None = None) -> list[float]:
        """A field of one number for each of `length` tokens: those of the tokens from `start` to `stop`, all finite.

        Args:
            name: of the field.
            like: the field whose length it must have, for the message.
            length: that length.
            start: the first token.
            stop: the one behind the last; None for the end.

        Raises:
            RolloutError: it is no list of numbers, of another length, or holds NaN or an infinity.
        """
        values = sized(self.get(name), name, self.place, like, length)[start:stop]
        return finite(values, name, self.place, name, len(values), start)

    def ids(self, name: str) -> list[int]:
        """A field of token ids.

        Raises:
            RolloutError: it is no list of integers from 0 on.
        """
        return token_ids(self.get(name), name, self.place)

    def number(self, name: str) -> float:
        """A field of one finite number.

        Raises:
            RolloutError: it is another thing.
        """
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RolloutError(f"{self.place}: {name} is {value!r}; expected a finite number.")
        return float(value)

    def whole(self, name: str) -> int:
        """A field of one integer from 0 on.

        Raises:
            RolloutError: it is another thing.
        """
        return token_ids([self.get(name)], name, self.place)[0]


def read_lines(path: Path) -> Iterator[Line]:
    r"""Read a file of JSON lines.

    Args:
        path: the file.

    Yields:
        Its rows, in order.

    Raises:
        RolloutError: the file cannot be read, is empty, or a line is cut off, no JSON object, or holds NaN.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     file = Path(place, "1.jsonl")
        ...     _ = file.write_text('{"score": 1.0}\n{"sco')
        ...     [line.values for line in read_lines(file)]
        Traceback (most recent call last):
        fkernel.errors.RolloutError: ...1.jsonl, line 2 is cut off: the file was not written to its end. ...
    """
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            count = 0
            for count, text in enumerate(file, 1):
                yield _line(text, f"{path}, line {count}")
    except (OSError, UnicodeDecodeError) as error:
        raise RolloutError(f"{path} cannot be read: {error}.") from error
    if not count:
        raise RolloutError(f"{path} is empty; expected one JSON object a line.")


def _line(text: str, place: str) -> Line:
    try:
        values = parse_json(text, parse_constant=_refuse)
    except _NotFiniteError as error:
        raise RolloutError(
            f"{place} holds {error}, which is no number; the training diverged there, or the file was edited."
        ) from None
    except (ValueError, RecursionError) as error:
        if not text.endswith("\n"):
            raise RolloutError(
                f"{place} is cut off: the file was not written to its end. Copy it again, or take another step."
            ) from None
        raise RolloutError(f"{place} is no JSON ({error}); expected one JSON object a line.") from None
    if not isinstance(values, dict):
        raise RolloutError(f"{place} is a {type(values).__name__}; expected a JSON object.")
    return Line(place, values)


class _NotFiniteError(Exception):
    """A constant that Python writes and JSON has not."""


def _refuse(constant: str) -> None:
    raise _NotFiniteError(constant)


def sized(values: Any, name: str, place: str, like: str, length: int) -> list[Any]:
    """Check that a field is a list with one entry for each of `length` tokens.

    Raises:
        RolloutError: it is not; it names the place.

    Example:
        >>> sized([0.5], "advantages", "a.jsonl, line 3", "token_ids", 2)
        Traceback (most recent call last):
        fkernel.errors.RolloutError: a.jsonl, line 3: advantages has 1 numbers and token_ids 2; expected one for each...
    """
    if not isinstance(values, list):
        raise RolloutError(f"{place}: {name} is a {type(values).__name__}; expected a list of numbers.")
    if len(values) != length:
        raise RolloutError(
            f"{place}: {name} has {len(values)} numbers and {like} {length}; expected one for each token."
        )
    return values


def finite(values: Any, name: str, place: str, like: str, length: int, start: int = 0) -> list[float]:
    """Check that there is one finite number for each of `length` tokens.

    Raises:
        RolloutError: there is not; it names the place, and the entry counted from `start`.

    Example:
        >>> finite([0.5, None], "advantages", "a.jsonl, line 3", "token_ids", 2)
        Traceback (most recent call last):
        fkernel.errors.RolloutError: a.jsonl, line 3: advantages[1] is None; expected a finite number.
    """
    for i, value in enumerate(sized(values, name, place, like, length), start):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RolloutError(f"{place}: {name}[{i}] is {value!r}; expected a finite number.")
    return [float(value) for value in values]


def flags(values: Any, name: str, place: str, like: str, length: int) -> list[bool]:
    """Check that there is one 0 or 1 for each of `length` tokens.

    Raises:
        RolloutError: there is not; it names the place.

    Example:
        >>> flags([0, True, 1.0], "loss_mask", "a.jsonl, line 3", "token_ids", 3)
        [False, True, True]
    """
    given = [int(one) if isinstance(one, bool) else one for one in sized(values, name, place, like, length)]
    numbers = finite(given, name, place, like, length)
    wrong = next((i for i, value in enumerate(numbers) if value not in (0, 1)), None)
    if wrong is not None:
        raise RolloutError(f"{place}: {name}[{wrong}] is {numbers[wrong]:g}; expected a mask of 0 and 1.")
    return [value == 1 for value in numbers]


def token_ids(values: Any, name: str, place: str) -> list[int]:
    """Check that a list holds token ids.

    Raises:
        RolloutError: it does not; it names the place.

    Example:
        >>> token_ids([1, -100], "token_ids", "a.jsonl, line 3")
        Traceback (most recent call last):
        fkernel.errors.RolloutError: a.jsonl, line 3: token_ids[1] is -100; expected integers from 0 on.
    """
    if not isinstance(values, list):
        raise RolloutError(f"{place}: {name} is a {type(values).__name__}; expected a list of token ids.")
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            where = name if len(values) == 1 else f"{name}[{i}]"
            raise RolloutError(f"{place}: {where} is {value!r}; expected integers from 0 on.")
    return values


def check_numbered(numbers: Sequence[int], what: str, place: str) -> None:
    """Check that rows are numbered 0, 1, … without a gap or a repetition.

    Raises:
        RolloutError: they are not.

    Example:
        >>> check_numbered([0, 2], "idx", "train_data_step3.jsonl")
        Traceback (most recent call last):
        fkernel.errors.RolloutError: train_data_step3.jsonl has no row with idx 1 and goes on to 2; rows are missing.
    """
    seen = {*numbers}
    if len(seen) < len(numbers):
        twice = sorted({number for number in numbers if numbers.count(number) > 1})
        raise RolloutError(
            f"{place} has {what} {twice[0]} more than once; a run that was resumed may have written its rows again. "
            f"Keep the rows of one of the two."
        )
    missing = sorted({*range(max(numbers) + 1)} - seen)
    if missing:
        raise RolloutError(
            f"{place} has no row with {what} {missing[0]} and goes on to {max(numbers)}; rows are missing."
        )
