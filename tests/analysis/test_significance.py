"""Permuted advantages: p-values that are uniform where nothing is told, and small where something is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import fkernel as fk
from fkernel.analysis.permutation_test import Permutations, permutations, significance
from tests.laws import close

DTYPE = torch.float64
GROUPS = torch.tensor([5, 2, 2, 5, 9, 9, 9, 5, 2, 7])


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(3)


def normal(draw, *shape):
    return torch.randn(*shape, generator=draw, dtype=DTYPE)


def test_prompts_keep_their_advantages_among_themselves():
    draws = permutations(GROUPS, 500, seed=2)
    assert bool((GROUPS[draws.orders] == GROUPS).all())
    assert bool((draws.orders.sort(1).values == torch.arange(10)).all())
    # every arrangement of a prompt of three is as likely as the others: 1/6 of 500, within four standard errors
    own = (GROUPS == 2).nonzero()[:, 0]
    for arrangement in itertools.permutations(own.tolist()):
        share = (draws.orders[:, own] == torch.tensor(arrangement)).all(1).double().mean()
        assert abs(float(share) - 1 / 6) < 4 * math.sqrt(5 / 36 / 500)


def test_p_is_a_share_of_permutations(draw):
    """The definition, one row and one permutation at a time."""
    K, A, scale = normal(draw, 3, 10), normal(draw, 10), torch.rand(10, generator=draw, dtype=DTYPE)
    draws = permutations(GROUPS, 60, seed=5)
    found = significance(K, scale, A, draws)
    groups = [(group == GROUPS).nonzero()[:, 0] for group in GROUPS.unique()]
    for own in groups:
        A[own] = A[own] - A[own].mean()
        close(found.least[own], torch.stack([(A[own].abs() >= a.abs()).double().mean() for a in A[own]]))
    for e in range(3):
        D = [K[e] * scale * A[order] for order in (torch.arange(10), *draws.orders)]
        by_prompt = [torch.stack([one[own].sum() for own in groups]).abs() for one in D]
        total = [one.sum().abs() for one in D]
        slack = 1e-12  # a prompt of one is the same under all permutations
        close(found.sequences[e], torch.stack([one.abs().max() >= D[0].abs() - slack for one in D]).double().mean(0))
        close(found.prompts[e], torch.stack([one.max() >= by_prompt[0] - slack for one in by_prompt]).double().mean(0))
        close(found.influence[e], torch.stack([one >= total[0] - slack for one in total]).double().mean())


@pytest.mark.parametrize("right", [0.3, None])
def test_p_is_uniform_where_advantages_tell_nothing(draw, right):
    """40 batches of 25 rows, advantages of rewards that know nothing: P(p ≤ 0.1) is 0.1, within three standard errors.

    Of continuous advantages the share is 0.1; of right and wrong ones equal statistics are counted against, so that it
    is no more. Whether any sequence or prompt of a row is found is the family's chance.
    """
    groups, hits = torch.arange(6).repeat_interleave(8), []
    for seed in range(40):
        rewards = torch.rand(48, generator=draw, dtype=DTYPE)
        rewards = rewards if right is None else (rewards < right).double()
        A = rewards - rewards.view(6, 8).mean(1).repeat_interleave(8)
        scale = torch.rand(6, 1, generator=draw, dtype=DTYPE).expand(6, 8).reshape(-1)
        K = normal(draw, 25, 48) + normal(draw, 25, 6).repeat_interleave(8, 1)
        found = significance(K, scale, A, permutations(groups, 99, seed))
        best = (found.sequences.amin(1), found.prompts.amin(1), found.influence)
        hits.append(torch.stack([(p <= 0.1).double().mean() for p in best]))
    sequences, prompts, influence = torch.stack(hits).mean(0).tolist()
    error = 3 * math.sqrt(0.1 * 0.9 / 1000)
    assert sequences <= 0.1 + error
    assert prompts <= 0.1 + error
    assert influence <= 0.1 + error
    if right is None:
        assert prompts >= 0.1 - error
        assert influence >= 0.1 - error


def test_a_planted_contributor_is_found(draw):
    """One prompt whose advantages are its kernel's own: its p is small, so is the influence's, the others' are not."""
    groups = torch.arange(6).repeat_interleave(8)
    K, A = normal(draw, 20, 48), normal(draw, 48)
    A = A - A.view(6, 8).mean(1).repeat_interleave(8)
    K[:10, 16:24] = 8 * A[16:24]
    found = significance(K, torch.ones(48, dtype=DTYPE), A, permutations(groups, 999, seed=1))
    assert bool((found.prompts[:10, 2] <= 0.01).all())
    assert bool((found.influence[:10] <= 0.01).all())
    assert found.prompts[:10, [0, 1, 3, 4, 5]].min() > 0.05
    assert found.prompts[10:].min() > 0.001


