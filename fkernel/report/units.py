"""Units that numbers are shown in, and what the columns of a ledger are called."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fkernel.report.style import signed
from fkernel.study import AccountResults, FisherKernelResults

UNITS = {"expected_reward": "of reward", "function": "of its unit"}
"""Units of observables; nats by default."""
PREDICTED = ("batch", "momentum", "decay", "arithmetic")
"""What a prediction is the sum of, where it is known."""
LABELS = {
    "unselected": "not selected",
    "floor": "± rounding",
    "realised": "measured",
    "before": "before the run",
    "part.raised": "advantage > 0",
    "part.lowered": "advantage < 0",
}


class Unit(NamedTuple):
    """What numbers are shown in: one unit for all tables and pictures of an account or a page.

    Attributes:
        scale: that they are multiplied by.
        name: of the unit.
        digits: after the point.
    """

    scale: float
    name: str
    digits: int

    def __call__(self, value: float | np.floating) -> str:
        """Format a change with its sign."""
        return signed(self.scale * float(value), self.digits)


def unit_of(results: AccountResults) -> Unit:
    """The unit of an account: thousandths, or the unit itself where the largest number is above 1.

    Args:
        results: the account.
    """
    own = UNITS.get(results.about["observable"], "nats")
    own = UNITS["function"] if "." in results.about["observable"] else own
    given = (*results.ledger.values(), results["contributions"])
    return _fitting(own, max(float(np.abs(values).max(initial=0.0)) for values in given))


def study_unit(results: FisherKernelResults) -> Unit:
    """The unit of a study: thousandths of a nat, or nats where the largest change is above 1; "bare" under such a P.

    Args:
        results: the study's.
    """
    given = [np.abs(each).max(initial=0.0) for result in results.requests.values() for each in _changes(result)]
    return _fitting(results.units, float(max(given, default=0.0)))


def labelled(name: str) -> str:
    """What a column of a ledger is called where it is shown."""
    return LABELS.get(name, name.removeprefix("part."))


def _changes(result: object) -> list[np.ndarray]:
    names = ("batch", "predicted", "realised", "top_contributions")
    return [values for name in names if (values := getattr(result, name)) is not None]


def _fitting(own: str, most: float) -> Unit:
    """The unit in which the largest number has a few digits before the point."""
    scale, name = (1.0, own.removeprefix("of ")) if most > 1 or own == "bare" else (1e3, f"10⁻³ {own}")
    places = 4 - int(np.floor(np.log10(scale * most))) if most > 0 else 2
    return Unit(scale, name, min(max(places, 2), 6))
