"""Panels of comparisons: observables, counterfactual steps, preconditioners, uncertainty."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fkernel.report.style import (
    BLUE,
    GREY,
    PALE,
    RED,
    SMALL,
    analysis_result,
    figure,
    finish,
    label,
    largest,
    percent,
    plain,
    sequence_rows,
    tail,
)
from fkernel.report.units import UNITS
from fkernel.study import AnalysisResult, RequestResult, SequenceInfo

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EFFECTS = ("momentum", "decay", "arithmetic")
"""What a prediction has beside the batch's part, where it is known."""
COUNTERFACTUAL = "counterfactuals."


def observable_panel(
    result: RequestResult, name: str, path: str | Path | None = None, *, units: str = "nats"
) -> Figure:
    """Draw an observable's predicted change against the realised one, and its top contributors.

    Without a realised change only the contributors are drawn. Where unselected parameters changed, the prediction is
    also drawn with their effect, and the error is of that.

    Args:
        result: of one request whose plan asked for the observable.
        name: the observable's.
        path: where to write a PNG; None only returns the figure.
        units: of contributions, `FisherKernelResults.units`.

    Raises:
        ModelError: matplotlib is not installed.
        ResultsError: the observable was not asked for, or was skipped.
    """
    analysis = analysis_result(result, f"observables.{name}")
    predicted = analysis["batch"] + sum(analysis.arrays.get(part, 0.0) for part in EFFECTS)
    kind = analysis.facts["kind"]
    unit_name = UNITS.get(kind, "nats")
    unit = f"10⁻³ {unit_name if units == 'nats' else units}"
    (most,) = largest(predicted, 1)
    measured = "realised" in analysis.arrays
    drawn = figure(9 if measured else 5.2, 3.9)
    panels = drawn.subplots(1, 2 if measured else 1, squeeze=False)[0]
    if measured:
        _predicted(panels[0], analysis, predicted, unit)
    axes, columns = panels[-1], analysis["top"][most]
    values = SMALL * analysis["top_contributions"][most]
    axes.barh(range(len(values)), values, color=np.where(values < 0, BLUE, RED))
    axes.set_yticks(range(len(values)), [label(result.update[u], 16) for u in columns])
    axes.invert_yaxis()
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel(f"contribution  ({unit})", fontsize=9)
    axes.set_title(f"who changed {plain(tail(analysis.facts['rows'][most], 32))}", loc="left", fontsize=9)
    caption = "" if kind == name else f", {kind.replace('_', ' ')}"
    mean = f"{analysis['value'].mean():.3g}" + " nats" * (unit_name == "nats")
    title = f"{result.name}: {name}{caption}, {mean} on average before the step"
    drawn.suptitle(title, x=0.01, ha="left", fontsize=10)
    return finish(drawn, path, 8)


def _predicted(axes: Axes, analysis: AnalysisResult, predicted: np.ndarray, unit: str) -> None:
    realised = SMALL * analysis["realised"].astype(float)
    axes.axline((0, 0), slope=1, color=GREY, linewidth=0.8)
    axes.scatter(SMALL * analysis["batch"], realised, s=12, color="#a6a6a6", linewidths=0, label="K·A alone")
    axes.scatter(SMALL * predicted, realised, s=18, color=BLUE, alpha=0.85, linewidths=0, label="whole prediction")
    predicted_change, caption = SMALL * predicted, ""
    if "unselected" in analysis.arrays:
        predicted_change = predicted_change + SMALL * analysis["unselected"]
        caption = " with what is not selected"
        axes.scatter(predicted_change, realised, s=18, marker="x", color="black", linewidths=0.9, label=caption.strip())
    size = float(np.linalg.norm(realised))
    error = float(np.linalg.norm(predicted_change - realised)) / size if size else None
    axes.set_xlabel(f"predicted change  ({unit})", fontsize=9)
    axes.set_ylabel(f"realised change  ({unit})", fontsize=9)
    rows = "1 row" if len(realised) == 1 else f"{len(realised)} rows"
    axes.set_title(f"{rows}, off by {percent(error)}{caption}", loc="left", fontsize=9)
    axes.legend(frameon=False, fontsize=8)


