"""Resampled prompts: intervals that cover, errors that are a mean's, ranks that count."""

from __future__ import annotations

import math

import pytest
import torch

import fkernel as fk
from fkernel.analysis.student import student_quantile
from fkernel.analysis.uncertainty import (
    group_sums,
    influence_interval,
    rank_interval,
    resamplings,
    total_ranks,
)
from tests.laws import close

DTYPE = torch.float64
GROUPS = torch.tensor([5, 2, 2, 5, 9, 9, 9, 5, 2, 7])


@pytest.fixture
def C():
    return torch.randn(6, 10, dtype=DTYPE, generator=torch.Generator().manual_seed(3))


def members():
    return [(group == GROUPS).nonzero()[:, 0] for group in GROUPS.unique()]


def test_sums_of_prompts(C):
    draws = resamplings(GROUPS, 10)
    sums = group_sums(C, draws.place, draws.prompts)
    close(sums, torch.stack([C[:, own].sum(1) for own in members()], 1))
    halves = [group_sums(C[:, part], draws.place[part], draws.prompts) for part in (slice(0, 4), slice(4, 10))]
    close(halves[0] + halves[1], sums)


def test_every_draw_takes_as_many_prompts_as_there_are():
    draws = resamplings(GROUPS, 4000, seed=1)
    assert bool((draws.counts.sum(1) == 4).all())
    # n* is binomial(G, 1/G): mean 1, variance 1 − 1/G; four standard errors of a mean of 4000
    assert (draws.counts.mean(0) - 1).abs().max() < 4 * math.sqrt(0.75 / 4000)
    assert (draws.counts.var(0) - 0.75).abs().max() < 0.1


def test_the_jackknife_is_leaving_out(C):
    draws = resamplings(GROUPS, 10)
    without = []
    for own in members():
        kept = torch.ones(10, dtype=torch.bool)
        kept[own] = False
        without.append(C[:, kept].sum(1) * 4 / 3)
    left_out = torch.stack(without)
    expected = (3 / 4 * (left_out - left_out.mean(0)).square().sum(0)).sqrt()
    found = influence_interval(C, draws)
    close(found.error, expected)
    close(found.estimate, C.sum(1))


def test_the_jackknife_of_a_sum_is_a_means():
    x = torch.randn(3, 12, dtype=DTYPE)
    found = influence_interval(x, resamplings(torch.arange(12), 10))
    close(found.error, 12 * x.std(1) / math.sqrt(12))


def test_intervals_are_students(C):
    """Around the influence, with three degrees of freedom of four prompts."""
    stats = pytest.importorskip("scipy.stats")
    for coverage in (0.5, 0.9, 0.999):
        found = influence_interval(C, resamplings(GROUPS, 10), coverage)
        half = float(stats.t.ppf((1 + coverage) / 2, 3)) * found.error
        close(found.low, C.sum(1) - half)
        close(found.high, C.sum(1) + half)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 15, 30, 255, 1000])
def test_quantiles_are_students(freedom):
    stats = pytest.importorskip("scipy.stats")
    for coverage in (0.01, 0.5, 0.9, 0.99, 0.999999):
        expected = stats.t.ppf((1 + coverage) / 2, freedom)
        assert student_quantile(coverage, freedom) == pytest.approx(expected, rel=1e-9)


def test_quantiles_of_one_and_two_degrees_have_closed_forms():
    assert student_quantile(0.9, 1) == pytest.approx(math.tan(0.45 * math.pi), rel=1e-12)
    assert student_quantile(0.9, 2) == pytest.approx(0.9 * math.sqrt(2 / (1 - 0.81)), rel=1e-12)


def ahead_of_the_fifth(C, draws):
    """[r G]: how many of each prompt are ahead of a row's fifth contributor."""
    size = C.abs()
    fifth = size.sort(1, descending=True).values[:, 4:5]
    return group_sums((size > fifth).double(), draws.place, draws.prompts)


def test_the_bootstrap_agrees_with_its_closed_form(C):
    """Var x* = G · Var(x_g), biased: the standard deviation of many draws is √((G−1)/G) of the jackknife's."""
    draws = resamplings(GROUPS, 20_000, seed=2)
    _, ranks = rank_interval(C, draws, coverage=0.6827)
    drawn = draws.counts @ ahead_of_the_fifth(C, draws).T
    torch.testing.assert_close(drawn.std(0), ranks.error[:, 4] * math.sqrt(3 / 4), rtol=0.03, atol=0.0)
    torch.testing.assert_close(ranks.low[:, 4], drawn.quantile((1 - 0.6827) / 2, dim=0))
    torch.testing.assert_close(ranks.high[:, 4], drawn.quantile((1 + 0.6827) / 2, dim=0))


@pytest.mark.parametrize("draws", [1, 2, 3, 10])
def test_few_draws_have_percentiles_too(C, draws):
    _, ranks = rank_interval(C, (made := resamplings(GROUPS, draws)), coverage=0.8)
    drawn = made.counts @ ahead_of_the_fifth(C, made).T
    torch.testing.assert_close(ranks.low[:, 4], drawn.quantile(0.1, dim=0))
    torch.testing.assert_close(ranks.high[:, 4], drawn.quantile(0.9, dim=0))


