"""Shared by all pictures: figures without a display, colours, labels.

Colours: blue lowers, red raises, white is zero; parts of a whole use a colour-blind-safe palette
(M. Okabe, K. Ito, "Color Universal Design", 2008).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fkernel.errors import ModelError, ResultsError
from fkernel.io import atomic_file
from fkernel.study import AnalysisResult, FisherKernelResults, RequestResult, SequenceInfo

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

BLUE, RED, GREY = "#2166ac", "#b2182b", "#555555"  # colour-blind-safe
DARK_BLUE, DARK_RED, PALE = "#053061", "#67001f", "#d9d9d9"
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
SMALL = 1e3
"""Scale of drawn changes, 10⁻³ nats."""


def figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches.

    Raises:
        ModelError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModelError("Pictures need matplotlib: pip install 'fkernel[report]'.") from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def finish(figure: Figure, path: str | Path | None, size: float = 7) -> Figure:
    """Hide the top and right spines, set the tick labels' size, and save to `path`, if given."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=size)
    return saved(figure, path)


def saved(figure: Figure, path: str | Path | None) -> Figure:
    """Write a figure to a file, whose suffix says its format; None writes none."""
    if path is not None:
        with atomic_file(Path(path)) as temporary:
            figure.savefig(temporary, format=Path(path).suffix[1:] or "png")
    return figure


def diverging() -> Colormap:
    """A diverging colormap: blue, white, red."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("blue-white-red", [DARK_BLUE, BLUE, "white", RED, DARK_RED])


def ink(value: float, limit: float) -> str:
    """Text colour on a cell of a symmetric colour scale."""
    return "white" if abs(value) > 0.35 * limit else "black"


def analysis_result(result: RequestResult | FisherKernelResults, name: str) -> AnalysisResult:
    """The result of an analysis.

    Raises:
        ResultsError: it was not asked for, or was skipped.
    """
    analysis = result.analysis(name)
    if analysis.skipped is not None:
        raise ResultsError(f"The analysis {name!r} was left out: {analysis.skipped}.")
    return analysis


def moved_most(result: RequestResult, rows: int) -> list[int]:
    """Rows of the largest realised changes, or predicted ones without realised; largest first."""
    return largest(result.predicted if result.realised is None else result.realised, rows)


def largest(values: np.ndarray, count: int) -> list[int]:
    """Indices of the largest |values|, largest first."""
    return np.argsort(-np.abs(values), kind="stable")[:count].tolist()


def sequence_rows(axes: Axes, sequences: list[SequenceInfo], most: int = 18) -> None:
    """Label the rows of a picture, the first on top."""
    axes.set_yticks(range(len(sequences)), [label(info, most) for info in sequences])
    axes.set_ylim(len(sequences) - 0.4, -0.6)


def label(info: SequenceInfo, most: int = 22) -> str:
    """A sequence's label: its id and the end of its text."""
    return plain(f"{info.id}  {tail(info.prompt + info.response, most)}")


def tail(text: str, most: int) -> str:
    """The last `most` characters of a text."""
    return text if len(text) <= most else f"…{text[1 - most :]}"


def plain(text: str) -> str:
    """A text as one line, without control characters; `$` is escaped for matplotlib."""
    spaced = text.replace("\n", " ").replace("\t", " ")
    return "".join(c if c.isprintable() else "·" for c in spaced).replace("$", r"\$")


def percent(share: float | None) -> str:
    """Format a share; – where it is not finite."""
    if share is None or not np.isfinite(share):
        return "–"
    size = abs(100 * share)
    if 0 < size < 1e-3:
        return "< 0.001 %"
    return f"{100 * share:.0f} %" if size >= 10 else f"{100 * share:.2g} %"


def signed(value: float | np.floating, digits: int = 2) -> str:
    """Format a change with its sign; "0" where it rounds to 0."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else "0"


def count(n: int, what: str) -> str:
    """A number of things, in the singular for one.

    Example:
        >>> count(1, "sequence"), count(2, "sequence")
        ('1 sequence', '2 sequences')
    """
    return f"{n:,} {what}" + ("" if n == 1 else "s")