def counterfactuals_panel(result: RequestResult, path: str | Path | None = None) -> Figure:
    """Draw the changes under counterfactual steps, a panel each: every sequence of E, sorted.

    Blue is the counterfactual step with its own D minus the real step; grey the error of a frozen D.

    Args:
        result: of one request whose plan asked for counterfactuals.
        path: where to write a PNG; None only returns the figure.

    Raises:
        ModelError: matplotlib is not installed.
        ResultsError: none was asked for, or all were skipped.
    """
    every = {name: analysis for name, analysis in result.analyses.items() if name.startswith(COUNTERFACTUAL)}
    computed = {name: analysis for name, analysis in every.items() if analysis.skipped is None}
    if not computed:
        analysis_result(result, next(iter(every), "counterfactuals"))  # raises
    wide = 2 if len(computed) == 4 else min(3, len(computed))
    high = -(-len(computed) // wide)
    drawn = figure(max(5.0, 3.3 * wide), 0.6 + 2.9 * high)
    panels = drawn.subplots(high, wide, squeeze=False).ravel()
    for axes, (name, analysis) in zip(panels, computed.items(), strict=False):
        _other_step(axes, name.removeprefix(COUNTERFACTUAL), analysis)
    for axes in panels[len(computed) :]:
        axes.set_axis_off()
    handles = panels[0].get_legend_handles_labels()
    drawn.legend(*handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    drawn.suptitle(f"{result.name}: what other steps would have changed", x=0.01, ha="left", fontsize=10)
    return finish(drawn, path, 7.5)


def _other_step(axes: Axes, name: str, analysis: AnalysisResult) -> None:
    change = SMALL * (analysis["exact"].astype(float) - analysis["taken"])
    error = SMALL * (analysis["frozen"].astype(float) - analysis["exact"])
    order = np.argsort(change, kind="stable")
    place = np.arange(1, len(order) + 1)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.scatter(place, error[order], s=7, color="#8c8c8c", linewidths=0, label="mistake of a frozen D")
    axes.scatter(place, change[order], s=14, color=BLUE, linewidths=0, label="this step less the step that was taken")
    size = SMALL * float(np.abs(analysis["taken"]).max())
    if np.abs(change).max() <= 1e-5 * size:
        half = 0.01 * size or 1.0
        axes.set_ylim(-half, half)
        axes.text((len(order) + 1) / 2, half / 2, "no difference but rounding", ha="center", fontsize=8, color=GREY)
    axes.set_xlim(0.3, len(order) + 0.7)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("sequences of E, sorted", fontsize=8)
    axes.set_ylabel("Δ log π  (10⁻³ nats)", fontsize=8)
    facts = analysis.facts
    caption = f"clip {facts['clip']:.3g}, frozen D off by {percent(facts['frozen_error'])}"
    axes.set_title(f"{name}: {_changed(facts['changed'])}\n{caption}", loc="left", fontsize=8)


def _changed(changed: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        match value:
            case list():
                return ", ".join(map(str, value))
            case dict():
                return ", ".join(f"{key} {number:g}" for key, number in value.items())
            case float():
                return f"{value:g}"
            case _:
                return str(value)

    text = ", ".join(f"{what.replace('_', ' ')} {shown(value)}" for what, value in changed.items())
    return plain(text if len(text) <= 30 else f"{text[:29]}…")


def preconditioners_panel(result: RequestResult, path: str | Path | None = None) -> Figure:
    """Draw the correlation of influences under several preconditioners with the realised change.

    Bars are for the realised change without momentum, decay and unselected parameters, diamonds for all of it.

    Args and errors as in `counterfactuals_panel`, of the preconditioners.
    """
    analysis = analysis_result(result, "preconditioners")
    names, table = analysis.facts["names"], analysis.facts["agreement"]
    drawn = figure(8, 1.7 + 0.42 * len(names))
    axes = drawn.subplots()
    places = np.arange(len(names))
    kinds = (("of_batch", BLUE, -0.2, "Pearson's r, batch's part"), ("rank", "#9ecae1", 0.2, "rank correlation"))
    for what, colour, shift, caption in kinds:
        values = np.array([_number(table[name][what]) for name in names])
        axes.barh(places + shift, values, height=0.38, color=colour, label=caption)
        for place, value in zip(places + shift, values, strict=True):
            text = "not defined" if np.isnan(value) else f"{value:.3f}".replace("-", "−")
            axes.text(max(0.0, np.nan_to_num(value)) + 0.012, place, text, va="center", fontsize=7.5)
    correlations = [_number(table[name]["realised"]) for name in names]
    axes.scatter(
        correlations, places, marker="D", s=26, color="black", edgecolor="white", label="r, whole change", zorder=3
    )
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    low = min([0.0, *(x for x in axes.get_xlim() if x < -0.06)])
    axes.set_xlim(low, 1.12)
    axes.set_xlabel("correlation with the realised change  (no unit)", fontsize=9)
    axes.set_title(f"{result.name}: which preconditioner tells what happened", loc="left", fontsize=10)
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    return finish(drawn, path, 8.5)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def uncertainty_panel(result: RequestResult, path: str | Path | None = None, *, units: str = "nats") -> Figure:
    """Draw intervals of influences over prompts of U, and permutation p-values of prompts.

    p is of permutations of advantages within prompts; hatched prompts have nothing to permute.

    Args:
        result: of one request whose plan asked for the uncertainty.
        path: where to write a PNG; None only returns the figure.
        units: of contributions, `FisherKernelResults.units`.

    Raises:
        ModelError: matplotlib is not installed.
        ResultsError: the uncertainty was not asked for, or was skipped.
    """
    analysis = analysis_result(result, "uncertainty")
    order = largest(result.batch, 12)
    drawn = figure(10, 2.3 + 0.3 * len(order))
    left, right = drawn.subplots(1, 2, sharey=True, width_ratios=(1, 1.15))
    places, value = np.arange(len(order)), SMALL * result.batch[order]
    colours = np.where(value < 0, BLUE, RED)
    if "low" in analysis.arrays:
        left.hlines(
            places, SMALL * analysis["low"][order], SMALL * analysis["high"][order], color=colours, linewidth=2.2
        )
    left.scatter(value, places, s=34, color=colours, edgecolor="white", linewidth=0.8, zorder=3)
    left.axvline(0, color=GREY, linewidth=0.8)
    sequence_rows(left, [result.evaluation[row] for row in order])
    for place, p in zip(places, analysis["p"][order], strict=True):
        left.annotate(f"p {p:.2g}", (1, place), (4, 0), xycoords=("axes fraction", "data"),
                      textcoords="offset points", va="center", fontsize=8)  # fmt: skip
    left.set_xlabel(f"influence of the batch  (10⁻³ {units})", fontsize=9)
    interval = f"{analysis.facts['coverage']:.0%} intervals over prompts" if "low" in analysis.arrays else "influence"
    left.set_title(interval, loc="left", fontsize=9)
    title = f"{result.name}: how sure the influences of the batch are, of the {len(order)} that are largest"
    drawn.suptitle(title, x=0.01, ha="left", fontsize=10)
    _by_prompt(right, analysis, order, result.update)
    return finish(drawn, path, 8)


def _by_prompt(axes: Axes, analysis: AnalysisResult, order: list[int], update: tuple[SequenceInfo, ...]) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    facts, p = analysis.facts, analysis["prompt_p"][order]
    informative = np.array(facts["informative"], dtype=bool)
    low = min(0.01, max(1e-6, float(p.min())))
    shown = np.where(informative, p, np.nan)
    image = axes.imshow(shown, cmap="Blues_r", norm=LogNorm(low, 1.0), aspect="auto", interpolation="nearest")
    for column in np.flatnonzero(~informative):
        style = {"facecolor": "white", "edgecolor": PALE, "hatch": "////", "linewidth": 0}
        axes.add_patch(Rectangle((column - 0.5, -0.5), 1, len(order), **style))
    texts = {str(info.prompt_id): info.prompt for info in update}
    names = [plain(tail(texts.get(str(name), str(name)), 14)) for name in facts["prompts"]]
    every = max(1, -(-len(names) // 20))
    axes.set_xticks(range(0, len(names), every), names[::every], rotation=60, ha="right", rotation_mode="anchor")
    axes.tick_params(axis="y", labelleft=False, length=0)
    axes.set_xlabel("prompts of U  (hatched: nothing to permute)", fontsize=9)
    axes.set_title("every prompt; dark is more than chance", loc="left", fontsize=9)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.015)
    bar.set_label(f"p  (of {facts['draws']} permutations)", fontsize=8.5)
    ticks = [tick for tick in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0) if tick >= low]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.ax.minorticks_off()
