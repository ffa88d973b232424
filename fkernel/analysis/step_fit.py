"""Least squares of a step that was taken on the columns of the step as it is described.

    Δθ_executed ≈ Σ_k a_k C_k,   C = (batch, or its parts; momentum; decay),   a = argmin ‖Δθ_executed − Σ_k a_k C_k‖
    left = ‖Δθ_executed − Σ_k a_k C_k‖ / ‖Δθ_executed‖

All that is kept of the trees are inner products of columns, in float64, added up a million coordinates at a time: no
vector of the model's size is made. A column of zeros (momentum of a first step, decay of 0) and columns that are linear
combinations of others have no coefficient of their own: None.

Standard errors are those of ordinary least squares, with a coordinate for an observation:
σ_k² = rss / (n − rank) · [(CᵀC)⁻¹]_kk. They say what rounding may do to a coefficient, not what another batch may.

Source: any text on linear regression, such as G. Golub & C. Van Loan, "Matrix computations" (2013), chapter 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from fkernel.shapes import Tensor

CHUNK = 1 << 20
"""Coordinates of a parameter that are converted to float64 at a time: 8 MiB a column."""
ALIKE = 1e-10
"""Eigenvalue of the columns' correlation matrix below which they are linearly dependent."""


class Fit(NamedTuple):
    """What least squares say of one group of parameters, or of all.

    Attributes:
        coefficients: {column: a}; None where the column is zero, or a combination of others.
        errors: {column: standard error of a}; None likewise.
        left: ‖rest‖ / ‖Δθ_executed‖, after the fit; 0 where nothing moved.
        as_described: the same with every coefficient 1: ‖Δθ_executed − step‖ / ‖Δθ_executed‖.
        norm: ‖Δθ_executed‖.
        described: ‖step‖.
        moved: of the coordinates that the step moves, the share that moved at all.
        shares: {column: ‖C‖ / ‖Δθ_executed‖}.
        sign_left: what is left of Δθ_executed after a fit on decay and on the SIGN of the batch's part: 0 where every
            weight moved by one learning rate, as in an optimizer's first step.
        rounding: of the weights to their dtype, as a share of ‖Δθ_executed‖: two roundings a coordinate, each of
            variance ulp²/12; 0 where the weights were not given.
        size: coordinates.
    """

    coefficients: dict[str, float | None]
    errors: dict[str, float | None]
    left: float
    as_described: float
    norm: float
    described: float
    moved: float
    shares: dict[str, float]
    sign_left: float
    rounding: float
    size: int