def test_a_single_sequence_is_told_apart_as_far_as_its_prompt_goes(draw):
    """The most extreme of k completions, and the only one with any kernel, has p = 1/k: no K does better."""
    k, draws = 64, 4000
    K, A = torch.zeros(1, k, dtype=DTYPE), normal(draw, k)
    A = A - A.mean()
    u = int(A.abs().argmax())
    K[0, u] = 5
    found = significance(K, torch.ones(k, dtype=DTYPE), A, permutations(torch.zeros(k, dtype=torch.int64), draws))
    assert float(found.least[u]) == 1 / k
    assert abs(float(found.sequences[0, u]) - 1 / k) < 4 * math.sqrt(1 / k / draws) + 1 / draws
    assert found.sequences[0, u] < 0.03
    order = A.abs().argsort(descending=True)
    close(found.least[order], torch.arange(1, k + 1).double() / k)
    halves = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert significance(torch.ones(1, 4), torch.ones(4), halves, permutations(torch.zeros(4).long())).least.min() == 1


@pytest.mark.parametrize("level", [0.0, 0.1, -7.3])
def test_a_prompt_of_equal_advantages_tells_nothing_and_is_in_nobodys_way(draw, level):
    groups = torch.arange(4).repeat_interleave(6)
    K, A, scale = normal(draw, 5, 24), normal(draw, 24), torch.ones(24, dtype=DTYPE)
    A[:6] = level
    draws = permutations(groups, 200, seed=3)
    found = significance(K, scale, A, draws)
    assert found.informative.tolist() == [False, True, True, True]
    assert bool((found.sequences[:, :6] == 1).all())
    assert bool((found.prompts[:, 0] == 1).all())
    rest = Permutations(draws.place[6:] - 1, draws.orders[:, 6:] - 6)
    without = significance(K[:, 6:], scale[6:], A[6:], rest)
    assert torch.equal(found.prompts[:, 1:], without.prompts)
    assert torch.equal(found.sequences[:, 6:], without.sequences)
    assert torch.equal(found.influence, without.influence)


def test_what_is_the_same_for_all_permutations_is_not_taken_for_a_finding(draw):
    """A kernel that is the same for all completions of a prompt: sums are rounding's, and p is 1."""
    groups = torch.arange(5).repeat_interleave(8)
    K = normal(draw, 4, 5).repeat_interleave(8, 1)
    found = significance(K, torch.ones(40, dtype=DTYPE), normal(draw, 40), permutations(groups, 50))
    assert bool((found.prompts == 1).all())
    assert bool((found.influence == 1).all())


def test_loss_weights_stay_where_they_are(draw):
    """A scale of K's columns and of c·w are the same thing; a scale of advantages within a prompt is not."""
    K, A, scale = normal(draw, 3, 10), normal(draw, 10), torch.rand(10, generator=draw, dtype=DTYPE) + 0.1
    draws = permutations(GROUPS, 200)
    found, other = significance(K, scale, A, draws), significance(K * scale, torch.ones_like(A), A, draws)
    for one, two in zip(found, other, strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(found.influence, significance(K, torch.ones_like(A), A * scale, draws).influence)


def test_rows_give_the_same_in_blocks_and_the_same_seed_gives_the_same(draw):
    K, A, scale = normal(draw, 7, 10), normal(draw, 10), torch.ones(10, dtype=DTYPE)
    draws, again = (permutations(GROUPS, 300, seed=4) for _ in range(2))
    assert torch.equal(draws.orders, again.orders)
    assert not torch.equal(draws.orders, permutations(GROUPS, 300, seed=5).orders)
    whole = significance(K, scale, A, draws)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 7)):
        part = significance(K[rows], scale, A, again)
        for one, other in zip(part[:3], whole[:3], strict=True):
            assert torch.equal(one, other[rows])


def test_what_cannot_be_permuted_is_refused():
    draws, ones = permutations(GROUPS, 10), torch.ones(10)
    with pytest.raises(fk.BatchError, match="there are to be 0 draws"):
        permutations(GROUPS, 0)
    with pytest.raises(fk.BatchError, match=r"There are 9 columns and prompts of \[10\]"):
        significance(torch.ones(2, 9), ones, ones, draws)
    with pytest.raises(fk.BatchError, match=r"scale has shape \[9\] for 10 sequences"):
        significance(torch.ones(2, 10), ones[1:], ones, draws)
    with pytest.raises(fk.BatchError, match=r"advantages has shape \[10, 1\] for 10 sequences"):
        significance(torch.ones(2, 10), ones, ones[:, None], draws)
    with pytest.raises(fk.NonFiniteError, match="advantages"):
        significance(torch.ones(2, 10), ones, ones * math.nan, draws)
    with pytest.raises(fk.NonFiniteError, match="Row 0 holds"):
        significance(torch.ones(2, 10) * math.inf, ones, ones, draws)
