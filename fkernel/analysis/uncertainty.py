"""How sure an influence or a contributor's rank is, had other prompts been drawn. No gradient is computed.

Completions of one prompt are drawn together, so prompts are the units. An influence is a sum over them, and so is the
rank of a contributor, for it is how many others are ahead of it:

    influence of U on e       x = Σ_g x_g,   x_g = Σ_{u in g} C_eu
    rank of u for e           x = Σ_g x_g,   x_g = #{v in g : |C_ev| > |C_eu|}

    jackknife    prompt g left out, the rest scaled to G prompts: x_(g) = G/(G−1) (x − x_g). Its standard error
                 σ = √((G−1)/G Σ_g (x_(g) − x̄_(·))²) is √(G/(G−1) Σ_g (x_g − x/G)²): of G times a mean, √G times the
                 standard deviation of the x_g
    bootstrap    x* = Σ_g n*_g x_g, where prompt g is drawn n*_g times of G, with replacement; percentiles of x*.
                 The loss's denominator stays what it was

An influence's interval is x ± t σ, with Student's t of G − 1 degrees of freedom: exact where the x_g are normal. The
bootstrap's percentiles are √((G−1)/G) narrower, and lack what t adds for a σ that is itself estimated: of normal x_g,
those of 90% hold 50, 74 and 87 of a hundred with 2, 4 and 16 prompts.

A rank's interval is of the percentiles all the same. They have that fault with few prompts, but t is no cure there: a
rank is a small count, and near the top both hold fewer than they say, however many prompts there are. It shows how much
a rank depends on which prompts were drawn, no more.

The x_g are sums under one P, which other prompts would have changed as well: where v' holds g², D falls as |g| grows,
and g·D varies less than g. In a run's first step, errors under the step's own D are 20 times the standard deviation
of redrawn batches. Take C under the P of `permutation_rms` (`fkernel.analysis.permutation_test`) for the width, and
put it around the influence: with D recomputed for every redrawn batch, such intervals of 90% hold 89 to 97 of a
hundred.

What is drawn is drawn once for all rows of a kernel, which may then come in blocks. Whether a contribution is more than
chance is another question: `fkernel.analysis.permutation_test`.

Sources: B. Efron & R. Tibshirani, "An introduction to the bootstrap" (1993), chapters 6, 11 and 13; A. Cameron, J.
Gelbach & D. Miller, "Bootstrap-based improvements for inference with clustered errors" (2008), for groups.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch

from fkernel import tree
from fkernel.errors import BatchError, NonFiniteError
from fkernel.shapes import Tensor


class Resamplings(NamedTuple):
    """Prompts drawn with replacement, once for all rows of a kernel.

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
    """An estimate and how sure it is, [r] each.

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
        estimate: how many are ahead.
        low: lower end, of the bootstrap's percentiles.
        high: upper end.
    """

    estimate: Tensor
    low: Tensor
    high: Tensor


def resamplings(groups: Tensor, draws: int = 1000, seed: int = 0) -> Resamplings:
    """Draw prompts with replacement, as many as there are.

    Args:
        groups: [n] int64, which prompt each sequence belongs to.
        draws: how often.
        seed: of the draws.

    Returns:
        Resamplings; draws · G numbers of eight bytes.

    Raises:
        BatchError: no sequences, or no draws.

    Example:
        >>> found = resamplings(torch.tensor([7, 7, 3]), draws=2)
        >>> found.place, found.counts.sum(1)
        (tensor([1, 1, 0]), tensor([2., 2.], dtype=torch.float64))
    """
    place, G = places(groups, draws)
    drawn = torch.randint(G, (draws, G), generator=torch.Generator().manual_seed(seed))
    return Resamplings(place, torch.zeros(draws, G).double().scatter_add_(1, drawn, torch.ones_like(drawn).double()))


def places(groups: Tensor, draws: int) -> tuple[Tensor, int]:
    """Number prompts from 0: ([n] int64, how many); raise BatchError where there is nothing to draw."""
    if groups.ndim != 1 or not len(groups) or draws < 1:
        raise BatchError(
            f"groups has shape {list(groups.shape)} and there are to be {draws} draws; expected [n], one prompt's "
            f"number a sequence, and at least one draw."
        )
    names, place = torch.unique(groups.cpu(), return_inverse=True)
    return place, len(names)


def group_sums(x: Tensor, place: Tensor, prompts: int) -> Tensor:
    """Add the columns of each prompt up.

    x_rg = Σ_{u in g} x_ru

    Args:
        x: [r n].
        place: [n] int64, the prompt of each column, such as `Resamplings.place`, or that of some of the sequences.
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


def influence_interval(C: Tensor, draws: Resamplings, coverage: float = 0.9) -> Interval:
    """Estimate how sure influences are, by prompts of U.

    Σ_u C_eu ± t σ_e,  P(|T| ≤ t) = coverage of Student's T with G − 1 degrees of freedom

    Args:
        C: [r n_U] contributions to some rows of E, nats.
        draws: of U's prompts, of which only their numbers count.
        coverage: of the interval, in (0, 1).

    Returns:
        Interval, [r] each, nats; the same in blocks of rows as in one.

    Raises:
        BatchError: fewer than two prompts, or shapes or coverage that are none.
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
    while low < (middle := (low + high) / 2) < high:  # the chance rises with θ; halved until nothing lies between
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


def rank_interval(C: Tensor, draws: Resamplings, top: int = 10, coverage: float = 0.9) -> tuple[Tensor, Interval]:
    """Estimate how sure the ranks of the largest contributors to each row are, by prompts of U.

    #{v : |C_ev| > |C_eu|}: how many would be ahead of u, had the other prompts been drawn anew. The largest has none
    ahead in any redrawn batch, since a bootstrap draws no new ones: whether it is more than chance is what
    `significance` tells.

    Args:
        C: [r n_U] contributions, nats.
        draws: of U's prompts.
        top: how many contributors, those of largest |C|.
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
    # One contributor of each row at a time: [r n_U] beside [draws r], and never all of it.
    each = [
        _bootstrapped(group_sums(size > size.gather(1, own[:, None]), draws.place, draws.prompts), draws, coverage)
        for own in columns.T
    ]
    return columns, Interval(*(torch.stack(field, 1) for field in zip(*each, strict=True)))


def total_ranks(sums: Tensor, draws: Resamplings, coverage: float = 0.9) -> Ranks:
    """Estimate how sure the ranks of contributors to the whole of E are, by prompts of E.

    The rank of |Σ_e C_eu|, had other prompts been evaluated. `sums` may be added up from blocks of rows:
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
    """How many of a row are larger, [r n] float64."""
    size = x.abs()
    ahead = size.shape[1] - torch.searchsorted(size.sort(1).values, size, right=True)
    return ahead.double()


def _percentiles(drawn: Tensor, coverage: float) -> tuple[Tensor, Tensor]:
    """The middle of [draws r], between its order statistics linearly; torch's own quantile takes 16 million at most."""
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
