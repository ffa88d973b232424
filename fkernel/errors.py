"""What can go wrong, in the user's own names: what was given, what was expected, what to do.

Every error of the library derives from `FKernelError`, and from the built-in exception that a caller who has never
heard of `fkernel` would try to catch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that move a cursor, set a title, make a link or turn a line around; and halves of characters."""


def visible_text(text: str) -> str:
    r"""Write a text's control characters as escapes, so that a terminal shows them and does not obey them.

    Example:
        >>> print(visible_text("\x1b]0;title\x07 and 7 × 8\n"), end="")
        \x1b]0;title\x07 and 7 × 8
    """
    return UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text)


class FKernelError(Exception):
    """Base of every error that `fkernel` raises on purpose; control characters in its message are visible."""

    def __str__(self) -> str:
        return visible_text(super().__str__())


class ArgumentError(FKernelError, TypeError, ValueError):
    """A public function cannot use an argument: what it was given, and what it takes."""


class BatchError(FKernelError, ValueError):
    """A batch cannot be scored: empty, ragged, left-padded, without response, with an unknown token."""


class TreeError(FKernelError, ValueError):
    """Two parameter trees do not fit each other: names, shapes or dtypes differ."""


class ModelError(FKernelError, ValueError):
    """A model or function cannot be differentiated per sequence, and why."""


class OptimizerStateError(FKernelError, ValueError):
    """An optimizer state is incomplete, impossible, or of a kind that is not modelled."""


class CheckpointError(FKernelError, OSError):
    """A checkpoint cannot be read: a file is missing or damaged, or no layout is recognised."""


class CheckpointWarning(UserWarning):
    """Something that the training of a checkpoint did, or may have done, and that the explained step leaves out."""


class PlanError(FKernelError, ValueError):
    """A plan's file cannot be read, or asks for something that there is not: where in it, and what was expected."""


class RolloutError(FKernelError, ValueError):
    """Prompts, responses, rewards or a saved batch cannot be trusted, and which of them."""


class ModelWarning(UserWarning):
    """A model is computed in another way than usual, or holds something that a reader of its numbers should know."""


class RolloutWarning(UserWarning):
    """Something about sampled responses that a reader of their kernel should know, and that may be meant."""


class PreconditionerWarning(UserWarning):
    """A kernel that says next to nothing about the model, because a few coordinates of its diagonal carry it."""


class StoreError(FKernelError, OSError):
    """A store on disk cannot be opened, written or read: in use, of something else, damaged, or out of room."""


class ResultsError(FKernelError, ValueError):
    """A results directory is missing, incomplete, or of another schema; or it does not hold what is asked."""


class ProcessError(FKernelError, RuntimeError):
    """Several processes cannot compute together: one failed, stopped or hangs, or they were given different things.

    Attributes:
        of_all_ranks: whether every rank raises it.
        unanimous: whether every rank failed in the same way by itself.
    """

    def __init__(self, message: str, *, of_all_ranks: bool = False, unanimous: bool = False) -> None:
        super().__init__(message)
        self.of_all_ranks, self.unanimous = of_all_ranks, unanimous


class DemoError(FKernelError, RuntimeError):
    """The demo could not make a policy worth explaining, and what to change."""


class NonFiniteError(FKernelError, ArithmeticError):
    """A NaN or an infinity, with the place where it was first seen.

    Attributes:
        row: the sequence's position in its batch, or None where no sequence is at fault.
        parameter: the parameter's name, or None where the value belongs to no parameter.
        template: the message, with "{row}" where it names the sequence.
    """

    def __init__(self, template: str, *, row: int | None = None, parameter: str | None = None) -> None:
        super().__init__(template.replace("{row}", str(row)))
        self.template = template
        self.row = row
        self.parameter = parameter

    def at(self, start: int, place: str = "") -> NonFiniteError:
        """Return the same error for a batch in which this one's rows begin at `start`."""
        row = None if self.row is None else self.row + start
        return NonFiniteError(place.replace("{row}", str(row)) + self.template, row=row, parameter=self.parameter)


def listing(names: Sequence[str], most: int = 4) -> str:
    """Quote a few names and count the rest.

    Example:
        >>> listing(["a", "b", "c"], most=2)
        "'a', 'b' and 1 more"
    """
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
