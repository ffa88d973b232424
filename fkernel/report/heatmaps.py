"""Panels of cells with numbers: tokens of responses, and correlations with covariates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fkernel.report.style import (
    GREY,
    PALE,
    SMALL,
    analysis_result,
    count,
    diverging,
    figure,
    finish,
    ink,
    largest,
    plain,
    saved,
    signed,
)
from fkernel.study import AnalysisResult, RequestResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

ROWS, WIDTH, PAIRS = 6, 16, 3
"""Largest numbers of responses, of tokens per response, and of pairs."""


class Window(NamedTuple):
    """The part of a response that is drawn.

    Attributes:
        start: its first token.
        texts: of its tokens.
        changes: Δ log π of each, 10⁻³ nats.
        whole: tokens of the whole response.
    """

    start: int
    texts: list[str]
    changes: np.ndarray
    whole: int


def tokens_panel(result: RequestResult, path: str | Path | None = None) -> Figure:
    """Draw the tokens of the sequences with the largest changes, coloured by Δ log π; and token × token kernels.

    Of a long response the part with the largest changes is drawn.

    Args:
        result: of one request whose plan asked for tokens.
        path: where to write a PNG; None only returns the figure.

    Raises:
        ModelError: matplotlib is not installed.
        ResultsError: tokens were not asked for, or were skipped.
    """
    analysis = analysis_result(result, "tokens")
    sums = analysis["logprob"].astype(float).sum(1)
    rows = largest(sums, ROWS)
    windows = [_window(analysis, row) for row in rows]
    pairs = analysis.facts["pairs"][:PAIRS]
    wide = max(len(window.texts) for window in windows)
    width = 2.6 + max(2.6, 0.62 * wide)
    drawn = figure(width + (4.2 if pairs else 0), max(1.4 + 0.62 * len(rows), 2.7 * len(pairs)))
    if pairs:
        grid = drawn.add_gridspec(len(pairs), 2, width_ratios=(width, 4.0))
        _responses(drawn.add_subplot(grid[:, 0]), result, rows, windows, sums)
        for place, pair in enumerate(pairs):
            _pair(drawn.add_subplot(grid[place, 1]), result, analysis, pair)
    else:
        _responses(drawn.subplots(), result, rows, windows, sums)
    return _clean(finish(drawn, None, 8), path)


def _window(analysis: AnalysisResult, row: int) -> Window:
    """The `WIDTH` successive tokens with the largest total |change|."""
    changes = SMALL * analysis["logprob"][row][analysis["response"][row].astype(bool)].astype(float)
    texts = analysis.facts["tokens"][row]
    sizes = np.abs(changes)
    runs = [sizes[i : i + WIDTH].sum() for i in range(max(1, len(sizes) - WIDTH + 1))]
    start = int(np.argmax(runs))
    return Window(start, texts[start : start + WIDTH], changes[start : start + WIDTH], len(texts))


def _responses(axes: Axes, result: RequestResult, rows: list[int], windows: list[Window], sums: np.ndarray) -> None:
    values = np.full((len(windows), max(len(window.texts) for window in windows)), np.nan)
    for row, window in enumerate(windows):
        values[row, : len(window.changes)] = window.changes
    image, limit = _image(axes, values)
    for row, window in enumerate(windows):
        for column, (text, change) in enumerate(zip(window.texts, window.changes, strict=True)):
            style: dict[str, Any] = {"ha": "center", "color": ink(change, limit)}
            axes.text(column, row - 0.02, seen(text), va="bottom", family="monospace", fontsize=9.5, **style)
            axes.text(column, row + 0.08, signed(change), va="top", fontsize=7, **style)
    axes.set_yticks(
        range(len(rows)),
        [_about(result, row, w, SMALL * float(sums[row])) for row, w in zip(rows, windows, strict=True)],
        fontsize=8,
    )
    axes.set_xticks([])
    for line in np.arange(len(rows) - 1) + 0.5:
        axes.axhline(line, color="white", linewidth=6)
    axes.figure.colorbar(
        image, ax=axes, location="bottom", shrink=0.7, aspect=40, pad=0.03,
    ).set_label("Δ log π of a token  (10⁻³ nats; red raises)", fontsize=8.5)  # fmt: skip
    axes.set_title(f"{result.name}: which tokens moved", loc="left", fontsize=10)


def _about(result: RequestResult, row: int, window: Window, total: float) -> str:
    info = result.evaluation[row]
    shown = len(window.texts)
    where = f", tokens {window.start + 1}–{window.start + shown} of {window.whole}" if shown < window.whole else ""
    return f"{plain(info.id)}  {plain(info.prompt[-16:])}\nΣ {signed(total)}{where}"


def _pair(axes: Axes, result: RequestResult, analysis: AnalysisResult, pair: dict[str, Any]) -> None:
    values = SMALL * analysis[pair["array"]].astype(float)
    image, limit = _image(axes, values)
    digits = max(2, 1 - int(np.floor(np.log10(limit))))
    rows, columns = analysis.facts["tokens"][result.row(pair["row"])], pair["column_tokens"]
    if values.size <= 80:
        _numbers(axes, values, limit, digits)
    for texts, set_ticks, set_label, name in (
        (rows, axes.set_yticks, axes.set_ylabel, pair["row"]),
        (columns, axes.set_xticks, axes.set_xlabel, pair["column"]),
    ):
        every = 1 if len(texts) <= WIDTH else -(-len(texts) // 8)
        shown = [seen(text) for text in texts] if every == 1 else [str(1 + i) for i in range(len(texts))]
        set_ticks(range(0, len(texts), every), shown[::every], family="monospace")
        set_label(f"tokens of {plain(name)}", fontsize=8)
    axes.figure.colorbar(image, ax=axes, pad=0.02).set_label("10⁻³ nats", fontsize=8)
    axes.set_title(f"what tokens did to tokens, Σ {signed(values.sum(), digits)}", loc="left", fontsize=9)


def covariates_panel(result: RequestResult, path: str | Path | None = None) -> Figure:
    """Draw correlations of changes with length, entropy, log-probability and reward, and partial ones given length.

    Args and errors as in `tokens_panel`, of the covariates.
    """
    analysis = analysis_result(result, "covariates")
    table, given = analysis.facts["correlations"], analysis.facts["given"]
    names = {"influence": "influence of the batch", "size": "its size", "realised": "realised change"}
    every = [*next(iter(table.values()))]
    panels = {"Pearson's r": ("pearson", every)}
    if rest := [name for name in every if name != given]:
        panels[f"the same, {given} taken out"] = ("partial", rest)
    drawn = figure(9, 1.5 + 0.45 * len(table))
    ratios = [len(columns) for _, columns in panels.values()]
    shown = drawn.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=ratios)[0]
    for axes, (title, (kind, columns)) in zip(shown, panels.items(), strict=True):
        cells = [[table[what][name][kind] for name in columns] for what in table]
        values = np.array([[np.nan if r is None else r for r in row] for row in cells])
        image, _ = _image(axes, values, 1.0)
        _numbers(axes, values, 1.0)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(table)), [names.get(what, what) for what in table])
        axes.set_title(title, loc="left", fontsize=9)
        if axes is shown[-1]:
            drawn.colorbar(image, ax=list(shown), pad=0.01).set_label("correlation  (no unit)", fontsize=8.5)
    title = f"{result.name}: what changes go with, over {count(len(result.evaluation), 'sequence')}"
    drawn.suptitle(title, x=0.01, ha="left", fontsize=10)
    return _clean(finish(drawn, None, 8), path)


def _image(axes: Axes, values: np.ndarray, limit: float | None = None) -> tuple[AxesImage, float]:
    """Draw cells on a symmetric colour scale; NaN is left empty."""
    from matplotlib.patches import Rectangle

    if limit is None:
        limit = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    for row, column in np.argwhere(np.isfinite(values)) if values.size <= WIDTH**2 else ():
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=PALE, linewidth=0.8))
    return axes.imshow(values, cmap=diverging(), vmin=-limit, vmax=limit, aspect="auto"), limit


def _numbers(axes: Axes, values: np.ndarray, limit: float, digits: int = 2) -> None:
    for (row, column), value in np.ndenumerate(values):
        shown, color = ("–", GREY) if np.isnan(value) else (signed(value, digits), ink(value, limit))
        axes.text(column, row, shown, ha="center", va="center", fontsize=8, color=color)


def _clean(drawn: Figure, path: str | Path | None) -> Figure:
    """Remove the frames of images, and save to `path`, if given."""
    for axes in drawn.axes:
        if axes.images:
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
    return saved(drawn, path)


def seen(text: str, most: int = 7) -> str:
    """A token as visible text: spaces and line ends have a sign."""
    visible = text.replace(" ", "␣").replace("\n", "⏎") or "∅"
    return plain(visible if len(visible) <= most else f"{visible[: most - 1]}…")
