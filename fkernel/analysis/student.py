"""Quantiles of Student's t, in closed form."""

from __future__ import annotations

import math
from functools import cache


@cache
def student_quantile(coverage: float, freedom: int) -> float:
    """Find t with P(|T| ≤ t) = coverage, of Student's T.

    With θ = arctan(t/√ν) and ν degrees of freedom, the chance is a finite sum:

        (2/π) (θ + sin θ cos θ (1 + 2/3 cos²θ + (2·4)/(3·5) cos⁴θ + …))      ν odd, (ν−1)/2 terms
        sin θ (1 + 1/2 cos²θ + (1·3)/(2·4) cos⁴θ + …)                        ν even, ν/2 terms

    Args:
        coverage: in (0, 1).
        freedom: ν, 1 or more.

    Example:
        >>> round(student_quantile(0.9, 1), 3), round(student_quantile(0.9, 15), 3)
        (6.314, 1.753)

    Source: M. Abramowitz & I. Stegun, "Handbook of mathematical functions" (1964), 26.7.3 and 26.7.4.
    """
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:  # bisection: the probability increases with θ
        low, high = (middle, high) if _student_chance(middle, freedom) < coverage else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _student_chance(theta: float, freedom: int) -> float:
    """P(|T| ≤ √ν tan θ)."""
    odd, square = freedom % 2, math.cos(theta) ** 2
    term, total = 1.0, 0.0
    for j in range(1, freedom // 2 + 1):
        total += term
        term *= square * ((2 * j) / (2 * j + 1) if odd else (2 * j - 1) / (2 * j))
    if odd:
        return 2 / math.pi * (theta + math.sin(theta) * math.cos(theta) * total)
    return math.sin(theta) * total
