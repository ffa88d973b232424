"""Pictures of finished results. matplotlib's figures are built directly: no global state, no display needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fkernel.errors import ModelError
from fkernel.study import FisherKernelResults, RequestResult, SelfKernel, SequenceInfo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, RED, GREY = "#2166ac", "#b2182b", "#555555"  # blue and red: told apart by colour-blind readers too
DARK_BLUE, DARK_RED = "#053061", "#67001f"


def heatmap(result: RequestResult, path: str | Path | None = None) -> Figure:
    """Draw the contributions C: rows are evaluation sequences, columns the update batch, both grouped by prompt.

    The colour scale is symmetric and zero is white; its ends are the 99.5th percentile of |C|, so that one large
    entry does not fade the others.

    Args:
        result: of one request that kept its kernel.
        path: where to write a PNG; None only returns the figure.

    Raises:
        ModelError: matplotlib is not installed.
        ResultsError: the kernel was not kept.
    """
    C = 1e3 * result.kept("contributions")
    figure = _figure(11, 6.5)
    from matplotlib.colors import LinearSegmentedColormap

    diverging = LinearSegmentedColormap.from_list("blue-white-red", [DARK_BLUE, BLUE, "white", RED, DARK_RED])
    axes = figure.subplots()
    rows, columns = _grouped(result.evaluation), _grouped(result.update)
    C = C[np.ix_(rows, columns)]
    limit = float(np.percentile(np.abs(C), 99.5)) or 1.0
    image = axes.imshow(C, cmap=diverging, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, extend="both", label="contribution to Δ log π  (10⁻³ nats; red raises)", pad=0.015)
    starts, labels = _groups([result.update[u] for u in columns])
    for start in starts[1:]:
        axes.axvline(start - 0.5, color=GREY, linewidth=0.4)
    ends = [*starts[1:], len(columns)]
    centres = [(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)]
    axes.set_xticks(centres, labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    shown = range(0, len(rows), max(1, len(rows) // 24))
    axes.set_yticks(shown, [_label(result.evaluation[rows[row]]) for row in shown], fontsize=7)
    axes.set_xlabel("update sequences, grouped by prompt")
    axes.set_ylabel("evaluation sequences")
    axes.set_title(f"{result.name}: which update sequence moved which sequence", loc="left", fontsize=11)
    return _finish(figure, path)


def predicted_vs_realised(result: RequestResult, path: str | Path | None = None) -> Figure:
    """Draw predicted against realised ΔS: K·A alone beside the whole prediction, and what is left over.

    Args and errors as in `heatmap`; it needs a realised change instead of the kernel.
    """
    figure = _figure(11, 4.4)
    left, middle, right = figure.subplots(1, 3)
    realised, whole = 1e3 * result.kept("realised"), "first_order" if result.second_order is None else "second_order"
    predictions = {"batch": result.batch, whole: result.predicted}
    low, high = min(realised.min(), 0.0), max(realised.max(), 0.0)
    for axes, (name, title) in zip((left, middle), (("batch", "K·A alone"), (whole, "whole prediction")), strict=True):
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
    left.set_ylabel("realised ΔS  (10⁻³ nats)")
    for label, prediction, color in (
        ("first order", result.first_order, RED),
        ("with curvature", result.second_order, BLUE),
    ):
        if prediction is None:
            continue
        right.scatter(realised, realised - 1e3 * prediction, s=14, color=color, alpha=0.8, linewidths=0, label=label)
    right.axhline(0, color=GREY, linewidth=0.8)
    right.set_title("what the prediction leaves over", loc="left", fontsize=9)
    right.set_xlabel("realised ΔS  (10⁻³ nats)")
    right.set_ylabel("realised − predicted  (10⁻³ nats)")
    right.legend(frameon=False, fontsize=8)
    return _finish(figure, path)


def influence_histogram(result: RequestResult, path: str | Path | None = None) -> Figure:
    """Draw how the influence is distributed: over sequences of E, and over all pairs where the kernel was kept.

    Args and errors as in `heatmap`; without the kernel only the first panel is drawn.
    """
    panels = [("Σ over the update batch, a sequence of E each", result.batch)]
    if result.contributions is not None:
        panels.append(("single contributions, a pair each", result.contributions.ravel()))
    figure = _figure(5.5 * len(panels), 3.6)
    for axes, (title, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
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
    return _finish(figure, path)


def contributor_bars(result: RequestResult, rows: int = 6, path: str | Path | None = None) -> Figure:
    """Draw the largest contributors of the sequences that moved most.

    Args:
        result: of one request.
        rows: sequences of E.
        path: as in `heatmap`.

    Raises:
        ModelError: matplotlib is not installed.
        ResultsError: no contributors were kept.
    """
    top, values = result.kept("top"), 1e3 * result.kept("top_contributions")
    moved = result.predicted if result.realised is None else result.realised
    order = np.argsort(-np.abs(moved), kind="stable")[:rows]
    figure = _figure(11, 2.6 * -(-len(order) // 3))
    panels = figure.subplots(-(-len(order) // 3), 3, squeeze=False).ravel()
    for axes, row in zip(panels, order, strict=False):
        height = values[row]
        axes.barh(range(len(height)), height, color=np.where(height < 0, BLUE, RED))
        axes.set_yticks(range(len(height)), [result.update[u].id for u in top[row]], fontsize=6)
        axes.invert_yaxis()
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.set_title(_label(result.evaluation[row], 34), loc="left", fontsize=8)
        axes.set_xlabel("10⁻³ nats")
    for axes in panels[len(order) :]:
        axes.set_axis_off()
    return _finish(figure, path)


def spectrum(own: SelfKernel, path: str | Path | None = None) -> Figure:
    """Draw the eigenvalues of K_UU, and how much of its trace the largest carry.

    Args:
        own: U against itself.
        path: as in `heatmap`.

    Raises:
        ModelError: matplotlib is not installed.
    """
    figure = _figure(9, 3.4)
    left, right = figure.subplots(1, 2)
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
    return _finish(figure, path)


def draw_all(results: FisherKernelResults, directory: str | Path) -> list[Path]:
    """Draw every picture that results have the numbers for.

    Args:
        results: finished results.
        directory: where PNGs are written, ``<request>_<picture>.png``.

    Returns:
        The files.
    """
    place, found = Path(directory), list[Path]()
    place.mkdir(parents=True, exist_ok=True)

    def draw(name: str, figure: Figure) -> None:
        figure.savefig(place / name)
        found.append(place / name)

    for name, result in results.requests.items():
        draw(f"{name}_influence.png", influence_histogram(result))
        if result.contributions is not None:
            draw(f"{name}_heatmap.png", heatmap(result))
        if result.top is not None and result.top.size:
            draw(f"{name}_contributors.png", contributor_bars(result))
        if {"batch", "first_order"} <= set(result.calibration):
            draw(f"{name}_predicted_vs_realised.png", predicted_vs_realised(result))
    if results.self_kernel is not None:
        draw("spectrum.png", spectrum(results.self_kernel))
    return found


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


def _grouped(sequences: tuple[SequenceInfo, ...]) -> list[int]:
    """Order sequences so that those of one prompt stand together, prompts as they first occur."""
    first: dict[str, int] = {}
    for row, info in enumerate(sequences):
        first.setdefault(_prompt(info), row)
    return sorted(range(len(sequences)), key=lambda row: (first[_prompt(sequences[row])], row))


def _groups(sequences: list[SequenceInfo]) -> tuple[list[int], list[str]]:
    """First place and label of every run of sequences that share a prompt."""
    starts = [i for i, info in enumerate(sequences) if not i or _prompt(info) != _prompt(sequences[i - 1])]
    return starts, [_plain(sequences[i].prompt)[-18:] for i in starts]


def _prompt(info: SequenceInfo) -> str:
    return info.prompt_id or info.prompt


def _label(info: SequenceInfo, most: int = 22) -> str:
    text = _plain(f"{info.prompt}{info.response}")
    return f"{info.id}  {text if len(text) <= most else '…' + text[1 - most :]}"


def _plain(text: str) -> str:
    """One line, without what matplotlib would read as mathematics."""
    return text.replace("\n", " ").replace("$", r"\$")
