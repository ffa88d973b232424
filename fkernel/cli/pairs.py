"""The option --probe "PROMPT" "RESPONSE", which takes two values and may be given several times."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand


def pair(value: Any) -> Any:
    """Take the two values of a --probe as they are."""
    return value


Probe = Annotated[
    list[Any] | None,
    typer.Option(
        "--probe", parser=pair, metavar='"PROMPT" "RESPONSE"', help="What is asked about; may be given several times."
    ),
]


class WithPairs(TyperCommand):
    """A command whose option --probe takes two values."""

    def __init__(self, *given: Any, **more: Any) -> None:
        """As TyperCommand."""
        super().__init__(*given, **more)
        for parameter in self.params:
            if parameter.name == "probe":
                parameter.nargs = 2