@pytest.mark.parametrize("prompts", [2, 3, 4, 8, 16, 40])
def test_intervals_cover(prompts):
    """3000 batches, 5 completions a prompt that share its effect: 90% intervals hold 90%, of few prompts too.

    Three standard errors of a share of 3000 are 1.7%. Taken as independent sequences, they would hold far fewer.
    """
    generator = torch.Generator().manual_seed(11)
    effects = torch.randn(3000, prompts, 1, generator=generator, dtype=DTYPE)
    C = (0.3 + effects + 0.8 * torch.randn(3000, prompts, 5, generator=generator, dtype=DTYPE)).flatten(1)
    groups, truth = torch.arange(prompts).repeat_interleave(5), 0.3 * 5 * prompts
    found = influence_interval(C, resamplings(groups, 1), coverage=0.9)
    covered = ((found.low <= truth) & (truth <= found.high)).double().mean()
    assert abs(float(covered) - 0.9) < 0.017
    alone = influence_interval(C, resamplings(torch.arange(5 * prompts), 1), coverage=0.9)
    assert ((alone.low <= truth) & (truth <= alone.high)).double().mean() < 0.75


def test_ranks_count_who_is_ahead(C):
    draws = resamplings(GROUPS, 50, seed=1)
    columns, ranks = rank_interval(C, draws, top=10, coverage=0.8)
    assert bool((ranks.estimate == torch.arange(10)).all())
    assert columns.tolist() == C.abs().argsort(1, descending=True).tolist()
    for e, k in ((0, 0), (2, 5), (5, 9)):
        ahead = (C[e].abs() > C[e, columns[e, k]].abs()).double()
        drawn = torch.stack([(counts[draws.place] * ahead).sum() for counts in draws.counts])
        torch.testing.assert_close(ranks.low[e, k], drawn.quantile(0.1))
        torch.testing.assert_close(ranks.high[e, k], drawn.quantile(0.9))
    few, some = rank_interval(C, draws, top=3, coverage=0.8)
    assert torch.equal(few, columns[:, :3])
    assert torch.equal(some.high, ranks.high[:, :3])


def test_ranks_of_totals_are_those_of_redrawn_evaluations(C):
    """Columns are contributors, rows are of E: each redrawn E is ranked by itself; blocks of rows add up."""
    prompts = torch.tensor([0, 0, 1, 1, 2, 2])
    draws = resamplings(prompts, 200, seed=6)
    blocks = [group_sums(C[rows].T, draws.place[rows], draws.prompts) for rows in (slice(0, 3), slice(3, 6))]
    found = total_ranks(blocks[0] + blocks[1], draws, coverage=0.8)
    order = C.sum(0).abs().argsort(descending=True)
    assert found.estimate[order].tolist() == list(range(10))
    drawn = []
    for counts in draws.counts:
        size = (counts[prompts, None] * C).sum(0).abs()
        drawn.append((size[None] > size[:, None]).sum(1).double())
    torch.testing.assert_close(found.low, torch.stack(drawn).quantile(0.1, dim=0))
    torch.testing.assert_close(found.high, torch.stack(drawn).quantile(0.9, dim=0))


def test_rows_give_the_same_in_blocks_and_the_same_seed_gives_the_same(C):
    draws, again = (resamplings(GROUPS, 100, seed=8) for _ in range(2))
    assert torch.equal(draws.counts, again.counts)
    assert not torch.equal(draws.counts, resamplings(GROUPS, 100, seed=9).counts)
    whole, (columns, ranks) = influence_interval(C, draws), rank_interval(C, draws, top=4)
    for rows in (slice(0, 1), slice(1, 6)):
        for one, other in zip(influence_interval(C[rows], again), whole, strict=True):
            close(one, other[rows], 1e-12)
        few, some = rank_interval(C[rows], again, top=4)
        assert torch.equal(few, columns[rows])
        for one, other in zip(some, ranks, strict=True):
            torch.testing.assert_close(one, other[rows])


def test_what_cannot_be_resampled_is_refused(C):
    draws = resamplings(GROUPS, 10)
    with pytest.raises(fk.BatchError, match="there are to be 0 draws"):
        resamplings(GROUPS, 0)
    with pytest.raises(fk.BatchError, match=r"groups has shape \[0\]"):
        resamplings(GROUPS[:0])
    with pytest.raises(fk.BatchError, match=r"There are 9 columns and prompts of \[10\] sequences"):
        influence_interval(C[:, :9], draws)
    with pytest.raises(fk.BatchError, match=r"A kernel's rows have shape \[10\]"):
        rank_interval(C[0], draws)
    with pytest.raises(fk.BatchError, match=r"1 prompt\(s\) and coverage is 0.9"):
        influence_interval(C, resamplings(torch.zeros(10, dtype=torch.int64)))
    with pytest.raises(fk.BatchError, match=r"coverage is 1.0"):
        rank_interval(C, draws, coverage=1.0)
    with pytest.raises(fk.BatchError, match=r"sums has shape \[10, 3\] for 4 prompts"):
        total_ranks(torch.ones(10, 3), draws)
    C[2, 1] = math.nan
    with pytest.raises(fk.NonFiniteError, match="Row 2 holds a value that is not finite"):
        influence_interval(C, draws)
