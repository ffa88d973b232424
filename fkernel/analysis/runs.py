"""Questions to the account of a run: reward functions' shares, turns of a timeline, and what comes back for or against.

A_u = s_g (R_u − R̄_g),  R_u = Σ_r w_r r_ur        group mean, leave-one-out and standardised advantages alike
share_ur = w_r (r_ur − r̄_gr) / (R_u − R̄_g)         adds up to 1 over r; C_eu · share_ur is what r did by way of u
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import NamedTuple

import torch

from fkernel.boundary import public
from fkernel.errors import BatchError
from fkernel.shapes import Tensor
from fkernel.tree import check_finite

CANCELLED = 1e-6
"""Share of a sequence's rewards below which its advantage is their rounding."""
TURN = 0.2
"""Share of a timeline's whole range that it comes back by before it is said to have turned."""


class Recurrence(NamedTuple):
    """Whether something that was trained on in several steps was for or against a probe each time.

    Attributes:
        id: what came back: a prompt.
        steps: in how many steps.
        up: in how many of them it raised the probe.
        total: nats, over all of them.
        p: probability of so uneven a split by chance (sign test).
    """

    id: str
    steps: int
    up: int
    total: float
    p: float


@public
def reward_shares(rewards: Tensor, weights: Tensor, groups: Tensor) -> Tensor:
    """Split advantages that are centred in groups by reward function.

    share_ur = w_r (r_ur − r̄_gr) / Σ_s w_s (r_us − r̄_gs)

    Args:
        rewards: [n R] r; NaN where a function gave none, which counts as 0, as in TRL's sum.
        weights: [R] w.
        groups: [n] which group each sequence is compared in.

    Returns:
        [n R], rows add up to 1; zeros where the advantage is 0 up to float32's rounding: there functions cancel, and
        what each of them did by way of that sequence cannot be told from what it did.

    Raises:
        BatchError: shapes differ.

    Example:
        >>> reward_shares(torch.tensor([[1.0, 0.0], [0.0, 0.5]]), torch.ones(2), torch.zeros(2, dtype=torch.long))
        tensor([[ 2., -1.],
                [ 2., -1.]], dtype=torch.float64)
    """
    if rewards.ndim != 2 or weights.shape != rewards.shape[1:] or groups.shape != rewards.shape[:1]:
        raise BatchError(
            f"rewards is {list(rewards.shape)}, weights {list(weights.shape)} and groups {list(groups.shape)}; "
            f"expected [n R], [R] and [n]."
        )
    weighed = torch.nan_to_num(rewards.double()) * weights.double()
    _, place = groups.unique(return_inverse=True)
    sums = torch.zeros(int(place.max()) + 1, weighed.shape[1], dtype=torch.float64).index_add_(0, place, weighed)
    apart = weighed - (sums / place.bincount()[:, None])[place]
    total = apart.sum(1, keepdim=True)
    known = total.abs() > CANCELLED * weighed.abs().sum(1, keepdim=True)
    return torch.where(known, apart / torch.where(known, total, 1.0), 0.0)


@public
def turning_points(timeline: Sequence[float], least: float = TURN) -> list[int]:
    """Find the steps after which a running sum turned: it came back from there by a share of its whole range.

    Args:
        timeline: what happened in each step.
        least: that share.

    Returns:
        Positions in the timeline: after the step at i it was highest, or lowest, for a while.

    Example:
        >>> turning_points([1.0, 1.0, -0.1, 1.0, -2.0, -2.0])
        [3]
    """
    check_finite({"timeline": torch.as_tensor(timeline, dtype=torch.float64)}, "turning_points")
    values, total = [0.0], 0.0
    for each in timeline:
        total += each
        values.append(total)
    enough = least * (max(values) - min(values))
    turns, high, low, rising = list[int](), 0, 0, None
    for i, value in enumerate(values):
        high, low = (i if value > values[high] else high), (i if value < values[low] else low)
        if rising is not False and values[high] - value >= enough > 0:
            turns += [high] if rising else []
            rising, low, high = False, i, i
        elif rising is not True and value - values[low] >= enough > 0:
            turns += [low] if rising is False else []
            rising, low, high = True, i, i
    return [i - 1 for i in turns if i > 0]


@public
def recurrences(ids: Sequence[str], steps: Sequence[int], values: Sequence[float], least: int = 2) -> list[Recurrence]:
    """Tell what was trained on in several steps, and was for or against a probe in how many of them.

    A step in which it did nothing at all, such as one whose advantages were 0, counts for neither.

    Args:
        ids: of each sequence, what it is counted under: its prompt.
        steps: of each sequence.
        values: its contribution to the probe.
        least: steps that something must have come back in.

    Returns:
        Largest totals first.

    Example:
        >>> recurrences(["a", "a", "a", "b"], [0, 0, 1, 1], [1.0, 1.0, 0.5, -1.0])
        [Recurrence(id='a', steps=2, up=2, total=2.5, p=0.5)]
    """
    check_finite({"values": torch.as_tensor(values, dtype=torch.float64)}, "recurrences")
    sums = dict[str, dict[int, float]]()
    for name, step, value in zip(ids, steps, values, strict=True):
        by_step = sums.setdefault(name, {})
        by_step[step] = by_step.get(step, 0.0) + value
    sums = {name: {step: value for step, value in by_step.items() if value} for name, by_step in sums.items()}
    recurring = [
        Recurrence(
            name,
            len(by_step),
            up := sum(v > 0 for v in by_step.values()),
            sum(by_step.values()),
            _sign_test(up, len(by_step)),
        )
        for name, by_step in sums.items()
        if len(by_step) >= least
    ]
    return sorted(recurring, key=lambda each: -abs(each.total))


def _sign_test(up: int, n: int) -> float:
    """P(as uneven or more), each side equally likely."""
    tail = sum(comb(n, k) for k in range(max(up, n - up), n + 1)) / 2**n
    return min(1.0, 2 * tail)
