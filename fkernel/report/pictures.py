"""Pictures of one explained step. matplotlib's figures are built directly: no global state, no display needed."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fkernel.errors import ModelError
from fkernel.study import SequenceInfo, StepResults

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, RED, GREY = "#2166ac", "#b2182b", "#555555"  # blue and red: told apart by colour-blind readers too
DARK_BLUE, DARK_RED = "#053061", "#67001f"


def heatmap(results: StepResults, path: str | Path | None = None) -> Figure:
    """Draw the contributions C: rows are evaluation sequences, columns the update batch, grouped by prompt.

    The colour scale is symmetric and zero is white; its ends are the 99.5th percentile of |C|, so that one large
    entry does not fade the others.

    Args:
        results: finished results.
        path: where to write a PNG; None only returns the figure.

    Raises:
        ModelError: matplotlib is not installed.
    """
    figure = _figure(11, 6.5)
    from matplotlib.colors import LinearSegmentedColormap

    diverging = LinearSegmentedColormap.from_list("blue-white-red", [DARK_BLUE, BLUE, "white", RED, DARK_RED])
    axes = figure.subplots()
    C = 1e3 * results.contributions
    limit = float(np.percentile(np.abs(C), 99.5)) or 1.0
    image = axes.imshow(C, cmap=diverging, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, extend="both", label="contribution to Δ log π  (10⁻³ nats; red raises)", pad=0.015)
    starts, labels = _groups(results.update)
    for start in starts[1:]:
        axes.axvline(start - 0.5, color=GREY, linewidth=0.4)
    ends = [*starts[1:], len(results.update)]
    centres = [(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)]
    axes.set_xticks(centres, labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    step = max(1, len(results.evaluation) // 24)
    rows = range(0, len(results.evaluation), step)
    axes.set_yticks(rows, [_label(results.evaluation[row]) for row in rows], fontsize=7)
    axes.set_xlabel("update sequences, grouped by prompt")
    axes.set_ylabel("evaluation sequences")
    axes.set_title("Which update sequence moved which evaluation sequence", loc="left", fontsize=11)
    return _finish(figure, path)


def predicted_vs_realised(results: StepResults, path: str | Path | None = None) -> Figure:
    """Draw predicted against realised ΔS: K·A alone beside the whole prediction, and what is left over.

    Args and errors as in `heatmap`.
    """
    figure = _figure(11, 4.4)
    left, middle, right = figure.subplots(1, 3)
    realised = 1e3 * results.realised
    predictions = {"batch": results.batch, "second_order": results.second_order}
    low, high = min(realised.min(), 0.0), max(realised.max(), 0.0)
    for axes, (name, title) in zip(
        (left, middle), (("batch", "K·A alone"), ("second_order", "whole prediction")), strict=True
    ):
        value = results.calibration[name]
        axes.axline((0, 0), slope=1, color=GREY, linewidth=0.8)
        axes.scatter(1e3 * predictions[name], realised, s=14, color=BLUE, alpha=0.8, linewidths=0)
        axes.set_title(
            f"{title}\nr = {value.pearson:.6f}, slope {value.slope:.3f}, relative error {value.relative_error:.2%}",
            loc="left",
            fontsize=9,
        )
        axes.set_xlabel("predicted ΔS  (10⁻³ nats)")
        margin = 0.05 * (high - low)
        axes.set_ylim(low - margin, high + margin)
    left.set_ylabel("realised ΔS  (10⁻³ nats)")
    for label, prediction, color in (
        ("first order", results.first_order, RED),
        ("with curvature", results.second_order, BLUE),
    ):
        right.scatter(realised, realised - 1e3 * prediction, s=14, color=color, alpha=0.8, linewidths=0, label=label)
    right.axhline(0, color=GREY, linewidth=0.8)
    right.set_title("what the prediction leaves over", loc="left", fontsize=9)
    right.set_xlabel("realised ΔS  (10⁻³ nats)")
    right.set_ylabel("realised − predicted  (10⁻³ nats)")
    right.legend(frameon=False, fontsize=8)
    return _finish(figure, path)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModelError("Pictures need matplotlib: pip install 'fkernel[report]'.") from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _finish(figure: Figure, path: str | Path | None) -> Figure:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
    if path is not None:
        figure.savefig(path)
    return figure


def _groups(sequences: tuple[SequenceInfo, ...]) -> tuple[list[int], list[str]]:
    """First column and label of every run of sequences that share a prompt."""
    starts, labels, at = [], [], 0
    for prompt, group in groupby(sequences, key=lambda info: info.prompt):
        starts.append(at)
        labels.append(prompt[-18:])
        at += len(list(group))
    return starts, labels


def _label(info: SequenceInfo) -> str:
    text = f"{info.prompt}{info.response}"
    return f"{info.id}  {text if len(text) <= 22 else '…' + text[-21:]}"
