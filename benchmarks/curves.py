"""What a kernel costs as its sizes grow: time and memory against n_U, n_E, T and P, with fitted exponents, drawn."""

from __future__ import annotations

import math
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import memory
from benchmarks.models import build
from fkernel import kernel, precond

USUAL = {"shape": "width 128", "n_E": 32, "n_U": 32, "T": 64}
CURVES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "n_U": ("n_U", (32, 64, 128, 256, 512)),
    "n_E": ("n_E", (32, 64, 128, 256, 512)),
    "T": ("T", (32, 64, 128, 256, 512)),
    "P": ("shape", ("width 64", "width 128", "width 256", "width 512")),
}
QUICK = {"n_U": ("n_U", (4, 8))}


def point(shape: str, n_E: int, n_U: int, T: int, seconds: float = 1.0) -> dict[str, Any]:
    """Take the kernel of n_E × n_U sequences, without a grant: peak memory of the first call, time of further ones."""
    subject = build(shape)
    E, U = subject.batch(n_E, T, 1), subject.batch(n_U, T, 2)
    P = precond.diagonal({name: 1.0 / (leaf.abs() + 0.1) for name, leaf in subject.params.items()})
    memory._forget_peak()
    before = memory._status("VmRSS") or memory._high_water()
    times: list[float] = []

    def once() -> float:
        start = time.perf_counter()
        kernel(subject.f, subject.params, E, U, P)
        return time.perf_counter() - start

    once()
    peak = (memory._status("VmHWM") or memory._high_water()) - before
    while len(times) < 3 or sum(times) < seconds:
        times.append(once())
    return {"n_E": n_E, "n_U": n_U, "T": T, "P": subject.size, "seconds": median(times), "MB": peak}


def exponent(x: list[float], y: list[float]) -> float:
    """Fit y ∝ xᵏ: the least-squares slope of log y on log x.

    Example:
        >>> round(exponent([1.0, 10.0, 100.0], [2.0, 20.0, 200.0]), 6)
        1.0
    """
    a, b = [math.log(each) for each in x], [math.log(each) for each in y]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    along = sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True))
    return along / sum((p - mean_a) ** 2 for p in a)


def fitted(points: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Fit an exponent to each curve, of time and of memory; and to its upper half, where fixed costs are small."""
    found = {}
    for name, curve in points.items():
        x = [float(each[name]) for each in curve]
        half = len(x) // 2
        found[name] = {
            f"{what}{part}": exponent(x[start:], [each[what] for each in curve[start:]])
            for what in ("seconds", "MB")
            for part, start in (("", 0), (", upper half", min(half, len(x) - 2)))
        }
    return found


def draw(points: dict[str, list[dict[str, Any]]], exponents: dict[str, dict[str, float]], path: Path) -> None:
    """Draw all curves, time above and memory below, on logarithmic axes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure = Figure(figsize=(3.1 * len(points), 5.4), layout="constrained")
    # One scale a row: a curve that is flat looks flat.
    grid = figure.subplots(2, len(points), squeeze=False, sharey="row")
    for column, (name, curve) in enumerate(points.items()):
        for row, (what, unit) in enumerate((("seconds", "s"), ("MB", "MB"))):
            axes, x, y = grid[row][column], [each[name] for each in curve], [each[what] for each in curve]
            k = exponents[name][f"{what}, upper half"]
            axes.loglog(x, y, "o-", color="#2166ac")
            axes.loglog(x, [y[-1] * (each / x[-1]) ** k for each in x], "--", color="#555555", linewidth=1)
            axes.set_title(f"{'time' if row == 0 else 'memory'} $\\propto {name}^{{{k:.2f}}}$", fontsize=10)
            axes.set_xlabel(f"${name}$, {'parameters' if name == 'P' else 'tokens' if name == 'T' else 'sequences'}")
            axes.set_xticks(x, [f"{each / 1e6:.1f}M" if each > 1e5 else str(each) for each in x])
            axes.minorticks_off()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            if column == 0:
                axes.set_ylabel(unit)
            axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
