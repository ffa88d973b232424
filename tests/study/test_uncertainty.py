"""A study's p-values and intervals, against permutations that are taken one by one on dense gradients."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from fkernel import checkpoint, func, precond, tree
from fkernel.analysis import permutations, significance
from fkernel.rollout import save_batch
from fkernel.study import FisherKernelRunner
from tests.study.conftest import MAX_NORM


def weights_of(batch):
    """w, whatever advantages are."""
    return batch.with_values("advantage", torch.ones_like(batch.advantages)).weighted_advantages


def study(run, out, **changes):
    """U asked of itself."""
    request = {"kind": "update", "name": "self", "analyses": {"uncertainty": {"draws": 50}}}
    return FisherKernelRunner(run.plan(out, requests=[request], **changes)).run()


@pytest.fixture(scope="module")
def results(run, tmp_path_factory):
    return study(run, tmp_path_factory.mktemp("uncertainty") / "out")


@pytest.fixture(scope="module")
def permuted(run):
    """K of U, asked of itself, under the P whose v' holds the mean of g² over all permutations within prompts."""
    loaded = checkpoint.load(run.before)
    apply, params = func.make_functional(loaded.model)
    S = func.sequence_logprob(apply)
    J = func.per_sequence_grad(S)(params, run.batch.sequences)
    groups, A = run.batch.groups, run.batch.advantages.float()
    weights = weights_of(run.batch).float()
    members = [(groups == g).nonzero()[:, 0].tolist() for g in groups.unique()]
    squares, count = tree.zeros_like(params), 0
    for orders in itertools.product(*map(itertools.permutations, members)):
        pi = torch.empty(len(A), dtype=torch.int64)
        for own, order in zip(members, orders, strict=True):
            pi[own] = torch.tensor(order)
        g = func.weighted_sum(J, weights * A[pi])
        squares, count = {name: squares[name] + leaf.square() for name, leaf in g.items()}, count + 1
    rms = {name: (leaf / count).sqrt() for name, leaf in squares.items()}
    clip = precond.clip_factor(rms, MAX_NORM)
    assert clip < 1
    assert isinstance(loaded.optimizer, precond.AdamWState)
    P = precond.adamw_response(loaded.optimizer, {**tree.scale(clip, rms)})
    # Rows are halfway along the step that was taken, as a request's are; columns are where U's gradients are.
    ascent = func.weighted_sum(J, weights * A)
    g = tree.scale(-precond.clip_factor(ascent, MAX_NORM), ascent)
    mid = tree.axpy(0.5, precond.adamw_step(params, {**g}, loaded.optimizer).total, params)
    rows = func.per_sequence_grad(S)(mid, run.batch.sequences)
    return func.contract(rows, J, diagonal=P({name: torch.ones_like(leaf) for name, leaf in params.items()}))


def test_p_is_of_a_kernel_that_permutations_leave_alone(run, results, permuted):
    result = results["self"]
    found = result.analysis("uncertainty")
    scale = weights_of(run.batch)
    expected = significance(permuted, scale, run.batch.advantages, permutations(run.batch.groups, 50))
    np.testing.assert_allclose(found["p"], expected.influence, atol=1e-12)
    np.testing.assert_allclose(found["prompt_p"], expected.prompts, atol=1e-12)
    np.testing.assert_allclose(found["top_p"], np.take_along_axis(expected.sequences.numpy(), result.top, 1))
    np.testing.assert_allclose(found["sequence_p"], expected.sequences.numpy(), atol=1e-6)
    assert found.facts["preconditioner"] == "permutation mean"
    other = significance(torch.tensor(result.kernel), scale, run.batch.advantages, permutations(run.batch.groups, 50))
    assert not np.allclose(found["p"], other.influence)


