"""All pictures of finished results, as files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fkernel.report.cells import covariates_panel, tokens_panel
from fkernel.report.comparisons import (
    counterfactuals_panel,
    observable_panel,
    preconditioners_panel,
    uncertainty_panel,
)
from fkernel.report.panels import ledger_panel, parts_panel, sweep_panel
from fkernel.report.pictures import contributor_bars, heatmap, influence_histogram, predicted_vs_realised, spectrum
from fkernel.report.update_panels import health_panel, structure_panel
from fkernel.study import FisherKernelResults, RequestResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[], "Figure"]
PANELS: dict[str, Callable[[RequestResult], Figure]] = {
    "ledger": ledger_panel,
    "sweep": sweep_panel,
    "tokens": tokens_panel,
    "parts": parts_panel,
    "preconditioners": preconditioners_panel,
    "covariates": covariates_panel,
}


def draw_all(results: FisherKernelResults, directory: str | Path) -> list[Path]:
    """Draw every picture that results have the numbers for.

    Args:
        results: finished results.
        directory: where PNGs are written: ``<request>_<picture>.png``, ``<request>_<analysis>.png``,
            ``<request>_observable_<name>.png``, ``update_<analysis>.png`` and ``spectrum.png``.

    Returns:
        The files.
    """
    place, found = Path(directory), list[Path]()
    place.mkdir(parents=True, exist_ok=True)
    for name, draw in _pictures(results):
        draw().savefig(place / f"{name}.png")
        found.append(place / f"{name}.png")
    return found


def _pictures(results: FisherKernelResults) -> Iterator[tuple[str, Draw]]:
    """Names of files, and what draws them."""
    for name, result in results.requests.items():
        for picture, draw in (*_effects(result), *_analyses(result, results.units)):
            yield f"{name}_{picture}", draw
    if results.self_kernel is not None:
        yield "spectrum", partial(spectrum, results.self_kernel)
    for name, draw in (("health", health_panel), ("structure", structure_panel)):
        if name in results.analyses and "left_out" not in results.analyses[name].facts:
            yield f"update_{name}", partial(draw, results)


def _effects(result: RequestResult) -> Iterator[tuple[str, Draw]]:
    yield "influence", partial(influence_histogram, result)
    if result.contributions is not None:
        yield "heatmap", partial(heatmap, result)
    if result.top is not None and result.top.size:
        yield "contributors", partial(contributor_bars, result)
    if {"batch", "predicted"} <= set(result.calibration):
        yield "predicted_vs_realised", partial(predicted_vs_realised, result)


def _analyses(result: RequestResult, units: str) -> Iterator[tuple[str, Draw]]:
    """What was left out is not drawn."""
    made = [name for name, finding in result.analyses.items() if "left_out" not in finding.facts]
    for name in made:
        kind, _, own = name.partition(".")
        if kind == "observables":
            yield f"observable_{own}", partial(observable_panel, result, own, units=units)
        elif kind == "uncertainty":
            yield kind, partial(uncertainty_panel, result, units=units)
        elif kind in PANELS:
            yield kind, partial(PANELS[kind], result)
    if any(name.startswith("counterfactuals.") for name in made):
        yield "counterfactuals", partial(counterfactuals_panel, result)
