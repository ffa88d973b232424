"""Pictures of a run's account: when its probes moved, and who moved them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fkernel.analysis import turning_points
from fkernel.report.run_tables import is_told_apart, probe_text, sequence_text
from fkernel.report.style import BLUE, GREY, PALE, PALETTE, RED, diverging, figure, finish, largest, plain
from fkernel.report.table import CHANCE
from fkernel.report.units import unit_of
from fkernel.study import AccountResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REST = 0.02
"""Share of the largest running sum that decay and the rest must reach to be drawn."""
MANY = 2000
"""Sequences from which on dots are small."""
LABELS = 40
"""Rows of a heatmap with a label each."""
BESIDE = (("grad_norm", "‖∇L‖"), ("loss", "loss"))
"""Facts of a step that are drawn below its timeline: the first that there is."""
SIGNS = ((-1, BLUE), (1, RED))


def timeline(results: AccountResults, probe: str | int, path: str | Path | None = None) -> Figure:
    """Draw how a probe changed over the run: the running sum, and what steps' own gradients and momentum did of it.

    A diamond is the change that was measured; steps after which the sum turned are marked. Below are each step's
    change, and, where they are known, ‖∇L‖ (or the loss) and the mean reward.

    Args:
        results: the account.
        probe: its id, or position.
        path: where to write a PNG; None only returns the figure.

    Raises:
        ModelError: matplotlib is not installed.
        ResultsError: there is no such probe.
    """
    e, unit, steps = results.row(probe), unit_of(results), _steps(results)
    below = _beside(results)
    drawn = figure(9.5, 4.8 + 0.9 * len(below))
    top, middle, *panels = drawn.subplots(2 + len(below), 1, sharex=True, height_ratios=[3.2, 1.1, *[0.8] * len(below)])
    lines = {name: unit.scale * results[name][e].astype(float) for name in ("by_step", "own", "momentum")}
    rest = lines["by_step"] - lines["own"] - lines["momentum"]
    _running(top, steps, lines["own"], color=PALETTE[0], label="by the steps' own gradients")
    _running(top, steps, lines["momentum"], color=PALETTE[1], label="by momentum")
    if np.abs(rest.cumsum()).max() > REST * np.abs(lines["by_step"].cumsum()).max():
        _running(top, steps, rest, color=PALETTE[2], label="by decay and the rest")
    _running(top, steps, lines["by_step"], color="black", linewidth=2.0, label="all of it")
    diamond = {"marker": "D", "s": 34, "color": "black", "edgecolor": "white", "linewidth": 0.8, "zorder": 4}
    top.scatter(steps[-1:], [unit.scale * float(results["realised"][e])], label="measured", clip_on=False, **diamond)
    top.axhline(0, color=GREY, linewidth=0.8)
    _turns(top, steps, lines["by_step"])
    top.set_ylabel(f"change so far\n({unit.name})", fontsize=8)
    _headline(drawn, probe_text(results, e, 70))
    drawn.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    _signed_bars(middle, steps, lines["by_step"])
    middle.set_ylabel("in the step", fontsize=8)
    for axes, (name, values) in zip(panels, below.items(), strict=True):
        _dotted(axes, steps, values, color=GREY, linewidth=1.0)
        axes.set_ylabel(name, fontsize=8)
    _step_axis(drawn.axes[-1], steps, begun=True)
    return _finished(drawn, path)


def rewards_timeline(results: AccountResults, probe: str | int, path: str | Path | None = None) -> Figure:
    """Draw the running sum of what each reward function did to a probe, by the step that trained on it.

    Other than in `timeline`, what a step's sequences did later by momentum counts for that step.

    Args and errors as in `timeline`; and ResultsError where contributions are not split by reward function.
    """
    return _split(results, probe, results["rewards"], results.facts["reward_functions"], "by reward function", path)


def parts_timeline(results: AccountResults, probe: str | int, path: str | Path | None = None) -> Figure:
    """Draw the running sum of what each part of the loss did to a probe, as `rewards_timeline` does.

    Args and errors as in `timeline`; and ResultsError where the loss's parts are not told apart.
    """
    return _split(results, probe, results["parts"], results.facts["parts"], "by part of the loss", path)


def _split(
    results: AccountResults, probe: str | int, values: np.ndarray, names: list[str], how: str, path: str | Path | None
) -> Figure:
    e, unit, steps = results.row(probe), unit_of(results), _steps(results)
    drawn = figure(9.5, 4.2)
    axes, values = drawn.subplots(), unit.scale * values[e].astype(float)
    for r, name in enumerate(names):
        style = {"color": PALETTE[r % len(PALETTE)], "linestyle": ("-", "--", ":")[r // len(PALETTE) % 3]}
        total = unit(values[:, r].sum() / unit.scale)
        _running(axes, steps, values[:, r], label=plain(f"{name}  {total}"), **style)
    if len(names) > 1:
        _running(axes, steps, values.sum(1), color="black", linewidth=2.0, label="together")
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_ylabel(f"sum of contributions  ({unit.name})", fontsize=8)
    _headline(drawn, f"{probe_text(results, e, 60)}: {how}")
    _step_axis(axes, steps, begun=True, what="step that trained on it")
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return _finished(drawn, path)


def run_heatmap(results: AccountResults, path: str | Path | None = None) -> Figure:
    """Draw the change of every probe in every step, and beside it the whole change.

    The colour scale is symmetric, up to the 99.5th percentile, so that one large entry does not fade the others.

    Args and errors as in `timeline`.
    """
    unit, steps, n = unit_of(results), _steps(results), len(results.probes)
    values = unit.scale * results["by_step"].astype(float)
    limit = float(np.percentile(np.abs(values), 99.5)) or float(np.abs(values).max()) or 1.0
    drawn = figure(11, 2.4 + min(0.26 * n, 7.5))
    left, right = drawn.subplots(1, 2, sharey=True, width_ratios=(6, 1))
    extent = (steps[0] - 0.5, steps[-1] + 0.5, n - 0.5, -0.5)
    style: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest", "extent": extent}
    image = left.imshow(values, cmap=diverging(), vmin=-limit, vmax=limit, **style)
    extend = "both" if np.abs(values).max() > limit else "neither"
    bar = drawn.colorbar(image, ax=[left, right], extend=extend, pad=0.01, aspect=5 * drawn.get_figheight())
    bar.set_label(f"change in the step\n({unit.name}; red raises)", fontsize=8)
    every = -(-n // LABELS)
    shown = range(0, n, every)
    left.set_yticks(shown, [plain(probe_text(results, e, 24)) for e in shown])
    _step_axis(left, steps)
    _signed_bars(right, np.arange(n), unit.scale * results["realised"].astype(float), across=True)
    right.set_xlabel(f"over the run\n({unit.name})", fontsize=8)
    _headline(drawn, f"When each of {n} probes moved" if n > 1 else "When the probe moved")
    right.tick_params(axis="y", length=0, labelleft=False)
    return _finished(drawn, path)


def culprit_bars(results: AccountResults, probe: str | int, k: int = 12, path: str | Path | None = None) -> Figure:
    """Draw the sequences of the run that moved a probe most, with their steps, texts and rewards.

    Args and errors as in `timeline`; k: sequences.
    """
    e, unit = results.row(probe), unit_of(results)
    rows, shares = {row["id"]: row for row in results.sequences}, results.top_sequences(e, k, group_identical=True)
    values = np.array([unit.scale * share.value for share in shares])
    marked = [is_told_apart(share) for share in shares]
    drawn = figure(9.5, 1.6 + 0.27 * len(shares))
    axes = drawn.subplots()
    _signed_bars(axes, np.arange(len(shares)), values, across=True)
    labels = [_sequence_label(rows[share.id], 46) for share in shares]
    many = [f" × {share.times}" if share.times > 1 else "" for share in shares]
    axes.set_yticks(range(len(shares)), [label + times for label, times in zip(labels, many, strict=True)])
    axes.set_ylim(max(len(shares), 1) - 0.4, -0.6)
    for place, share in enumerate(shares):
        value = share.value
        side: dict[str, Any] = {"ha": "right" if value < 0 else "left", "va": "center", "fontsize": 7}
        aside = (-3 if value < 0 else 3, 0)
        mark = "*" if marked[place] else ""
        axes.annotate(unit(value) + mark, (values[place], place), aside, textcoords="offset points", **side)
    axes.margins(x=0.14)
    chance = f";  * told apart from chance (p ≤ {CHANCE})" if any(marked) else ""
    axes.set_xlabel(f"contribution to the end of the run  ({unit.name}; red raises){chance}", fontsize=8)
    _headline(drawn, f"{probe_text(results, e, 60)}: who moved it most")
    return _finished(drawn, path)


def influence_over_steps(
    results: AccountResults, probe: str | int, k: int = 8, path: str | Path | None = None
) -> Figure:
    """Draw what every sequence of the run did to a probe, a dot each, over the step that trained on it.

    Dots of a step lie side by side. Their colour is the advantage, or else the reward, or else for and against; grey
    where a sequence has none. The largest are numbered, and named on the right.

    Args and errors as in `timeline`; k: sequences that are named.
    """
    e, unit, steps = results.row(probe), unit_of(results), _steps(results)
    y, x = unit.scale * results["contributions"][e].astype(float), _side_by_side(results.step_of)
    drawn = figure(11.5, 4.6)
    left, right = drawn.subplots(1, 2, width_ratios=(3, 1.25))
    colour, limits, caption = _colours(results, y)
    known = np.isfinite(colour)
    size: dict[str, Any] = {"edgecolors": GREY, "s": 16, "linewidths": 0.3}
    size |= {"s": 6, "linewidths": 0.1} if len(y) >= MANY else {}
    left.scatter(x[~known], y[~known], color=PALE, **size)
    dots = left.scatter(x[known], y[known], c=colour[known], cmap=diverging(), vmin=limits[0], vmax=limits[1], **size)
    left.axhline(0, color=GREY, linewidth=0.8, zorder=0)
    if caption:
        drawn.colorbar(dots, ax=left, pad=0.01, aspect=30).set_label(caption, fontsize=8)
    right.set_axis_off()
    order = largest(y, k)
    for place, u in enumerate(order, 1):
        beside: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "ha": "left", "va": "center"}
        left.annotate(str(place), (x[u], y[u]), (4, 0), **beside)
        text = f"{place}  {unit(y[u] / unit.scale)}  {_sequence_label(results.sequences[u], 26)}"
        right.text(0.0, 1 - place / (k + 1), text, fontsize=7, transform=right.transAxes, va="center")
    left.set_ylabel(f"contribution to the end of the run  ({unit.name})", fontsize=8)
    _headline(drawn, f"{probe_text(results, e, 60)}: what every sequence did")
    _step_axis(left, steps, what="step that trained on it")
    return _finished(drawn, path)


def _steps(results: AccountResults) -> np.ndarray:
    return np.array([row["step"] for row in results.steps])


def _headline(drawn: Figure, text: str) -> None:
    drawn.suptitle(plain(text), x=0.01, ha="left", fontsize=10)


def _finished(drawn: Figure, path: str | Path | None) -> Figure:
    """Finish a picture of any texts: a character that the font lacks is a box, without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        return finish(drawn, path)


