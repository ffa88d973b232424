"""What an analysis is, as a plan asks for it. Each has a file of its own in this folder; `registry` lists them.

The mathematics is in `fkernel.analysis`, as pure functions; a file here has the configuration that a plan may give, and
what is read of a context, computed and kept. `fkernel.report` shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BeforeValidator

from fkernel.engine import KernelBlock
from fkernel.func.handles import ProductSpec
from fkernel.study.outcome import AnalysisResult


def _switched(value: Any) -> Any:
    """`true` asks for an analysis with its defaults, `false` for none."""
    return {} if value is True else None if value is False else value


Switch = BeforeValidator(_switched)
NAME = r"^[\w.-]+$"


class Accumulator:
    """An analysis that takes rows of K, or the gradients of E, as they come; it is made of (context, config)."""

    def ask(self, walk: ProductSpec) -> ProductSpec:
        """Add what it asks of the walk over E's and U's gradients."""
        return walk

    def add(self, block: KernelBlock) -> None:
        """Take some rows."""
        raise NotImplementedError

    def result(self) -> AnalysisResult:
        """End the analysis, once all rows were taken."""
        raise NotImplementedError


@dataclass(frozen=True)
class Analysis:
    """One question that a plan may ask. Either `compute` or `accumulator` is given.

    Attributes:
        columns: names of the arrays that it leaves in `kernel.npz`; `*` stands for any characters.
        compute: (context, config) -> AnalysisResult, once all effects are known.
        accumulator: (context, config) -> Accumulator, for what is made of rows of K while they are there.
        check: (context, config) raises where the plan names what is not there, before any row is computed.
        several: whether a plan gives a tuple of configurations, each with a name and a result of its own.
        own_rows: whether its rows are of something else than the sequences of E.
    """

    columns: tuple[str, ...]
    compute: Callable[[Any, Any], AnalysisResult] | None = None
    accumulator: Callable[[Any, Any], Accumulator] | None = None
    check: Callable[[Any, Any], object] | None = None
    several: bool = False
    own_rows: bool = False


def without_nan(facts: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: what is not defined is None.

    Example:
        >>> without_nan({"r": float("nan"), "slope": 1.0})
        {'r': None, 'slope': 1.0}
    """
    return {name: None if isinstance(value, float) and value != value else value for name, value in facts.items()}
