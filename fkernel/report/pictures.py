"""Pictures of finished results, without pyplot: no global state, no display."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fkernel.report.style import BLUE, GREY, RED, diverging, figure, finish, label, moved_most, plain
from fkernel.study import RequestResult, SelfKernel, SequenceInfo

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heatmap(result: RequestResult, path: str | Path | None = None) -> Figure:
    """Draw the contributions C: rows are evaluation sequences, columns the update batch, both grouped by prompt.

    The colour scale is symmetric, up to the 99.5th percentile of |C|, so that one large entry does not fade the others.

    Args:
        result: of one request that captured its kernel.
        path: where to write a PNG; None only returns the figure.

    Raises:
        ModelError: matplotlib is not installed.
        ResultsError: the kernel was not captured.
    """
    C = 1e3 * result.kept("contributions")
    drawn = figure(11, 6.5)
    axes = drawn.subplots()
    rows, columns = _grouped(result.evaluation), _grouped(result.update)
    C = C[np.ix_(rows, columns)]
    limit = float(np.percentile(np.abs(C), 99.5)) or 1.0
    image = axes.imshow(C, cmap=diverging(), vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    drawn.colorbar(image, ax=axes, extend="both", label="contribution to Δ log π  (10⁻³ nats; red raises)", pad=0.015)
    starts, labels = _groups([result.update[u] for u in columns])
    for start in starts[1:]:
        axes.axvline(start - 0.5, color=GREY, linewidth=0.4)
    ends = [*starts[1:], len(columns)]
    centres = [(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)]
    axes.set_xticks(centres, labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    shown = range(0, len(rows), max(1, len(rows) // 24))
    axes.set_yticks(shown, [label(result.evaluation[rows[row]]) for row in shown], fontsize=7)
    axes.set_xlabel("update sequences, grouped by prompt")
    axes.set_ylabel("evaluation sequences")
    axes.set_title(f"{result.name}: which update sequence moved which sequence", loc="left", fontsize=11)
    return finish(drawn, path)


def predicted_vs_realised(result: RequestResult, path: str | Path | None = None) -> Figure:
    """Draw predicted against realised ΔS, for K·A alone and the whole prediction, and the residual.

    Where unselected parameters changed, the residual is also drawn without their effect.

    Args and errors as in `heatmap`; it needs a realised change instead of the kernel.
    """
    drawn = figure(11, 4.4)
    left, middle, right = drawn.subplots(1, 3)
    realised, predictions = 1e3 * result.kept("realised"), {"batch": result.batch, "predicted": result.predicted}
    low, high = min(realised.min(), 0.0), max(realised.max(), 0.0)
    for axes, (name, title) in zip(
        (left, middle), (("batch", "K·A alone"), ("predicted", "whole prediction")), strict=True
    ):
        value = result.calibration[name]
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
    left.set_ylabel(f"realised ΔS{_proven(result)}  (10⁻³ nats)")
    left_over, caption = realised - 1e3 * result.predicted, f"gradients of E at the {result.path} of the step"
    right.scatter(realised, left_over, s=14, color=BLUE, alpha=0.8, linewidths=0, label=caption)
    if result.unselected is not None:
        rest = realised - 1e3 * (result.predicted + result.unselected)
        right.scatter(
            realised, rest, s=18, marker="x", color="black", linewidths=0.9, label="less what is not selected"
        )
    right.axhline(0, color=GREY, linewidth=0.8)
    right.set_title("what the prediction leaves over", loc="left", fontsize=9)
    right.set_xlabel("realised ΔS  (10⁻³ nats)")
    right.set_ylabel("realised − predicted  (10⁻³ nats)")
    right.legend(frameon=False, fontsize=8)
    return finish(drawn, path)


def influence_histogram(result: RequestResult, path: str | Path | None = None) -> Figure:
    """Draw histograms of the influence over sequences of E, and over all pairs where the kernel was captured.

    Args and errors as in `heatmap`; without the kernel only the first panel is drawn.
    """
    panels = [("Σ over the update batch, a sequence of E each", result.batch)]
    if result.contributions is not None:
        panels.append(("single contributions, a pair each", result.contributions.ravel()))
    drawn = figure(5.5 * len(panels), 3.6)
    for axes, (title, values) in zip(drawn.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        values = 1e3 * values
        limit = float(np.abs(values).max()) or 1.0
        edges = np.linspace(-limit, limit, 41)
        for chosen, color in ((values < 0, BLUE), (values >= 0, RED)):
            axes.hist(values[chosen], edges, color=color, alpha=0.85)
        axes.axvline(0, color=GREY, linewidth=0.8)
        if len(values) > 1000:
            axes.set_yscale("symlog", linthresh=10)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlabel("Δ log π  (10⁻³ nats; red raises)")
        axes.set_ylabel("how many")
    return finish(drawn, path)


def contributor_bars(result: RequestResult, rows: int = 6, path: str | Path | None = None) -> Figure:
    """Draw the largest contributors of the sequences with the largest changes.

    Args:
        result: of one request.
        rows: sequences of E.
        path: as in `heatmap`.

    Raises:
        ModelError: matplotlib is not installed.
        ResultsError: no contributors were captured.
    """
    top, values = result.kept("top"), 1e3 * result.kept("top_contributions")
    order = moved_most(result, rows)
    drawn = figure(11, 2.6 * -(-len(order) // 3))
    panels = drawn.subplots(-(-len(order) // 3), 3, squeeze=False).ravel()
    for axes, row in zip(panels, order, strict=False):
        height = values[row]
        axes.barh(range(len(height)), height, color=np.where(height < 0, BLUE, RED))
        axes.set_yticks(range(len(height)), [result.update[u].id for u in top[row]], fontsize=6)
        axes.invert_yaxis()
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.set_title(label(result.evaluation[row], 34), loc="left", fontsize=8)
        axes.set_xlabel("10⁻³ nats")
    for axes in panels[len(order) :]:
        axes.set_axis_off()
    return finish(drawn, path)


def spectrum(own: SelfKernel, path: str | Path | None = None) -> Figure:
    """Draw the eigenvalues of K_UU, and their cumulative share of its trace.

    Args:
        own: K_UU.
        path: as in `heatmap`.

    Raises:
        ModelError: matplotlib is not installed.
    """
    drawn = figure(9, 3.4)
    left, right = drawn.subplots(1, 2)
    positive = np.clip(own.eigenvalues, 0, None)
    number = np.arange(1, len(positive) + 1)
    shown = positive > 0
    left.plot(number[shown], positive[shown], ".-", color=BLUE, markersize=3, linewidth=0.8)
    left.set_yscale("log")
    left.set_xlabel("eigenvalue, largest first")
    left.set_ylabel("eigenvalue of K_UU")
    left.set_title(f"effective rank {own.effective_rank:.1f} of {len(positive)}", loc="left", fontsize=9)
    right.plot(number, positive.cumsum() / (positive.sum() or 1.0), color=BLUE)
    right.axvline(own.effective_rank, color=GREY, linewidth=0.8)
    right.set_ylim(0, 1.02)
    right.set_xlabel("largest eigenvalues")
    right.set_ylabel("share of the trace")
    return finish(drawn, path)


def _grouped(sequences: tuple[SequenceInfo, ...]) -> list[int]:
    """Indices of sequences grouped by prompt, prompts in order of first occurrence."""
    first: dict[str, int] = {}
    for row, info in enumerate(sequences):
        first.setdefault(_prompt(info), row)
    return sorted(range(len(sequences)), key=lambda row: (first[_prompt(sequences[row])], row))


def _groups(sequences: list[SequenceInfo]) -> tuple[list[int], list[str]]:
    """Start and label of every run of sequences that share a prompt."""
    starts = [i for i, info in enumerate(sequences) if not i or _prompt(info) != _prompt(sequences[i - 1])]
    return starts, [plain(sequences[i].prompt[-18:]) for i in starts]


def _prompt(info: SequenceInfo) -> str:
    return info.prompt_id or info.prompt


def _proven(result: RequestResult) -> str:
    """A note where the change was not measured on `step.after`."""
    return "" if result.facts.get("realised_on") == "step.after" else ", executed here: self-consistent"
