"""Shares of a kernel's trace: does it depend on coordinates with little or no optimizer statistics?

Where v is tiny, D = 1/(√v̂+ε) is huge, and a few such coordinates can dominate the kernel. For three sets of
coordinates, their number and their share of the trace are reported:

    unseen      v = 0                       no gradient ever, or one that underflowed
    below ε     √v̂ < ε,  v̂ = v/(1−β2^t)     where ε determines D
    smallest    the smallest percent of v

    trace(K) = Σ_n ⟨g_n, P g_n⟩ = Σ_α P_α Σ_n g_nα²

A typical set has a share of the trace equal to its share of coordinates. The k-th smallest v is selected exactly, by
its bits: floats ≥ 0 order as their bits do, so two histograms of 2¹⁶ bins suffice. v is read three times in all, a
shard at a time, and never copied. A v in more than float32 is ordered as float32.

Source: D. Knuth, "The Art of Computer Programming" 3, §5.2.5, for selection by digits.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fkernel import tree
from fkernel.boundary import public
from fkernel.errors import OptimizerStateError, PreconditionerWarning
from fkernel.precond import AdamWState, check_covers
from fkernel.shapes import Tensor, Tree

DOMINATED = 0.5
"""Share of the trace above which a set of coordinates dominates the kernel."""


class Share(NamedTuple):
    """Size of a set of coordinates and its share of the trace, in [0, 1] each.

    Attributes:
        coordinates: share of all coordinates.
        trace: share of trace(K).
    """

    coordinates: float
    trace: float


class Health(NamedTuple):
    """Shares of a kernel's trace by sets of coordinates.

    Attributes:
        coordinates: their number.
        unseen: those with v = 0.
        below_eps: those with √v̂ < ε; None at step 0, where v̂ is undefined. Parameters at step 0 are not counted.
        smallest: the requested share with the smallest v; ties at the threshold count with their mean.
        by_parameter: {name: share of trace(K)}.
        dominated: whether `smallest`, or, after step 0, `unseen`, has more than half of the trace.
    """

    coordinates: int
    unseen: Share
    below_eps: Share | None
    smallest: Share
    by_parameter: dict[str, float]
    dominated: bool


@public
def health(state: AdamWState, diagonal: Tree, squares: Tree, smallest: float = 0.01) -> Health:
    """Compute which coordinates a kernel's trace comes from, and warn if those with little data dominate.

    Before the first step v is 0 everywhere and all coordinates are equal, so there is no warning.

    Args:
        state: AdamW's before the step.
        diagonal: P ≥ 0, {name: [*shape]}, such as `adamw_response(…).d`.
        squares: Σ_n g_n², {name: [*shape]}, `func.squared_sum` of the kernel's sequences.
        smallest: share of coordinates in the set `smallest`, at least one.

    Returns:
        Health; shares of a trace that is zero are zero.

    Raises:
        OptimizerStateError: smallest is not between 0 and a half.
        TreeError: the trees are of other parameters.
        NonFiniteError: P or the squares hold NaN or infinity.

    Warns:
        PreconditionerWarning: the kernel is dominated, with the numbers.

    Example:
        >>> from fkernel.precond import adamw_init
        >>> state = adamw_init({"w": torch.zeros(4)}, lr=0.1)
        >>> health(state, {"w": torch.ones(4)}, {"w": torch.ones(4)}, smallest=0.25).smallest
        Share(coordinates=0.25, trace=0.25)
    """
    if not 0 < smallest < DOMINATED:
        raise OptimizerStateError(
            f"smallest is {smallest!r}; expected a share of the coordinates, in (0, {DOMINATED})."
        )
    for what, given in (("the diagonal", diagonal), ("squares", squares)):
        check_covers(state, list(given), given, what)
    total = tree.size(state.exp_avg_sq)
    k = max(1, int(smallest * total))
    counts, sums, trace = _tally(state, diagonal, squares, _threshold(state, k))
    total_trace = sum(trace.values())
    if not total_trace < float("inf"):
        tree.check_finite(diagonal, "the diagonal")
        tree.check_finite(squares, "squares")
    unseen, below, under, ties = (Share(n / total, s / (total_trace or 1.0)) for n, s in zip(counts, sums, strict=True))
    carried = under.trace + ties.trace * (k - counts[2]) / counts[3]
    past = any(state.step.values())
    shares = Health(
        coordinates=total,
        unseen=unseen,
        below_eps=below if past else None,
        smallest=Share(k / total, carried),
        by_parameter={name: s / (total_trace or 1.0) for name, s in trace.items()},
        dominated=carried > DOMINATED or (past and unseen.trace > DOMINATED),
    )
    if shares.dominated:
        warnings.warn(_advice(shares), PreconditionerWarning, stacklevel=2)
    return shares


def _shards(state: AdamWState) -> Iterator[tuple[str, slice, Tensor]]:
    """Iterate over v in shards: (name, range of the flattened leaf, [p])."""
    for name, leaf in state.exp_avg_sq.items():
        flat = leaf.reshape(-1)
        for start in range(0, len(flat), tree.SHARD_COLUMNS):
            rows = slice(start, start + tree.SHARD_COLUMNS)
            yield name, rows, flat[rows]


def _tally(
    state: AdamWState, diagonal: Tree, squares: Tree, threshold: int
) -> tuple[list[int], list[float], dict[str, float]]:
    """Count coordinates that are unseen, below ε, below the threshold, at it; sum P Σ g² of each set and parameter."""
    counts, sums, trace = [0] * 4, [0.0] * 4, dict.fromkeys(state.names, 0.0)
    for name, rows, v in _shards(state):
        carried = diagonal[name].reshape(-1)[rows].double() * squares[name].reshape(-1)[rows].double()
        key = _key(v)
        for i, chosen in enumerate((v == 0, _below(state, name, v), key < threshold, key == threshold)):
            counts[i] += int(chosen.sum())
            sums[i] += float(carried @ chosen.double())
        trace[name] += float(carried.sum())
    return counts, sums, trace


def _below(state: AdamWState, name: str, v: Tensor) -> Tensor:
    """Whether √v̂ < ε, [p]; nowhere at step 0, where v̂ is 0/0."""
    t = state.step[name]
    if t == 0:
        return torch.zeros_like(v, dtype=torch.bool)
    return (v.double() / (1 - state.beta2[name] ** t)).sqrt() < state.eps[name]


def _key(v: Tensor) -> Tensor:
    """Return the bits of v ≥ 0, [p] int32, in the same order; abs maps −0 to 0."""
    return v.float().abs().view(torch.int32)


def _threshold(state: AdamWState, k: int) -> int:
    """Return the key of the k-th smallest v: its upper sixteen bits first, then the lower ones."""
    upper = sum(torch.bincount(_key(v) >> 16, minlength=1 << 16) for _, _, v in _shards(state))
    first, before = _digit(torch.as_tensor(upper), k)
    keys = (_key(v) for _, _, v in _shards(state))
    lower = sum(torch.bincount(key[key >> 16 == first] & 0xFFFF, minlength=1 << 16) for key in keys)
    return first << 16 | _digit(torch.as_tensor(lower), k - before)[0]


def _digit(counts: Tensor, k: int) -> tuple[int, int]:
    """Return the bin of the k-th smallest, and the count in smaller bins."""
    reached = counts.cumsum(0)
    digit = int((reached < k).sum())
    return digit, int(reached[digit] - counts[digit])


def _advice(shares: Health) -> str:
    largest = max(shares.by_parameter, key=lambda name: shares.by_parameter[name])
    small, unseen = shares.smallest, shares.unseen
    below = "" if shares.below_eps is None else f", and {shares.below_eps.coordinates:.1%} are below ε"
    return (
        f"Of {shares.coordinates} coordinates, the {small.coordinates:.1%} with the smallest second moment carry "
        f"{small.trace:.0%} of the kernel's trace; the {unseen.coordinates:.1%} that never received a gradient carry "
        f"{unseen.trace:.0%}{below}. {largest!r} has {shares.by_parameter[largest]:.0%} of it. What the kernel says is "
        f"about them: unseen='zero' leaves out those without a gradient, precond.select whole parameters."
    )
