"""Uncertainty of influences and ranks under resampling of prompts. No gradient is computed.

Completions of one prompt are sampled together, so prompts are the resampling units. Influences are sums over prompts,
and so are ranks:

    influence of U on e       x = Σ_g x_g,   x_g = Σ_{u in g} C_eu
    rank of u for e           x = Σ_g x_g,   x_g = #{v in g : |C_ev| > |C_eu|}

    jackknife    prompt g left out, the rest scaled to G prompts: x_(g) = G/(G−1) (x − x_g). Its standard error
                 σ = √((G−1)/G Σ_g (x_(g) − x̄_(·))²) is √(G/(G−1) Σ_g (x_g − x/G)²): of G times a mean, √G times the
                 standard deviation of the x_g
    bootstrap    x* = Σ_g n*_g x_g, where prompt g is drawn n*_g times of G, with replacement; percentiles of x*.
                 The loss's denominator is unchanged

An influence's interval is x ± t σ, with Student's t of G − 1 degrees of freedom: exact where the x_g are normal. The
bootstrap's percentiles are √((G−1)/G) narrower, and lack t's correction for an estimated σ: for normal x_g, 90%
intervals cover 50, 74 and 87 of a hundred with 2, 4 and 16 prompts.

A rank's interval is of percentiles nevertheless. They cover too little with few prompts, but t does not help: a rank is
a small count, and near the top both cover too little, however many prompts there are. It only shows how much a rank
depends on the sampled prompts.

The x_g are sums under one P, which other prompts would change as well: where v' contains g², D falls as |g| grows, and
g·D varies less than g. In a run's first step, errors under the step's own D are 20 times the standard deviation over
resampled batches. For the width take C under the P of `permutation_rms` (`fkernel.analysis.permutation_test`), centred
on the influence: with D recomputed for every resampled batch, such 90% intervals cover 89 to 97 of a hundred.

Draws are shared by all rows of a kernel, which may come in blocks. For the significance of a contribution see
`fkernel.analysis.permutation_test`.

Sources: B. Efron & R. Tibshirani, "An introduction to the bootstrap" (1993), chapters 6, 11 and 13; A. Cameron, J.
Gelbach & D. Miller, "Bootstrap-based improvements for inference with clustered errors" (2008), for groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fkernel import tree
from fkernel.analysis.student import student_quantile
from fkernel.boundary import described, public
from fkernel.errors import BatchError, NonFiniteError
from fkernel.shapes import Tensor

MOST_DRAWN = 1 << 28
"""Numbers that are drawn in all: 2 GiB, of which a few copies are made."""


class Resamplings(NamedTuple):
    """Prompts drawn with replacement, shared by all rows of a kernel.

    Attributes:
        place: [n] int64, the prompt of each sequence, 0 … G−1.
        counts: [draws G] float64, n*: how often each prompt is drawn.
    """

    place: Tensor
    counts: Tensor

    @property
    def prompts(self) -> int:
        """G."""
        return self.counts.shape[1]


class Interval(NamedTuple):
    """An estimate with its interval, [r] each.

    Attributes:
        estimate: x.
        low: lower end; x − t σ of an influence, the bootstrap's percentile of a rank.
        high: upper end.
        error: σ, the jackknife's standard error.
    """

    estimate: Tensor
    low: Tensor
    high: Tensor
    error: Tensor


class Ranks(NamedTuple):
    """Ranks of contributors to the whole of E, 0 is the largest; [n_U] float64 each.

    Attributes:
        estimate: number of larger contributors.
        low: lower end, of the bootstrap's percentiles.
        high: upper end.
    """

    estimate: Tensor
    low: Tensor
    high: Tensor


@public
def resamplings(groups: Tensor, draws: int = 1000, seed: int = 0) -> Resamplings:
    """Draw prompts with replacement, as many as there are.

    Args:
        groups: [n] int64, which prompt each sequence belongs to.
        draws: number of resamplings.
        seed: of the draws.

    Returns:
        Resamplings; draws · G numbers of eight bytes.

    Raises:
        BatchError: no sequences, or no draws.

    Example:
        >>> drawn = resamplings(torch.tensor([7, 7, 3]), draws=2)
        >>> drawn.place, drawn.counts.sum(1)
        (tensor([1, 1, 0]), tensor([2., 2.], dtype=torch.float64))
    """
    place, G = places(groups, draws)
    check_seed(seed)
    drawn = torch.randint(G, (draws, G), generator=torch.Generator().manual_seed(seed))
    return Resamplings(place, torch.zeros(draws, G).double().scatter_add_(1, drawn, torch.ones_like(drawn).double()))


def places(groups: Tensor, draws: int) -> tuple[Tensor, int]:
    """Number prompts from 0: ([n] int64, G); raise BatchError where there is nothing to draw."""
    tree.check_tensors({"groups": groups}, "prompts")
    if type(draws) is not int or groups.is_meta or groups.ndim != 1 or not len(groups) or draws < 1:
        raise BatchError(
            f"groups has shape {list(groups.shape)} and there are to be {draws} draws; expected [n], one prompt's "
            f"number a sequence, and at least one draw."
        )
    if draws * len(groups) > MOST_DRAWN:
        raise BatchError(
            f"{draws} draws of {len(groups)} sequences are {draws * len(groups):.3g} numbers; expected at most "
            f"{MOST_DRAWN:.3g}. Ask for fewer draws: 1,000 tell p-values of 0.01 apart, 100,000 of 0.0001."
        )
    names, place = torch.unique(groups.cpu(), return_inverse=True)
    return place, len(names)


def check_seed(seed: int) -> None:
    """Raise BatchError unless a seed is a whole number that torch takes."""
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise BatchError(f"seed is {described(seed)}; expected a whole number of 0 or more, below 2⁶³.")


@public
def group_sums(x: Tensor, place: Tensor, prompts: int) -> Tensor:
    """Sum the columns of each prompt.

    x_rg = Σ_{u in g} x_ru

    Args:
        x: [r n].
        place: [n] int64, the prompt of each column, such as `Resamplings.place` or part of it.
        prompts: G.

    Returns:
        [r G] float64.

    Raises:
        BatchError: not one prompt for each column.

    Example:
        >>> group_sums(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([0, 1, 0]), 2)
        tensor([[4., 2.]], dtype=torch.float64)
    """
    check_columns(x.shape[-1], place)
    return x.new_zeros(len(x), prompts, dtype=torch.float64).index_add_(1, place.to(x.device), x.double())


@public
def influence_interval(C: Tensor, draws: Resamplings, coverage: float = 0.9) -> Interval:
    """Compute intervals of influences, resampling prompts of U.

    Σ_u C_eu ± t σ_e,  P(|T| ≤ t) = coverage of Student's T with G − 1 degrees of freedom

    Args:
        C: [r n_U] contributions to some rows of E, nats.
        draws: of U's prompts; only `place` is used.
        coverage: of the interval, in (0, 1).

    Returns:
        Interval, [r] each, nats; the same in blocks of rows as in one.

    Raises:
        BatchError: fewer than two prompts, or invalid shapes or coverage.
        NonFiniteError: a contribution is not finite; it names the row.

    Example:
        >>> C = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
        >>> influence_interval(C, resamplings(torch.tensor([0, 0, 1, 1])))[1:]
        (tensor([4.], ...), tensor([4.], ...), tensor([0.], ...))
    """
    check_kernel(C, draws.place)
    _check_interval(draws, coverage)
    sums = group_sums(C, draws.place, draws.prompts)
    x, error = sums.sum(1), _jackknife(sums)
    half = student_quantile(coverage, draws.prompts - 1) * error
    return Interval(x, x - half, x + half, error)


@public
def rank_interval(C: Tensor, draws: Resamplings, top: int = 10, coverage: float = 0.9) -> tuple[Tensor, Interval]:
    """Compute intervals of the ranks of the largest contributors to each row, resampling prompts of U.

    #{v : |C_ev| > |C_eu|}: the number of contributors ahead of u, with other prompts resampled. The largest has rank 0
    in every resampling, since a bootstrap draws no new prompts; see `significance` for a test.

    Args:
        C: [r n_U] contributions, nats.
        draws: of U's prompts.
        top: number of contributors with the largest |C|.
        coverage: of the interval.

    Returns:
        (columns [r k] int64, ranks as Interval of [r k] each, of percentiles), k at most n_U; rank 0 is the largest.

    Raises:
        As `influence_interval`.

    Example:
        >>> prompts = resamplings(torch.tensor([0, 1, 2]))
        >>> columns, ranks = rank_interval(torch.tensor([[1.0, -3.0, 2.0]]), prompts, top=2)
        >>> columns, ranks.estimate, ranks.high
        (tensor([[1, 2]]), tensor([[0., 1.]], ...), tensor([[0., 2.]], ...))
    """
    check_kernel(C, draws.place)
    size = C.double().abs()
    columns = size.sort(dim=1, descending=True, stable=True).indices[:, : max(1, top)]
    # One contributor of each row at a time: [r n_U] and [draws r] in memory.
    each = [
        _bootstrapped(group_sums(size > size.gather(1, column[:, None]), draws.place, draws.prompts), draws, coverage)
        for column in columns.T
    ]
    return columns, Interval(*(torch.stack(field, 1) for field in zip(*each, strict=True)))


@public
def total_ranks(sums: Tensor, draws: Resamplings, coverage: float = 0.9) -> Ranks:
    """Compute intervals of the ranks of contributors to the whole of E, resampling prompts of E.

    The rank of |Σ_e C_eu|. `sums` may be accumulated over blocks of rows:
    `sums + group_sums(C.T, draws.place[rows], draws.prompts)`.

    Args:
        sums: [n_U G] Σ_{e in g} C_eu, nats, over the prompts of E.
        draws: of E's prompts.
        coverage: of the interval.

    Raises:
        As `influence_interval`.

    Example:
        >>> total_ranks(torch.tensor([[1.0, 1.0], [3.0, 3.0]]), resamplings(torch.tensor([0, 1]))).high
        tensor([1., 0.], dtype=torch.float64)
    """
    if sums.ndim != 2 or sums.shape[1] != draws.prompts:
        raise BatchError(f"sums has shape {list(sums.shape)} for {draws.prompts} prompts of E; expected [n_U G].")
    _check_finite(sums)
    _check_interval(draws, coverage)
    sums = sums.double()
    return Ranks(_ranks(sums.sum(1)[None])[0], *_percentiles(_ranks(draws.counts.to(sums) @ sums.T), coverage))


def _bootstrapped(sums: Tensor, draws: Resamplings, coverage: float) -> Interval:
    """Percentiles of Σ_g x_g, of x_g [r G]."""
    _check_interval(draws, coverage)
    low, high = _percentiles(draws.counts.to(sums) @ sums.T, coverage)
    return Interval(sums.sum(1), low, high, _jackknife(sums))


def _jackknife(sums: Tensor) -> Tensor:
    """σ of Σ_g x_g, of x_g [r G]."""
    G = sums.shape[1]
    return (G / (G - 1) * (sums - sums.mean(1, keepdim=True)).square().sum(1)).sqrt()


def _ranks(x: Tensor) -> Tensor:
    """Count the larger entries of the same row, [r n] float64."""
    size = x.abs()
    ahead = size.shape[1] - torch.searchsorted(size.sort(1).values, size, right=True)
    return ahead.double()


def _percentiles(drawn: Tensor, coverage: float) -> tuple[Tensor, Tensor]:
    """Central interval of [draws r], by linear interpolation; torch.quantile takes at most 16 million numbers."""
    ordered = drawn.sort(0).values
    last, tail = len(ordered) - 1, (1 - coverage) / 2

    def at(q: float) -> Tensor:
        low = min(int(q * last), max(0, last - 1))
        return torch.lerp(ordered[low], ordered[min(low + 1, last)], q * last - low)

    return at(tail), at(1 - tail)


def check_columns(n: int, place: Tensor) -> None:
    """Raise BatchError unless there is one prompt for each column."""
    if place.shape != (n,):
        raise BatchError(f"There are {n} columns and prompts of {list(place.shape)} sequences; expected one for each.")


def check_kernel(x: Tensor, place: Tensor) -> None:
    """Raise BatchError or NonFiniteError unless x is finite, [r n], of the sequences that were drawn."""
    if x.ndim != 2:
        raise BatchError(f"A kernel's rows have shape {list(x.shape)}; expected [r, n_U].")
    check_columns(x.shape[1], place)
    _check_finite(x)


def _check_finite(x: Tensor) -> None:
    if not tree.all_finite(x):
        row = int((~torch.isfinite(x)).any(1).nonzero()[0])
        raise NonFiniteError("Row {row} holds a value that is not finite; nothing was resampled.", row=row)


def _check_interval(draws: Resamplings, coverage: float) -> None:
    if draws.prompts < 2 or not 0 < coverage < 1:
        raise BatchError(
            f"There are {draws.prompts} prompt(s) and coverage is {coverage!r}; an interval needs two prompts, which "
            f"can be resampled, and a coverage in (0, 1)."
        )
