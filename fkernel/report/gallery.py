"""Draw all pictures of finished results to files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fkernel.io import make_directory
from fkernel.report.analysis_tables import REPORTS, UPDATE_REPORTS
from fkernel.report.pictures import contributor_bars, heatmap, influence_histogram, predicted_vs_realised, spectrum
from fkernel.report.style import saved
from fkernel.study import FisherKernelResults, RequestResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[], "Figure"]


def draw_all(results: FisherKernelResults, directory: str | Path) -> list[Path]:
    """Draw every picture that the results have data for.

    Args:
        results: finished results.
        directory: where PNGs are written: ``<request>_<picture>.png``, ``<request>_<analysis>.png``,
            ``<request>_observable_<name>.png``, ``update_<analysis>.png`` and ``spectrum.png``.

    Returns:
        The files.
    """
    place, files = Path(directory), list[Path]()
    make_directory(place)
    for name, draw in _pictures(results):
        saved(draw(), place / f"{name}.png")
        files.append(place / f"{name}.png")
    return files


def _pictures(results: FisherKernelResults) -> Iterator[tuple[str, Draw]]:
    """File names and the functions that draw them."""
    for name, result in results.requests.items():
        for picture, draw in (*_effects(result), *_analyses(result, results.units)):
            yield f"{name}_{picture}", draw
    if results.self_kernel is not None:
        yield "spectrum", partial(spectrum, results.self_kernel)
    for name, report in UPDATE_REPORTS.items():
        if name in results.analyses and results.analyses[name].skipped is None:
            yield f"update_{name}", partial(report.figure, results)


def _effects(result: RequestResult) -> Iterator[tuple[str, Draw]]:
    yield "influence", partial(influence_histogram, result)
    if result.contributions is not None:
        yield "heatmap", partial(heatmap, result)
    if result.top is not None and result.top.size:
        yield "contributors", partial(contributor_bars, result)
    if {"batch", "predicted"} <= set(result.calibration):
        yield "predicted_vs_realised", partial(predicted_vs_realised, result)


def _analyses(result: RequestResult, units: str) -> Iterator[tuple[str, Draw]]:
    """Pictures of the analyses that were not skipped."""
    names_of = [name.partition(".") for name, analysis in result.analyses.items() if analysis.skipped is None]
    for kind, report in REPORTS.items():
        names = [name for key, _, name in names_of if key == kind]
        draw = partial(report.figure, units=units) if report.in_units else report.figure
        if report.each is not None:
            yield from ((f"{report.each}_{name}", partial(draw, result, name)) for name in names)
        elif names:
            yield kind, partial(draw, result)
