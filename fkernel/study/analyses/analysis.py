"""The interface of analyses. Each has a file in this folder; `registry` lists them.

The mathematics is in `fkernel.analysis`, as pure functions; a file here has the plan's configuration, and computes the
result from a context. `fkernel.report` shows it.
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
    """`true` is an analysis with its defaults, `false` is none."""
    return {} if value is True else None if value is False else value


Switch = BeforeValidator(_switched)


class Accumulator:
    """An analysis of blocks of rows of K, or of E's gradients; constructed as (context, config)."""

    def ask(self, walk: ProductSpec) -> ProductSpec:
        """Add its products to those of the pass over E's and U's gradients."""
        return walk

    def add(self, block: KernelBlock) -> None:
        """Add a block of rows."""
        raise NotImplementedError

    def result(self) -> AnalysisResult:
        """The result, after the last block."""
        raise NotImplementedError


@dataclass(frozen=True)
class Analysis:
    """One analysis. Either `compute` or `accumulator` is given.

    Attributes:
        columns: names of its arrays in `kernel.npz`; `*` matches any characters.
        compute: (context, config) -> AnalysisResult, called after all effects are computed.
        accumulator: (context, config) -> Accumulator, which reads blocks of rows of K.
        check: (context, config) raises for unknown names in the plan, before any row is computed.
        several: whether a plan gives a tuple of named configurations, with a result each.
        own_rows: whether its rows are not the sequences of E.
    """

    columns: tuple[str, ...]
    compute: Callable[[Any, Any], AnalysisResult] | None = None
    accumulator: Callable[[Any, Any], Accumulator] | None = None
    check: Callable[[Any, Any], object] | None = None
    several: bool = False
    own_rows: bool = False


def without_nan(facts: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN, which JSON lacks, by None.

    Example:
        >>> without_nan({"r": float("nan"), "slope": 1.0})
        {'r': None, 'slope': 1.0}
    """
    return {name: None if isinstance(value, float) and value != value else value for name, value in facts.items()}
