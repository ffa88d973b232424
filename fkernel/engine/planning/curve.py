"""Work as a polynomial of a sequence's tokens."""

from __future__ import annotations

from typing import NamedTuple

from fkernel.engine.planning.work import Work


class Curve(NamedTuple):
    """Work of one sequence as a polynomial of its tokens: the Lagrange polynomial through counted points."""

    points: tuple[tuple[int, Work], ...]

    def __call__(self, t: float) -> Work:
        """Interpolate the work of a sequence of t tokens."""
        total = [0.0] * len(Work._fields)
        for i, (x, work) in enumerate(self.points):
            weight = 1.0
            for j, (other, _) in enumerate(self.points):
                if i != j:
                    weight *= (t - other) / (x - other)
            total = [sum_ + weight * value for sum_, value in zip(total, work, strict=True)]
        flops, weights, moved, calls, peak, kept = total
        return Work(flops, weights, moved, round(calls), round(peak), round(kept))
