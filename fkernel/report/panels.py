"""Panels of the ledger, the sweep over step sizes, and the parts of the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fkernel.analysis import ENDS
from fkernel.report.style import (
    BLUE,
    GREY,
    PALE,
    PALETTE,
    RED,
    SMALL,
    analysis_result,
    figure,
    finish,
    largest,
    percent,
    sequence_rows,
)
from fkernel.study import AnalysisResult, RequestResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEDGER = {
    "momentum": (PALETTE[1], ""),
    "decay": (PALETTE[2], ""),
    "arithmetic": (PALETTE[5], "/////"),
    "unexplained": (RED, "xxxxx"),
    "unselected": (PALETTE[6], "....."),
}
"""Terms whose sum is the realised change, but for the batch's and the remainder: colour and hatching."""
BATCH = (PALETTE[0], PALETTE[4], PALETTE[3])
"""Colours of the batch's parts, which are hatched from the fourth on."""
LEFT = ("remainder", "realised", "floor")
"""What is drawn of a ledger beside its terms."""
TITLES = {"unselected": "parameters not selected"}


def ledger_panel(result: RequestResult, path: str | Path | None = None) -> Figure:
    """Draw the ledger of the twelve sequences with the largest changes: terms that add up to the realised change.

    Left, positive terms are stacked to the right of zero and negative ones to its left, with one for unselected
    parameters, where they changed; right, the remainder beside the rounding floor.

    Args:
        result: of one request whose plan asked for the ledger.
        path: where to write a PNG; None only returns the figure.

    Raises:
        ModelError: matplotlib is not installed.
        ResultsError: the ledger was not asked for, or was skipped.
    """
    analysis = analysis_result(result, "ledger")
    order = largest(analysis["realised"], 12)
    drawn = figure(9, 1.9 + 0.3 * len(order))
    left, right = drawn.subplots(1, 2, sharey=True, width_ratios=(2.3, 1))
    _stack(left, {name: SMALL * values[order] for name, values in analysis.arrays.items() if name not in LEFT})
    left.axvline(0, color="black", linewidth=0.8)
    realised = {"marker": "D", "s": 34, "color": "black", "edgecolor": "white", "linewidth": 0.8, "zorder": 4}
    left.scatter(SMALL * analysis["realised"][order], range(len(order)), label="realised", **realised)
    sequence_rows(left, [result.evaluation[row] for row in order])
    left.use_sticky_edges = False  # or the longest bar ends at the frame, with half of its marker
    left.margins(x=0.06)
    left.set_xlabel("change of log π  (10⁻³ nats)", fontsize=9)
    title = f"the {len(order)} that moved most, part by part" if len(order) > 1 else "the change, part by part"
    left.set_title(f"{result.name}: {title}", loc="left", fontsize=11)
    _left_over(right, analysis, order)
    style: dict[str, Any] = {"frameon": False, "fontsize": 9}
    drawn.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=3, **style)
    drawn.legend(*right.get_legend_handles_labels(), loc="outside lower right", **style)
    finish(drawn, None, 9)
    right.tick_params(axis="y", length=0, labelleft=False)
    return finish(drawn, path, 9)


