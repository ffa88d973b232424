"""Panels of U itself: health of the preconditioner, and structure of K_UU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fkernel.report.style import BLUE, GREY, PALETTE, RED, analysis_result, figure, finish, label, percent, plain, tail
from fkernel.study import FisherKernelResults, SequenceInfo

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 12
MARKERS = "osD^vP*X"
COORDINATES = {"unseen": "never seen\nv = 0", "below_eps": "ε decides\n√v̂ < ε", "smallest": "smallest\npercent of v"}


def health_panel(results: FisherKernelResults, path: str | Path | None = None) -> Figure:
    """Draw shares of the kernel's trace by parameter, and of coordinates with a small second moment.

    Args:
        results: of a plan that asked for U's health.
        path: where to write a PNG; None only returns the figure.

    Raises:
        ModelError: matplotlib is not installed.
        ResultsError: it was not asked for, or was skipped.
    """
    analysis = analysis_result(results, "health")
    facts = analysis.facts
    by_parameter = facts["by_parameter"]
    names = sorted(by_parameter, key=lambda name: -by_parameter[name])[:MOST]
    drawn = figure(10, 1.5 + 0.27 * max(len(names), 8))
    left, right = drawn.subplots(1, 2, width_ratios=(1.5, 1))
    left.barh(range(len(names)), [100 * by_parameter[name] for name in names], color=BLUE)
    left.set_yticks(range(len(names)), [plain(tail(name, 38)) for name in names])
    left.invert_yaxis()
    left.set_xlabel("share of the trace of K_UU  (%)", fontsize=9)
    rest = f" ({len(names)} largest of {len(by_parameter)})" if len(names) < len(by_parameter) else ""
    left.set_title(f"which parameters carry the kernel{rest}", loc="left", fontsize=10)
    sets = {name: facts[name] for name in COORDINATES if facts.get(name) is not None}
    places = np.arange(len(sets))
    for what, colour, shift, caption in (
        ("coordinates", "#a6a6a6", -0.2, f"of all {facts['coordinates']:,} coordinates"),
        ("trace", RED, 0.2, "of the trace"),
    ):
        values = [100 * share[what] for share in sets.values()]
        right.bar(places + shift, values, width=0.38, color=colour, label=caption)
        for place, value in zip(places + shift, values, strict=True):
            right.annotate(percent(value / 100), (place, value), (0, 2), textcoords="offset points",
                           ha="center", fontsize=8)  # fmt: skip
    right.set_xticks(places, [COORDINATES[name] for name in sets])
    right.set_xlim(-0.6, len(sets) - 0.4)
    right.set_ylim(0, 1.25 * max(1e-3, right.get_ylim()[1]))
    right.set_ylabel("share  (%)", fontsize=9)
    verdict = "carry the kernel" if facts["dominated"] else "do not carry the kernel"
    right.set_title(f"coordinates that are hardly known\n{verdict}", loc="left", fontsize=10)
    right.legend(frameon=False, fontsize=8.5)
    return finish(drawn, path, 8)


def structure_panel(results: FisherKernelResults, path: str | Path | None = None) -> Figure:
    """Draw U's first two principal components, coloured by cluster, and the clusters' sizes.

    Exemplars, the sequences nearest to the center of their cluster, are circled and named.

    Args and errors as in `health_panel`, of the structure.
    """
    analysis = analysis_result(results, "structure")
    facts, scores, labels = analysis.facts, analysis["scores"], analysis["labels"]
    drawn = figure(10, 5.0)
    left, right = drawn.subplots(1, 2, width_ratios=(1.6, 1))
    second = scores[:, 1] if scores.shape[1] > 1 else np.arange(len(scores), dtype=float)
    place = {name: row for row, name in enumerate(facts["ids"])}
    exemplars = [place[name] for name in facts["exemplars"]]
    for cluster in range(len(facts["sizes"])):
        of = labels == cluster
        left.scatter(scores[of, 0], second[of], s=26, alpha=0.8, linewidths=0, **_look(cluster))
    _compress(left, "x", scores[:, 0])
    _compress(left, "y", second)
    left.scatter(scores[exemplars, 0], second[exemplars], s=90, facecolor="none", edgecolor="black", linewidth=0.9)
    named = exemplars[:MOST]  # of the largest clusters
    _named(left, scores[named, 0], second[named], [plain(name) for name in facts["exemplars"][:MOST]])
    shares = [percent(share) for share in facts["shares"]]
    left.set_xlabel(f"component 1  ({shares[0]} of what varies; in units of √K)", fontsize=9)
    left.set_ylabel(f"component 2  ({shares[1]}; √K)" if len(shares) > 1 else "sequence of U", fontsize=9)
    alignment = facts.get("alignment")
    turn = "" if alignment is None else f"; alignment with K after the step {alignment:.4f}"
    left.set_title(f"what U is made of{turn}", loc="left", fontsize=10)
    _sizes(right, facts["sizes"], [results.update[row] for row in exemplars])
    right.set_title(f"clusters, named by exemplar; {percent(facts['within'])} within", loc="left", fontsize=10)
    return finish(drawn, path, 8)


def _compress(axes: Axes, axis: Literal["x", "y"], values: np.ndarray) -> None:
    """Use an asinh scale where a few values are far from all others."""
    width, most = float(np.median(np.abs(values))), float(np.abs(values).max())
    if not 0 < 10 * width < most:
        return
    decades = 10.0 ** np.arange(np.ceil(np.log10(width)), np.floor(np.log10(most)) + 1)
    scale, ticks = (axes.set_xscale, axes.set_xticks) if axis == "x" else (axes.set_yscale, axes.set_yticks)
    scale("asinh", linear_width=width)
    places = [*-decades[::-1], 0.0, *decades]
    ticks(places, [f"{place:g}".replace("-", "−") for place in places])
    ticks([], minor=True)


def _look(cluster: int) -> dict[str, str]:
    """Colour and marker of a cluster, unique for the first |palette| · |markers|."""
    turn = cluster // len(PALETTE)
    return {"color": PALETTE[cluster % len(PALETTE)], "marker": MARKERS[(cluster + turn) % len(MARKERS)]}


def _named(axes: Axes, x: np.ndarray, y: np.ndarray, names: list[str]) -> None:
    """Write names beside points, moved up until none overlaps another."""
    to_frame = axes.transData + axes.transAxes.inverted()
    frame = to_frame.transform(np.stack([x, y], 1))
    taken: list[tuple[float, float]] = []
    for row in np.argsort(y):
        across, at = (float(value) for value in frame[row])
        end, away = across > 0.8, False
        while any(abs(at - other) < 0.045 and abs(across - where) < 0.2 for where, other in taken):
            at, away = at + 0.015, True
        taken.append((across, at))
        style: dict[str, Any] = {"ha": "right" if end else "left", "va": "center", "fontsize": 8}
        style["bbox"] = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5}
        if away:
            style["arrowprops"] = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5}
        beside = (across + (-0.02 if end else 0.02), at)
        axes.annotate(names[row], (x[row], y[row]), beside, textcoords="axes fraction", **style)


def _sizes(axes: Axes, sizes: list[int], exemplars: list[SequenceInfo]) -> None:
    for cluster, size in enumerate(sizes):
        axes.barh(cluster, size, color=_look(cluster)["color"])
        axes.text(size, cluster, f" {size}", va="center", fontsize=8)
    axes.set_yticks(range(len(sizes)), [label(info, 16) for info in exemplars])
    axes.invert_yaxis()
    axes.set_xlabel("sequences of U", fontsize=9)
