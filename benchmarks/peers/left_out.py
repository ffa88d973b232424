"""How much of the truth lies outside of the modules that a peer covers: shares of θ, of ‖g‖² and of K."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks.limits import chunks
from benchmarks.peers.comparison import relative_difference
from benchmarks.peers.our_side import Ours, load
from fkernel import func

MICROBATCH = 8


class LeftOut(NamedTuple):
    """Shares between 0 and 1 (that of K may exceed 1).

    Attributes:
        parameters: of the number of parameters.
        gradient: of Σ_x ‖∇S(x)‖², over E and U.
        kernel: ‖K − K_covered‖ / ‖K‖, K over all parameters.
    """

    parameters: float
    gradient: float
    kernel: float


def left_out(folder: Path, covered: Collection[str]) -> LeftOut:
    """Measure what a peer that covers some parameters leaves out, by this library's gradients of all of them.

    Args:
        folder: as `benchmarks.peers.case.write` leaves it.
        covered: names of the parameters that the peer covers.
    """
    everything, part = load(folder), load(folder, [*covered])
    return LeftOut(
        parameters=share_outside({name: leaf.numel() for name, leaf in everything.subject.params.items()}, covered),
        gradient=share_outside(squares(everything), covered),
        kernel=relative_difference(part.kernel(), everything.kernel()),
    )


def squares(ours: Ours) -> dict[str, float]:
    """Σ_x ‖∇S(x)‖² over E and U, parameter by parameter."""
    J = func.per_sequence_grad(ours.subject.f, MICROBATCH)
    total = dict.fromkeys(ours.subject.params, 0.0)
    for batch in (ours.E, ours.U):
        for chunk in chunks(batch, MICROBATCH):
            for name, rows in J(ours.subject.params, chunk).items():
                total[name] += float(rows.double().square().sum())
    return total


def share_outside(amounts: Mapping[str, float], covered: Collection[str]) -> float:
    """Say which share of a total belongs to the names that are not covered.

    Raises:
        ValueError: a covered name is not among them: it would count as covered although nobody knows it.

    Example:
        >>> share_outside({"table": 1.0, "q": 2.0, "k": 1.0}, ["q", "k"])
        0.25
    """
    unknown = sorted({*covered} - {*amounts})
    if unknown:
        raise ValueError(f"The peer covers {unknown}, which the model lacks; it has {[*amounts]}.")
    return 1 - sum(amounts[name] for name in covered) / sum(amounts.values())
