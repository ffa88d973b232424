"""The mean square of the gradient over all permutations, and what it makes of p-values and of intervals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import fkernel as fk
from fkernel import func, precond
from fkernel.analysis import (
    Permutations,
    influence_interval,
    permutation_rms,
    permutations,
    resamplings,
    significance,
)
from tests.laws import close

DTYPE = torch.float64
GROUPS = torch.tensor([7, 3, 7, 3, 3, 5, 7])


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(8)


def normal(draw, *shape):
    return torch.randn(*shape, generator=draw, dtype=DTYPE)


def rms_of(J, weights, advantages, groups, constant=None):
    sums = (lambda x: func.weighted_sum(J, x)), (lambda x: func.squared_sum(J, x))
    return permutation_rms(*sums, weights, advantages, groups, constant)


def every_order(groups):
    """All permutations within prompts, one at a time."""
    members = [(groups == g).nonzero()[:, 0] for g in groups.unique()]
    for orders in itertools.product(*(itertools.permutations(own.tolist()) for own in members)):
        pi = torch.arange(len(groups))
        for own, order in zip(members, orders, strict=True):
            pi[own] = torch.tensor(order)
        yield pi


@pytest.mark.parametrize("constant", [False, True])
def test_it_is_the_root_mean_square_over_every_permutation(draw, constant):
    J = {"w": normal(draw, 7, 3, 2) + 1, "b": normal(draw, 7)}
    w, A = torch.rand(7, generator=draw, dtype=DTYPE), normal(draw, 7) + 0.5
    h = {"w": normal(draw, 3, 2), "b": normal(draw, 1)[0]} if constant else None
    found = rms_of(J, w, A, GROUPS, h)
    for name, leaf in J.items():
        shift = 0 if h is None else h[name]
        each = [torch.einsum("n,n...->...", w * A[pi], leaf) + shift for pi in every_order(GROUPS)]
        assert len(each) == 36
        close(found[name], torch.stack(each).square().mean(0).sqrt())


def test_it_is_the_same_for_all_permutations(draw):
    J, w, A = {"w": normal(draw, 7, 4)}, torch.rand(7, generator=draw, dtype=DTYPE), normal(draw, 7)
    whole = rms_of(J, w, A, GROUPS)["w"]
    for pi in itertools.islice(every_order(GROUPS), 0, 36, 5):
        close(rms_of(J, w, A[pi], GROUPS)["w"], whole, 1e-12)


def test_where_nothing_is_permuted_it_is_the_gradients_size(draw):
    J, w = {"w": normal(draw, 7, 4)}, torch.rand(7, generator=draw, dtype=DTYPE)
    level = torch.tensor([0.3, -2.0, 0.3, -2.0, -2.0, 1.0, 0.3], dtype=DTYPE)
    close(rms_of(J, w, level, GROUPS)["w"], func.weighted_sum(J, w * level)["w"].abs())
    nothing = rms_of(J, w, torch.zeros(7, dtype=DTYPE), GROUPS)["w"]
    assert bool((nothing == 0).all())


def test_a_difference_that_is_rounding_is_no_smaller_than_rounding():
    """Completions with the same gradient: g is 0 for all permutations, up to rounding, and never NaN."""
    J = {"w": torch.full((6, 1), 0.1).repeat(1, 5) * torch.arange(1, 6)}
    A = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    found = rms_of(J, torch.full((6,), 1 / 6), A, torch.zeros(6, dtype=torch.int64))["w"]
    own = func.squared_sum(J, torch.full((6,), 1 / 36))["w"].sqrt()
    assert bool((found > 0).all())
    assert bool((found < 1e-2 * own).all())


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_gradients_that_are_stored_in_fewer_digits(draw, weights):
    J, h = {"w": normal(draw, 7, 4)}, {"w": normal(draw, 4)}
    w, A = torch.rand(7, generator=draw, dtype=DTYPE), normal(draw, 7)
    stored = [fk.tree.cast(x, torch.bfloat16) for x in (J, h)]
    found = rms_of(stored[0], w.to(weights), A, GROUPS, stored[1])["w"]
    torch.testing.assert_close(found.double(), rms_of(J, w, A, GROUPS, h)["w"], rtol=0.05, atol=0.0)


def test_what_has_no_mean_square_is_refused(draw):
    J, ones = {"w": normal(draw, 7, 4)}, torch.ones(7, dtype=DTYPE)
    with pytest.raises(fk.BatchError, match=r"advantages has shape \[6\] for 7 sequences; expected \[n_U\]"):
        rms_of(J, ones, ones[1:], GROUPS)
    with pytest.raises(fk.BatchError, match=r"weights has shape \[7, 1\] for 7 sequences"):
        rms_of(J, ones[:, None], ones, GROUPS)
    with pytest.raises(fk.NonFiniteError, match="advantages"):
        rms_of(J, ones, ones * math.nan, GROUPS)


# ------------------------------------------------------------------------------- what becomes of K under Adam's P

SIDE = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0], dtype=DTYPE)
PARAMETERS = 40


def state_of(v, steps, beta2=0.999):
    each = {"lr": 1e-3, "beta1": 0.9, "beta2": beta2, "eps": 1e-8, "weight_decay": 0.0}
    fields = {name: {"w": value} for name, value in each.items()}
    return precond.AdamWState(step={"w": steps}, exp_avg={"w": torch.zeros_like(v)}, exp_avg_sq={"w": v}, **fields)


def response_to(state, g):
    return precond.adamw_response(state, {"w": g})({"w": torch.ones_like(g)})["w"]


class Batch:
    """Prompts of six completions that share a part of their gradients, under coordinates of unequal size."""

    def __init__(self, draw, prompts, size, towards=None):
        """Three completions of each prompt are right: at random, or more often those that agree with a gradient."""
        self.groups = torch.arange(prompts).repeat_interleave(6)
        x = normal(draw, prompts, 6, PARAMETERS) + 2 * normal(draw, prompts, 1, PARAMETERS)
        score = normal(draw, prompts, 6)
        score = score if towards is None else score + 3 * x @ (towards / size) / PARAMETERS**0.5
        self.A = SIDE.flip(0)[score.argsort(1).argsort(1)].flatten()
        self.J, self.w = (x * size).flatten(0, 1), torch.full((6 * prompts,), 1 / (6 * prompts), dtype=DTYPE)

    @property
    def g(self):
        return -(self.w * self.A) @ self.J

    @property
    def rms(self):
        return rms_of({"w": self.J}, self.w, self.A, self.groups)["w"]


def moment_after(draw, steps, size):
    v = torch.zeros(PARAMETERS, dtype=DTYPE)
    for _ in range(steps):
        v = 0.999 * v + 0.001 * Batch(draw, 4, size).g.square()
    return v


def p_values(draw, steps, own, towards, times=200):
    """p of influences, and the least of the prompts', of K under the P of `own`."""
    orders, found = permutations(torch.arange(4).repeat_interleave(6), 99, seed=2), []
    for _ in range(times):
        size = normal(draw, PARAMETERS).exp()
        e = normal(draw, PARAMETERS) * size
        U = Batch(draw, 4, size, e if towards else None)
        K = (e * response_to(state_of(moment_after(draw, steps, size), steps), own(U)))[None] @ U.J.T
        sure = significance(K, U.w, U.A, orders)
        found.append(torch.stack([sure.influence[0], sure.prompts.amin()]))
    return torch.stack(found).T


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_p_is_uniform_in_a_runs_first_steps(draw, steps):
    """P(p ≤ α) = α of influences, and at most α of the least of the prompts', within three standard errors of 200."""
    influence, prompts = p_values(draw, steps, lambda U: U.rms, towards=False)
    for alpha in (0.05, 0.1, 0.5):
        error = 3 * math.sqrt(alpha * (1 - alpha) / 200)
        assert abs(float((influence <= alpha).double().mean()) - alpha) < error
        assert float((prompts <= alpha).double().mean()) < alpha + error