def _sequence_label(row: dict[str, Any], most: int) -> str:
    """The text and reward of a sequence of the run, its step and id."""
    text, reward = sequence_text(row["prompt"], row["response"], most), row["reward"]
    given = "" if reward is None else f"  r = {reward:.3g}".replace("-", "−")
    return plain(f"{text}{given}  step {row['step']}  {row['id'].rpartition('/')[2]}")


def _running(axes: Axes, steps: np.ndarray, values: np.ndarray, **style: Any) -> None:
    """A running sum, from zero before the first step."""
    places = np.concatenate([steps[:1] - 1, steps])
    _dotted(axes, places, np.concatenate([[0.0], values.cumsum()]), **{"linewidth": 1.3, **style})


def _dotted(axes: Axes, places: np.ndarray, values: np.ndarray, **style: Any) -> None:
    """A line, with a dot for each step where there are few."""
    axes.plot(places, values, marker="." if len(places) < 80 else "", markersize=5, **style)


def _turns(axes: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    """Mark the steps after which a running sum turned, with their numbers above where there is room."""
    room, named = 0.04 * (steps[-1] - steps[0]), -np.inf
    for count, i in enumerate(turning_points(values.tolist())):
        caption = "_" if count else "turned after the step"  # one of them is in the legend
        axes.axvline(steps[i], color=GREY, linewidth=0.8, linestyle=":", label=caption)
        if steps[i] - named > room:
            style: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
            axes.text(steps[i], 1.01, str(steps[i]), color=GREY, fontsize=7, **style)
            named = steps[i]


def _signed_bars(axes: Axes, places: np.ndarray, values: np.ndarray, across: bool = False) -> None:
    """Bars in the colour of their sign."""
    for sign, colour in SIGNS:
        there = sign * values > 0
        (axes.barh if across else axes.bar)(places[there], values[there], 0.8, color=colour)
    (axes.axvline if across else axes.axhline)(0, color=GREY, linewidth=0.8)


def _step_axis(axes: Axes, steps: np.ndarray, begun: bool = False, what: str = "step") -> None:
    """Whole numbers of steps; with `begun`, from the start before the first."""
    from matplotlib.ticker import MaxNLocator

    first, last = steps[0], steps[-1]
    axes.set_xlim(first - (1.2 if begun else 0.5), last + 0.5)
    ticks = [x for x in MaxNLocator(12, integer=True, min_n_ticks=1).tick_values(first, last) if first <= x <= last]
    ticks = ticks or [first]
    if begun:  # where there is room for it
        ticks = [first - 1, *(x for x in ticks if x - first + 1 > 0.04 * (last - first))]
    axes.set_xticks(ticks, [f"{x:.0f}" if x >= first else "start" for x in ticks])
    axes.set_xlabel(what, fontsize=8)


def _beside(results: AccountResults) -> dict[str, np.ndarray]:
    """What is known of every step beside the probe: ‖∇L‖ or the loss, and the mean reward."""
    known = dict[str, np.ndarray]()
    for key, name in BESIDE:
        values = np.array([row.get(key) for row in results.steps], dtype=float)
        if not known and np.isfinite(values).any():
            known[name] = values
    rewards = np.array([row["reward"] for row in results.sequences], dtype=float)
    if np.isfinite(rewards).any():
        step_of = results.step_of
        by_step = [rewards[(step_of == step) & np.isfinite(rewards)] for step in _steps(results)]
        known["mean\nreward"] = np.array([values.mean() if len(values) else np.nan for values in by_step])
    return known


def _side_by_side(step_of: np.ndarray) -> np.ndarray:
    """Places of dots, spread over their step in the order of its sequences."""
    places = step_of.astype(float)
    for step in np.unique(step_of):
        of_step = np.flatnonzero(step_of == step)
        places[of_step] += (np.arange(len(of_step)) + 0.5) / len(of_step) * 0.8 - 0.4
    return places


def _colours(results: AccountResults, y: np.ndarray) -> tuple[np.ndarray, tuple[float, float], str]:
    """Values to colour dots by, their limits and what they are; their signs where nothing is known."""
    for name in ("advantage", "reward"):
        values = np.array([row[name] for row in results.sequences], dtype=float)
        if np.isfinite(values).any():
            limit = float(np.nanmax(np.abs(values))) or 1.0
            return values, (-limit, limit), name
    return np.sign(y), (-2.0, 2.0), ""
