"""Statistics of a kernel: pure functions of K, weights and norms.

    cosine          K_eu / √(K_ee K_uu)                      the angle in the metric of P
    effective rank  exp(−Σ_i p_i log p_i),  p_i = λ_i / Σ λ  how many directions the update batch spans
    participation   (Σ λ)² / Σ λ²                            the same, with less weight on small eigenvalues

Source: O. Roy & M. Vetterli, "The effective rank" (2007), for the first; the participation ratio is Bell & Dean's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from fkernel.shapes import Tensor


class Spectrum(NamedTuple):
    """Eigenvalues of K_UU, largest first, and their effective number.

    Attributes:
        eigenvalues: [n] float64, units of K.
        effective_rank: exp of their entropy.
        participation: (Σ λ)² / Σ λ².
    """

    eigenvalues: Tensor
    effective_rank: float
    participation: float


class Blocks(NamedTuple):
    """The kernel within prompts and across them: mean K, mean |cosine|, and the number of entries; None for no entries.

    Entries are of different sequences: a sequence with itself gives its squared norm, which would bias the first mean.

    Attributes:
        same_prompt: [mean K, mean |cosine|, entries] of pairs that share a prompt.
        cross_prompt: the same of the others.
    """

    same_prompt: tuple[float | None, float | None, int]
    cross_prompt: tuple[float | None, float | None, int]


def cosines(K: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Compute the cosines of a kernel's entries.

    Args:
        K: [n m].
        rows: K_ee, [n].
        columns: K_uu, [m].

    Returns:
        [n m] in [−1, 1]; 0 where a gradient is zero.

    Example:
        >>> cosines(torch.tensor([[3.0, 0.0]]), torch.tensor([9.0]), torch.tensor([4.0, 0.0]))
        tensor([[0.5000, 0.0000]], dtype=torch.float64)
    """
    scale = rows.double().clamp_min(0).sqrt()[:, None] * columns.double().clamp_min(0).sqrt()
    return torch.where(scale > 0, K.double() / scale, 0.0).clamp(-1, 1)


def spectrum(K: Tensor) -> Spectrum:
    """Compute the eigenvalues of a symmetric positive semi-definite kernel.

    Example:
        >>> spectrum(torch.eye(4)).effective_rank
        4.0
    """
    eigenvalues = torch.linalg.eigvalsh(K.double()).flip(0)
    positive = eigenvalues.clamp_min(0)
    total = positive.sum()
    if not bool(total > 0):
        return Spectrum(eigenvalues, 0.0, 0.0)
    p = positive / total
    entropy = -torch.special.xlogy(p, p).sum()
    return Spectrum(
        eigenvalues, round(float(entropy.exp()), 9), round(float(total.square() / positive.square().sum()), 9)
    )


def top_contributors(C: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k columns of largest |C| in each row, largest first.

    Args:
        C: [n m] contributions.
        k: how many.

    Returns:
        (columns [n k] int64, contributions [n k]); k is at most m.

    Example:
        >>> top_contributors(torch.tensor([[0.1, -0.3, 0.2]]), 2)
        (tensor([[1, 2]]), tensor([[-0.3000,  0.2000]]))
    """
    order = C.abs().sort(dim=1, descending=True, stable=True).indices[:, :k]
    return order, C.gather(1, order)


class BlockTally:
    """Accumulates `Blocks` over blocks of rows of the kernel."""

    def __init__(self) -> None:
        """Start at 0."""
        self._sums = torch.zeros(2, 3, dtype=torch.float64)

    def add(self, K: Tensor, cosine: Tensor, same: Tensor) -> None:
        """Add pairs of different sequences: K, their cosines, and whether each pair shares a prompt; of one shape."""
        for i, chosen in enumerate((same, ~same)):
            self._sums[i] += torch.stack([K.double()[chosen].sum(), cosine[chosen].abs().sum(), chosen.sum().double()])

    @property
    def blocks(self) -> Blocks:
        """The means."""
        return Blocks(*(self._mean(*row) for row in self._sums.tolist()))

    @staticmethod
    def _mean(K: float, cosine: float, entries: float) -> tuple[float | None, float | None, int]:
        return (K / entries, cosine / entries, int(entries)) if entries else (None, None, 0)


def grouped(values: np.ndarray, keys: Sequence[str]) -> tuple[list[int], list[float], list[int]]:
    """Add up values that have one key: the place of its first one, the sum, how many there are; in the keys' order.

    Args:
        values: [n].
        keys: [n].

    Example:
        >>> grouped(np.array([1.0, 2.0, 4.0]), ["a", "b", "a"])
        ([0, 1], [5.0, 2.0], [2, 1])
    """
    first, sums, counts = dict[str, int](), dict[str, float](), Counter[str]()
    for place, (key, value) in enumerate(zip(keys, values.tolist(), strict=True)):
        first.setdefault(key, place)
        sums[key] = sums.get(key, 0.0) + value
        counts[key] += 1
    return [*first.values()], [sums[key] for key in first], [counts[key] for key in first]