def test_what_is_decided_by_advantages_is_found_at_the_first_step(draw):
    """Under the step's own P nothing is: its p-values are not those of any null."""
    influence, _ = p_values(draw, 0, lambda U: U.rms, towards=True, times=100)
    assert float((influence <= 0.05).double().mean()) > 0.5
    blind, _ = p_values(draw, 0, lambda U: U.g, towards=True, times=100)
    assert float((blind <= 0.05).double().mean()) < 0.05


@pytest.mark.parametrize(("steps", "prompts"), [(0, 4), (0, 16), (1, 8), (50, 8)])
def test_intervals_hold_what_redrawn_prompts_give(draw, steps, prompts):
    """D is recomputed for each redrawn batch: the width under the mean square holds their mean 9 times of ten or more.

    Under the step's own D it is several times the spread of the influence in the first step.
    """
    size = normal(draw, PARAMETERS).exp()
    e, state = normal(draw, PARAMETERS) * size, state_of(moment_after(draw, steps, size), steps)
    own, half, error = [], [], []
    for _ in range(400):
        U = Batch(draw, prompts, size, e)
        C = [((e * response_to(state, g)) @ U.J.T * U.w * U.A)[None] for g in (U.g, U.rms)]
        draws = resamplings(U.groups, 1)
        sure, narrow = (influence_interval(c, draws) for c in C)
        own.append(sure.estimate[0])
        half.append((narrow.high - narrow.estimate)[0])
        error.append(sure.error[0] / narrow.error[0])
    x = torch.stack(own)
    held = ((x - x.mean()).abs() <= torch.stack(half)).double().mean()
    assert 0.9 - 3 * math.sqrt(0.09 / 400) < float(held) < 0.99
    assert (steps > 0) or float(torch.stack(error).mean()) > 5