def test_intervals_have_their_width_of_that_kernel_and_their_middle_of_the_step(run, results, permuted):
    stats = pytest.importorskip("scipy.stats")
    result, groups = results["self"], run.batch.groups
    found, C = result.analysis("uncertainty"), permuted * results.step["clip"] * run.batch.weighted_advantages
    whole = C.sum(1)
    without = torch.stack([(whole - C[:, groups == g].sum(1)) * 3 / 2 for g in groups.unique()])
    error = (2 / 3 * (without - without.mean(0)).square().sum(0)).sqrt()
    np.testing.assert_allclose(found["error"], error, rtol=1e-3)
    half = stats.t.ppf(0.95, 2) * found["error"]
    np.testing.assert_allclose(found["low"], result.batch - half, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(found["high"], result.batch + half, rtol=1e-6, atol=1e-12)


def test_a_preconditioner_without_advantages_is_its_own(run, tmp_path):
    result = study(run, tmp_path / "out", preconditioner={"form": "identity"})["self"]
    found = result.analysis("uncertainty")
    scale, orders = weights_of(run.batch), permutations(run.batch.groups, 50)
    expected = significance(torch.tensor(result.kernel), scale, run.batch.advantages, orders)
    np.testing.assert_allclose(found["p"], expected.influence, atol=1e-12)
    assert found.facts["preconditioner"] == "identity"
    np.testing.assert_allclose(found["low"] + found["high"], 2 * result.batch, rtol=1e-6)


def test_who_abstains_is_not_exchanged_with_the_judged(run, tmp_path):
    """One of each prompt's three abstains: p and P are of the exchanges of the other two, brute force."""
    silent = torch.tensor([record.provenance.completion == 1 for record in run.batch])
    records = [replace(r, reward=None, abstained=True) if s else r for r, s in zip(run.batch, silent, strict=True)]
    batch = replace(run.batch, records=tuple(records)).with_advantages("group_mean")
    assert not batch.advantages[silent].any()
    save_batch(batch, tmp_path / "U")
    result = study(run, tmp_path / "out", update={"kind": "from_file", "path": str(tmp_path / "U")},
                   step={"max_norm": MAX_NORM})["self"]  # fmt: skip
    loaded = checkpoint.load(run.before)
    apply, params = func.make_functional(loaded.model)
    J = func.per_sequence_grad(func.sequence_logprob(apply))(params, batch.sequences)
    w, A = weights_of(batch).float(), batch.advantages.float()
    pairs = [((batch.groups == g) & ~silent).nonzero()[:, 0].tolist() for g in batch.groups.unique()]
    orders = []
    for exchanged in itertools.product([False, True], repeat=len(pairs)):
        pi = torch.arange(len(batch))
        for (a, b), swap in zip(pairs, exchanged, strict=True):
            pi[a], pi[b] = (b, a) if swap else (a, b)
        orders.append(pi)
    squares = [func.weighted_sum(J, w * A[pi]) for pi in orders]
    rms = {name: torch.stack([one[name] for one in squares]).square().mean(0).sqrt() for name in params}
    assert isinstance(loaded.optimizer, precond.AdamWState)
    P = precond.adamw_response(loaded.optimizer, {**tree.scale(precond.clip_factor(rms, MAX_NORM), rms)})
    K = func.contract(J, J, diagonal=P({name: torch.ones_like(leaf) for name, leaf in params.items()}))
    draws = permutations(batch.groups, 50, permuted=~silent)
    assert bool((draws.orders[:, silent] == torch.arange(len(batch))[silent]).all())
    expected = significance(K, weights_of(batch), batch.advantages, draws)
    found = result.analysis("uncertainty")
    np.testing.assert_allclose(found["p"], expected.influence, atol=1e-12)
    np.testing.assert_allclose(found["prompt_p"], expected.prompts, atol=1e-12)
    assert found.facts["least"] == expected.least.tolist()
    everybody = significance(K, weights_of(batch), batch.advantages, permutations(batch.groups, 50))
    assert not np.allclose(found["p"], everybody.influence)