class Products:
    """Inner products of columns, of the batch's sign and of Δθ, added up over parameters.

    Attributes:
        names: of the columns; momentum and decay are the last two.
        gram: [k+2 k+2] float64; behind the columns stand the sign of the batch's part, and Δθ.
        moves: coordinates that the step moves.
        moved: those of them that moved.
        size: coordinates.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = [*names]
        self.gram = torch.zeros(len(names) + 2, len(names) + 2, dtype=torch.float64)
        self.moves = self.moved = self.size = 0
        self.rounding = 0.0

    def add(self, columns: Sequence[Tensor], executed: Tensor, weights: Tensor | None = None) -> None:
        """Add one parameter: k columns, Δθ and the weights themselves, all of its shape."""
        flat = [leaf.reshape(-1) for leaf in (*columns, executed)]
        for start in range(0, executed.numel(), CHUNK):
            *parts, y = (leaf[start : start + CHUNK].to(executed.device, torch.float64) for leaf in flat)
            sign = torch.stack(parts[:-2]).sum(0).sign()
            block = torch.stack([*parts, sign, y])
            self.gram += (block @ block.T).cpu()
            moves = torch.stack(parts).abs().sum(0) > 0
            self.moves += int(moves.sum())
            self.moved += int((moves & (y != 0)).sum())
        self.size += executed.numel()
        if weights is not None:
            ulp = torch.finfo(weights.dtype).eps * torch.frexp(weights.float()).exponent.sub(1).double().exp2()
            self.rounding += float(torch.where(weights == 0, 0.0, ulp).square().sum()) / 6

    @staticmethod
    def total(names: Sequence[str], several: Iterable[Products]) -> Products:
        """Add up those of several groups."""
        total = Products(names)
        for one in several:
            total.gram += one.gram
            total.moves, total.moved = total.moves + one.moves, total.moved + one.moved
            total.size, total.rounding = total.size + one.size, total.rounding + one.rounding
        return total

    def over(self, summed: Callable[[Tensor], Tensor]) -> None:
        """Add up those of several processes, each of other coordinates."""
        counts = torch.tensor([self.moves, self.moved, self.size, self.rounding], dtype=torch.float64)
        sums = summed(torch.cat([self.gram.flatten(), counts]))
        self.gram, (moves, moved, size, self.rounding) = sums[:-4].view_as(self.gram), sums[-4:].tolist()
        self.moves, self.moved, self.size = int(moves), int(moved), int(size)

    def fit(self) -> Fit:
        """Solve the least squares."""
        k = len(self.names)
        yy, described = float(self.gram[-1, -1]), float(self.gram[:k, :k].sum())
        a, errors, rss = _solved(self.gram[:k, :k], self.gram[:k, -1], yy, self.size)
        ones = max(0.0, yy - 2 * float(self.gram[:k, -1].sum()) + described)
        probe = torch.tensor([k - 1, k])  # decay and the batch's sign
        sign = _solved(self.gram[probe][:, probe], self.gram[probe, -1], yy, self.size)[2]
        return Fit(
            coefficients=dict(zip(self.names, a, strict=True)),
            errors=dict(zip(self.names, errors, strict=True)),
            left=_share(rss, yy),
            as_described=_share(ones, yy),
            norm=yy**0.5,
            described=max(0.0, described) ** 0.5,
            moved=self.moved / self.moves if self.moves else 0.0,
            shares={name: _share(float(self.gram[i, i]), yy) for i, name in enumerate(self.names)},
            sign_left=_share(sign, yy),
            rounding=_share(self.rounding, yy),
            size=self.size,
        )


def grouped(
    columns: Mapping[str, Mapping[str, Tensor]],
    executed: Mapping[str, Tensor],
    groups: Mapping[str, str],
    weights: Mapping[str, Tensor] | None = None,
    summed: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> tuple[Fit, dict[str, Fit]]:
    """Fit a step overall and per group of parameters.

    Args:
        columns: {column: {name: [*shape]}}; momentum and decay are the last two.
        executed: Δθ, {name: [*shape]}.
        groups: {name: group}; every name of `executed`.
        weights: θ before the step, in the dtype that was trained; None where rounding is not asked about.
        summed: adds up sums over coordinates, [k] float64, where this process has some coordinates of each leaf alone.

    Returns:
        (of all parameters, {group: of its own}), groups in the order in which their first parameter comes.

    Example:
        >>> step = {"batch": {"w": torch.tensor([1.0, 2.0])}, "momentum": {"w": torch.tensor([1.0, 0.0])},
        ...         "decay": {"w": torch.zeros(2)}}
        >>> a = grouped(step, {"w": torch.tensor([1.5, 1.0])}, {"w": "all"})[0].coefficients
        >>> round(a["batch"], 6), round(a["momentum"], 6), a["decay"]
        (0.5, 1.0, None)
    """
    products: dict[str, Products] = {}
    for name, Δ in executed.items():
        sums = products.setdefault(groups[name], Products([*columns]))
        sums.add([column[name] for column in columns.values()], Δ, None if weights is None else weights[name])
    for sums in products.values():
        sums.over(summed)
    total = Products.total([*columns], products.values())
    return total.fit(), {group: sums.fit() for group, sums in products.items()}


def _solved(gram: Tensor, right: Tensor, yy: float, n: int) -> tuple[list[float | None], list[float | None], float]:
    """Coefficients, their standard errors, and the squared norm of what is left, of least norm where columns depend."""
    sizes = gram.diagonal().sqrt()
    alive = sizes > 1e-12 * yy**0.5
    scale = torch.where(alive, sizes, 1.0)
    correlation = torch.where(alive[:, None] & alive, gram / scale[:, None] / scale, 0.0)
    values, vectors = torch.linalg.eigh(correlation)
    kept = values > ALIKE
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    a = vectors @ (inverse * (vectors.T @ (right / scale))) / scale
    rss = max(0.0, yy - 2 * float(a @ right) + float(a @ gram @ a))
    determined = alive & (vectors[:, ~kept].square().sum(1) < 1e-6)  # no part of any combination that is zero
    variance = (vectors.square() @ inverse) / scale.square() * rss / max(1, n - int(kept.sum()))
    is_known = determined.tolist()
    coefficients = [value if known else None for value, known in zip(a.tolist(), is_known, strict=True)]
    errors = [value if known else None for value, known in zip(variance.sqrt().tolist(), is_known, strict=True)]
    return coefficients, errors, rss


def _share(rss: float, yy: float) -> float:
    return (rss / yy) ** 0.5 if yy else 0.0