JUDGED = torch.tensor([True, True, False, True, False, False, True])  # of 7: a pair, of 3: a pair, of 5: nobody


def with_those_who_abstain(draw):
    """Advantages of the judged, 0 of the others; and every permutation that leaves the others where they are."""
    A = torch.where(JUDGED, normal(draw, 7) + 0.5, 0.0)
    orders = [pi for pi in every_order(GROUPS) if bool((pi == torch.arange(7))[~JUDGED].all())]
    assert len(orders) == 4
    return A, orders


def test_who_abstains_is_not_exchanged(draw):
    J, w = {"w": normal(draw, 7, 3) + 1}, torch.rand(7, generator=draw, dtype=DTYPE)
    A, orders = with_those_who_abstain(draw)
    A = torch.where(JUDGED, A, 0.4)  # whatever it has, it keeps
    sums = (lambda x: func.weighted_sum(J, x)), (lambda x: func.squared_sum(J, x))
    found = permutation_rms(*sums, w, A, GROUPS, permuted=JUDGED)
    each = [torch.einsum("n,nk->k", w * A[pi], J["w"]) for pi in orders]
    close(found["w"], torch.stack(each).square().mean(0).sqrt())
    everybody = permutation_rms(*sums, w, A, GROUPS, permuted=torch.ones(7, dtype=torch.bool))
    close(everybody["w"], permutation_rms(*sums, w, A, GROUPS)["w"])


def test_p_of_the_judged_is_a_share_of_their_permutations(draw):
    """Over all permutations of the judged, against the definition; in the column of one who abstains, p is 1."""
    K, scale = normal(draw, 3, 7), torch.rand(7, generator=draw, dtype=DTYPE)
    A, orders = with_those_who_abstain(draw)
    place = permutations(GROUPS, 1).place
    found = significance(K, scale, A, Permutations(place, torch.stack(orders), JUDGED))
    centred = A.clone()
    for g in GROUPS.unique():
        own = (g == GROUPS) & JUDGED
        centred[own] = A[own] - (A[own].mean() if own.any() else 0)
    D = [K * scale * centred[pi] for pi in (torch.arange(7), *orders)]
    members = [g == GROUPS for g in (7, 3, 5)]
    sums = [torch.stack([one[:, place == place[own][0]].sum(1) for own in members], 1) for one in D]
    slack, by_place = 1e-12, [int(place[own][0]) for own in members]
    share = lambda hits: torch.stack(hits).double().mean(0)  # noqa: E731
    close(found.sequences, share([one.abs().amax(1, keepdim=True) >= D[0].abs() - slack for one in D]))
    close(found.prompts[:, by_place], share([x.abs().amax(1, keepdim=True) >= sums[0].abs() - slack for x in sums]))
    close(found.influence, share([x.sum(1).abs() >= sums[0].sum(1).abs() - slack for x in sums]))
    assert bool((found.sequences[:, ~JUDGED] == 1).all())
    assert bool((found.least[~JUDGED] == 1).all())
    assert found.informative[by_place].tolist() == [True, True, False]


def test_who_abstains_stays_where_it_is():
    draws = permutations(GROUPS, 200, seed=4, permuted=JUDGED)
    assert bool((draws.orders[:, ~JUDGED] == torch.arange(7)[~JUDGED]).all())
    assert bool((GROUPS[draws.orders] == GROUPS).all())
    assert bool((draws.orders.sort(1).values == torch.arange(7)).all())
    swapped = (draws.orders[:, 0] == 6).double().mean()
    assert 0.35 < float(swapped) < 0.65
    assert torch.equal(permutations(GROUPS, 20, 4, torch.ones(7, dtype=torch.bool)).orders,
                       permutations(GROUPS, 20, 4).orders)  # fmt: skip


@pytest.mark.parametrize("wrong", [torch.ones(6, dtype=torch.bool), torch.ones(7)])
def test_who_may_be_permuted_is_told_of_every_sequence(wrong):
    with pytest.raises(fk.BatchError, match="True for a sequence whose advantage may be exchanged"):
        permutations(GROUPS, 3, permuted=wrong)
