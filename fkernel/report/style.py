"""What all pictures share: figures without a display, colours that everybody tells apart, and texts as they are.

Colours: blue lowers and red raises, white is zero; parts of a whole are in Okabe and Ito's palette
(M. Okabe, K. Ito, "Color Universal Design", 2008).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fkernel.errors import ModelError, ResultsError
from fkernel.study import AnalysisResult, FisherKernelResults, RequestResult, SequenceInfo

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

BLUE, RED, GREY = "#2166ac", "#b2182b", "#555555"  # blue and red: told apart by colour-blind readers too
DARK_BLUE, DARK_RED, PALE = "#053061", "#67001f", "#d9d9d9"
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
SMALL = 1e3
"""Changes are drawn in 10⁻³ nats."""


def figure(width: float, height: float) -> Figure:
    """Make an empty figure, in inches.

    Raises:
        ModelError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModelError("Pictures need matplotlib: pip install 'fkernel[report]'.") from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def finish(figure: Figure, path: str | Path | None, size: float = 7) -> Figure:
    """Take off what frames have too much, set the size of the numbers, and write the file that is asked for."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=size)
    if path is not None:
        figure.savefig(path)
    return figure


def diverging() -> Colormap:
    """Blue, white, red: lowered, nothing, raised."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("blue-white-red", [DARK_BLUE, BLUE, "white", RED, DARK_RED])


def ink(value: float, limit: float) -> str:
    """Colour of a number that stands on its own colour of a symmetric scale."""
    return "white" if abs(value) > 0.35 * limit else "black"


def analysis_result(result: RequestResult | FisherKernelResults, name: str) -> AnalysisResult:
    """Give what an analysis analysis.

    Raises:
        ResultsError: it was not asked for, or it was left out; then with the reason.
    """
    analysis = result.analysis(name)
    if analysis.skipped is not None:
        raise ResultsError(f"The analysis {name!r} was left out: {analysis.skipped}.")
    return analysis


def moved_most(result: RequestResult, rows: int) -> list[int]:
    """Rows of the sequences that moved most, largest first: realised, or predicted where nothing was realised."""
    return largest(result.predicted if result.realised is None else result.realised, rows)


def largest(values: np.ndarray, count: int) -> list[int]:
    """Places of the largest |values|, largest first."""
    return np.argsort(-np.abs(values), kind="stable")[:count].tolist()


def sequence_rows(axes: Axes, sequences: list[SequenceInfo], most: int = 18) -> None:
    """Name the rows of a picture, the first on top."""
    axes.set_yticks(range(len(sequences)), [label(info, most) for info in sequences])
    axes.set_ylim(len(sequences) - 0.4, -0.6)


def label(info: SequenceInfo, most: int = 22) -> str:
    """Name a sequence by its id and the end of its text."""
    return plain(f"{info.id}  {tail(info.prompt + info.response, most)}")


def tail(text: str, most: int) -> str:
    """The end of a text, of at most so many characters."""
    return text if len(text) <= most else f"…{text[1 - most :]}"


def plain(text: str) -> str:
    """One line, without what matplotlib would read as mathematics, and without control characters."""
    spaced = text.replace("\n", " ").replace("\t", " ")
    return "".join(c if c.isprintable() else "·" for c in spaced).replace("$", r"\$")


def percent(share: float | None) -> str:
    """A share as people read it; – where it is not defined."""
    if share is None or not np.isfinite(share):
        return "–"
    size = abs(100 * share)
    if 0 < size < 1e-3:
        return "< 0.001 %"
    return f"{100 * share:.0f} %" if size >= 10 else f"{100 * share:.2g} %"


def signed(value: float, digits: int = 2) -> str:
    """A change as people read it: with its sign, and 0 where nothing of it is left."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else "0"
