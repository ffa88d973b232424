"""Cosines, spectra and blocks against what they are by definition."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fkernel.report import structure_panel
from fkernel.report.analysis_tables import structure_table
from fkernel.study import FisherKernelRunner
from fkernel.study.diagnostics import BlockTally, cosines, spectrum, top_contributors
from fkernel.study.outcome import SelfKernel


@pytest.fixture
def J():
    return torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_cosines_are_those_of_the_vectors(J):
    K = J @ J.T
    expected = torch.nn.functional.cosine_similarity(J[:, None], J[None], dim=-1)
    torch.testing.assert_close(cosines(K, K.diagonal(), K.diagonal()), expected)


@pytest.mark.parametrize(("values", "rank"), [([1.0] * 5, 5.0), ([1.0, 0, 0, 0], 1.0), ([0.0] * 3, 0.0)])
def test_effective_rank_counts_equal_directions(values, rank):
    found = spectrum(torch.diag(torch.tensor(values)))
    assert found.effective_rank == pytest.approx(rank)
    assert found.participation == pytest.approx(rank)


def test_effective_rank_of_unequal_directions():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    found = spectrum(torch.diag(7 * p))
    assert found.effective_rank == pytest.approx(math.exp(-float((p * p.log()).sum())))
    assert found.participation == pytest.approx(1 / float(p.square().sum()))
    assert found.eigenvalues.tolist() == sorted(found.eigenvalues.tolist(), reverse=True)


def test_blocks_do_not_depend_on_how_rows_come(J):
    K = J @ J.T
    cosine = cosines(K, K.diagonal(), K.diagonal())
    same = torch.tensor([[a // 2 == b // 2 for b in range(6)] for a in range(6)])
    whole, parts = BlockTally(), BlockTally()
    whole.add(K, cosine, same)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        parts.add(K[rows], cosine[rows], same[rows])
    for one, other in zip(whole.blocks, parts.blocks, strict=True):
        assert one == pytest.approx(other)
    assert whole.blocks.same_prompt[0] == pytest.approx(float(K[same].mean()))
    assert whole.blocks.cross_prompt[1] == pytest.approx(float(cosine[~same].abs().mean()))
    assert whole.blocks.same_prompt[2] + whole.blocks.cross_prompt[2] == 36


def test_blocks_are_of_different_sequences(run, tmp_path):
    """Of U against itself as of U's own kernel; a batch of others counts every pair."""
    requests = [{"kind": "evaluation", "name": "held_out", "batch_size_prompts": 2}, {"kind": "update", "name": "self"}]
    plan = run.plan(tmp_path / "out", requests=requests)
    plan["step"] |= {"path": "start"}  # where U's own kernel is
    results = FisherKernelRunner(plan).run()
    own, blocks = results.self_kernel, results["self"].facts["blocks"]
    n = len(results.update)
    for kind in ("same_prompt", "cross_prompt"):
        assert blocks[kind] == pytest.approx(getattr(own, kind), rel=1e-6)
    assert blocks["same_prompt"][2] + blocks["cross_prompt"][2] == n * (n - 1)
    held_out = results["held_out"]
    assert sum(block[2] for block in held_out.facts["blocks"].values()) == n * len(held_out.evaluation)


@pytest.mark.parametrize(("alignment", "shown"), [(None, None), (0.0, "0.0000"), (-0.25, "-0.2500")])
def test_an_alignment_that_there_is_none_of_is_left_out(accounted, alignment, shown):
    structure = accounted[1].analysis("structure")
    one = replace(structure, facts=structure.facts | {"alignment": alignment})
    results = replace(accounted[1], analyses=accounted[1].analyses | {"structure": one})
    caption = str(structure_table(results).caption)
    title = structure_panel(results).axes[0].get_title(loc="left")
    for text, name in ((caption, "alignment with K_UU"), (title, "alignment with K after")):
        assert (name in text) == (shown is not None)
        assert shown is None or shown in text


def test_top_contributors_are_by_size_and_keep_their_sign():
    columns, values = top_contributors(torch.tensor([[1.0, -5.0, 3.0], [0.0, 0.0, -1.0]]), 2)
    assert columns.tolist() == [[1, 2], [2, 0]]
    assert values.tolist() == [[-5.0, 3.0], [-1.0, 0.0]]
    assert top_contributors(torch.ones(1, 2), 9)[0].shape == (1, 2)


def test_a_zero_gradient_has_no_norm_ratio():
    for diagonal, ratio in (([0.0, 4.0], None), ([1.0, 4.0], 2.0)):
        none: tuple[None, None, int] = (None, None, 0)
        own = SelfKernel(("a", "b"), np.ones(2), 1.0, 1.0, np.ones(2), np.array(diagonal), none, none)
        assert own.norm_ratio == ratio
