"""What a comparison with a peer comes to: the ratio of the times, and whether both computed the same K."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from benchmarks.ratios import Ratio

AGREEMENT = 1e-5
"""Relative difference up to which two fp32 kernels are the same."""


class Comparison(NamedTuple):
    """One peer at one size.

    Attributes:
        peer: its name.
        sizes: {name: number}, as the reader of the file needs them.
        theirs: the peer's times, the side that is divided by.
        ours: this library's.
        rounds: how many times each was timed.
        target: the largest ratio ours/theirs that the project asks for, or None.
        difference: ‖K_ours − K_theirs‖ / ‖K_theirs‖.
        notes: what else was measured with it, {name: value}.
    """

    peer: str
    sizes: dict[str, Any]
    theirs: Ratio
    ours: Ratio
    rounds: int
    target: float | None
    difference: float
    notes: dict[str, Any]

    @property
    def agrees(self) -> bool:
        """Whether both sides computed the same K; without that no time means anything."""
        return self.difference <= AGREEMENT

    @property
    def met(self) -> bool | None:
        """Whether the target was met by a K that agrees; None where there is no target."""
        return None if self.target is None else self.agrees and self.ours.ratio <= self.target

    def as_record(self) -> dict[str, Any]:
        """Lay it out for the committed file."""
        return {
            "peer": self.peer,
            "sizes": self.sizes,
            "their_seconds": rounded(self.theirs.seconds),
            "our_seconds": rounded(self.ours.seconds),
            "ratio": rounded(self.ours.ratio),
            "ratio_range": [rounded(self.ours.least), rounded(self.ours.most)],
            "times_faster": rounded(1 / self.ours.ratio),
            "rounds": self.rounds,
            "target": self.target,
            "met": self.met,
            "difference_of_K": rounded(self.difference),
            "agrees": self.agrees,
            **self.notes,
        }


def relative_difference(x: Tensor, reference: Tensor) -> float:
    """‖x − reference‖ / ‖reference‖ (Frobenius), in float64.

    Raises:
        ValueError: shapes differ, or a value is not finite, or the reference is zero: nothing can be compared then.

    Example:
        >>> import torch
        >>> relative_difference(torch.tensor([[3.0, 5.0]]), torch.tensor([[3.0, 4.0]]))
        0.2
    """
    if x.shape != reference.shape:
        raise ValueError(f"The kernels have shapes {list(x.shape)} and {list(reference.shape)}; expected the same.")
    difference = float((x.double() - reference.double()).norm() / reference.double().norm())
    if not difference < float("inf"):
        raise ValueError("A kernel is not finite, or the reference is zero; nothing can be compared.")
    return difference


def rounded(value: float) -> float:
    """Keep four digits: more would be noise."""
    return float(f"{value:.4g}")