def _stack(axes: Axes, parts: dict[str, np.ndarray]) -> None:
    """Stack bars by sign."""
    count = len(next(iter(parts.values())))
    up, down = np.zeros(count), np.zeros(count)
    largest_sum = max(float(sum(np.abs(values) for values in parts.values()).max()), 1e-300)  # pyright: ignore
    of_batch = [name for name in parts if name not in LEDGER]
    batch = {name: (BATCH[i % len(BATCH)], "////" * (i // len(BATCH))) for i, name in enumerate(of_batch)}
    for name, values in parts.items():
        colour, hatch = {**LEDGER, **batch}[name]
        most = float(np.abs(values).max())
        title = TITLES.get(name, name.removeprefix("part."))
        caption = title if most > 0.004 * largest_sum else f"{title} (at most {most:.1g}, hardly seen)"
        start = np.where(values < 0, down, up)
        style = {"height": 0.74, "color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
        axes.barh(range(count), values, left=start, label=caption, **style)
        up, down = up + np.clip(values, 0, None), down + np.clip(values, None, 0)


def _left_over(axes: Axes, analysis: AnalysisResult, order: list[int]) -> None:
    places = np.arange(len(order))
    rest, floor = np.abs(analysis["remainder"])[order], analysis["floor"][order]
    positive = np.concatenate([x[x > 0] for x in (rest, floor)])
    low = 0.4 * float(positive.min()) if len(positive) else 1e-9
    caption = (
        f"{name} {percent(analysis.facts[fact])}"
        for name, fact in (
            ("rounding floor,", "floor"),
            ("remainder,", "error"),
        )
    )
    axes.barh(places, np.clip(floor - low, 0, None), left=low, height=0.74, color=PALE, label=next(caption))
    axes.plot(_above(rest), places, "o", color=BLUE, markersize=6, label=next(caption))
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter("")  # within a decade, labels of 2, 3, … would overlap
    axes.set_xlim(low, None)
    axes.set_xlabel("size  (nats)", fontsize=9)
    axes.set_title("what is left over", loc="left", fontsize=11)


def _above(values: np.ndarray) -> np.ndarray:
    """Replace values ≤ 0 by NaN, for a logarithmic axis."""
    return np.where(values > 0, values, np.nan)


def sweep_panel(result: RequestResult, path: str | Path | None = None) -> Figure:
    """Draw the prediction's relative error against the step's size.

    The first-order error grows as s, with curvature as s²; for small s rounding dominates.

    Args and errors as in `ledger_panel`, of the sweep.
    """
    analysis = analysis_result(result, "sweep")
    scales, facts = analysis["scales"].astype(float), analysis.facts
    errors = {order: _above(analysis[f"{order}_error"].astype(float)) for order in ("first", "second")}
    noise = _above(analysis["noise"].astype(float))
    drawn = figure(8.5, 5.2)
    axes = drawn.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    if facts["first_holds"] is not None:
        low, high = facts["first_holds"]
        axes.axvspan(low / 1.2, high * 1.2, color="#fbe3d6", linewidth=0, zorder=0)
    axes.axhline(facts["within"], color=GREY, linewidth=0.7, linestyle=":")
    axes.text(scales[0], facts["within"] * 1.12, percent(facts["within"]), fontsize=8, color=GREY)
    axes.plot(scales, noise, "--", color=GREY, linewidth=1.2, label="rounding, relative to what was realised")
    for order, colour, marker, name, power in (
        ("first", RED, "o", "first order", 1),
        ("second", BLUE, "s", "with curvature", 2),
    ):
        axes.plot(scales, errors[order], f"{marker}-", color=colour, markersize=4, linewidth=1.3, label=name)
        _guide(axes, scales, errors[order], power, colour)
    finite = np.concatenate([values[np.isfinite(values)] for values in errors.values()])
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (1e-6, 1.0)
    axes.set_ylim(low / 8, max(5.0, 6 * high))
    axes.set_xlim(scales.min() / 1.6, scales.max() * 1.6)
    _words(axes, scales, noise, errors["first"])
    axes.set_xlabel("size of the step  (1 is the step that was taken)", fontsize=9)
    axes.set_ylabel("relative error  ‖predicted − realised‖ / ‖realised‖", fontsize=9)
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8.5, frameon=False)
    rates = facts["lr"]
    if rates is not None and len(rates) == 1 and rates[0] > 0:
        top = axes.secondary_xaxis("top", functions=(lambda s: s * rates[0], lambda lr: lr / rates[0]))
        top.set_xlabel("learning rate", fontsize=9)
        top.tick_params(labelsize=8)
    ends = "; ".join(f"{name} {_range(facts[f'{order}_holds'])}" for order, name in
                     (("first", "first order (shaded)"), ("second", "with curvature")))  # fmt: skip
    axes.set_title(
        f"{result.name}: how far the prediction carries\nwithin {percent(facts['within'])}: {ends}",
        loc="left",
        fontsize=10,
    )
    return finish(drawn, path, 8)


def _guide(axes: Axes, scales: np.ndarray, error: np.ndarray, power: int, colour: str) -> None:
    """Draw a line of the theoretical slope beside the curve, at the largest scale with an error below 3 %."""
    good = np.flatnonzero(np.nan_to_num(error, nan=np.inf) < 0.03)
    if not len(good):
        return
    at, aside = good[-1], 1.8 if power == 1 else 0.5
    ends = scales[at] * 10 ** (np.array([-1.2, 0.8]) / power)
    ends = np.clip(ends, scales[0], scales[-1] / 2)
    line = aside * error[at] * (ends / scales[at]) ** power
    axes.plot(ends, line, color=colour, linewidth=0.9, linestyle="-.")
    where: dict[str, Any] = {"ha": "right", "va": "bottom"} if power == 1 else {"ha": "left", "va": "top"}
    shift = (-4, 0) if power == 1 else (3, -2)
    caption = f"slope {power}"
    axes.annotate(caption, (ends[1], line[1]), shift, textcoords="offset points", color=colour, fontsize=8, **where)


def _words(axes: Axes, scales: np.ndarray, noise: np.ndarray, error: np.ndarray) -> None:
    low, high = axes.get_ylim()
    known = np.flatnonzero(np.isfinite(noise) & (noise < 0.3))
    if len(known):
        at = (scales[known[0]], noise[known[0]])
        place = (max(scales[0], at[0] / 40), max(3 * low, at[1] / 8))
        style: dict[str, Any] = {
            "arrowprops": {"arrowstyle": "-", "color": GREY, "linewidth": 0.6},
            "bbox": {"facecolor": "white", "linewidth": 0, "pad": 1},
        }
        axes.annotate("rounding is\nall there is", at, place, color=GREY, fontsize=9, va="center", **style)
    if np.nan_to_num(error, nan=np.inf)[-1] > 0.3:
        axes.text(scales[-1], 0.8 * high, "the expansion\nbreaks down", color=GREY, fontsize=9, ha="right", va="top")


def _range(ends: list[float] | tuple[float, float] | None) -> str:
    return "nowhere" if ends is None else f"{ends[0]:.2g} to {ends[1]:.2g}"


def parts_panel(result: RequestResult, path: str | Path | None = None) -> Figure:
    """Draw the shares of Σ|K·A| by parts of the model, beside the shares of ‖∇S‖².

    Kinds that other methods often leave out (embedding, positions, head) are hatched; the title has the error of that.

    Args and errors as in `ledger_panel`, of the parts.
    """
    analysis = analysis_result(result, "parts")
    facts = analysis.facts
    most = max(len(facts["kinds"]), len(facts["layers"]))
    drawn = figure(9, 1.5 + 0.3 * min(most, 16))
    for axes, view in zip(drawn.subplots(1, 2), ("kind", "layer"), strict=True):
        names = facts[f"{view}s"]
        places = np.arange(len(names))
        hatches = ["/////" if name in ENDS else "" for name in names]
        for what, colour, shift, caption in (
            ("shares", BLUE, -0.2, "of what moved, Σ|K·A|"),
            ("norm_shares", "#a6a6a6", 0.2, "of the gradients' size, Σ‖∇S‖²"),
        ):
            widths = [100 * facts[f"{view}_{what}"][name] for name in names]
            bars = axes.barh(places + shift, widths, height=0.38, color=colour, edgecolor="white", linewidth=0)
            for bar, hatch in zip(bars, hatches, strict=True):
                bar.set_hatch(hatch)
            axes.barh([0], [0], color=colour, label=caption)
        every = -(-len(names) // 24)
        axes.set_yticks(places[::every], names[::every])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel("share  (%)", fontsize=9)
        axes.set_title(f"by {'kind of parameter' if view == 'kind' else 'layer'}", loc="left", fontsize=9)
    drawn.axes[0].barh([0], [0], color="white", edgecolor=GREY, hatch="/////", linewidth=0, label="often left out")
    handles, caption = drawn.axes[0].get_legend_handles_labels()
    drawn.legend(handles, caption, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    drawn.suptitle(
        f"{result.name}: through which parameters the batch moved it; "
        f"without the hatched, K·A is wrong by {percent(facts['missed'])}",
        x=0.01, ha="left", fontsize=10,
    )  # fmt: skip
    return finish(drawn, path, 8)
