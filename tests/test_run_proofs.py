"""The proofs of runs cannot rot: a small instance of each, held to its targets; and the arithmetic of their scores."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import runs, runs_adds_up, runs_cost, runs_culprits, runs_explaind, runs_linear
from fkernel.engine import account


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A small random policy, four and eight steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return runs.quick(tmp_path_factory.mktemp("runs"))


def test_the_account_of_a_small_run_adds_up(results):
    (row,) = results["adds_up"]["rows"]
    for path in runs_adds_up.TARGETS:
        assert runs_adds_up.met(path, row[path]), row
    assert row["replay_used"] < 10 * runs_adds_up.REPLAY


def test_a_sequence_left_out_late_moves_probes_as_predicted(results):
    (row,) = results["linear"]["rows"]
    ours = row["scores"]["step"]["the run's account"]
    assert ours["lds"] > 0.5, row["scores"]["step"]
    assert 0 < ours["factor"] < 3
    assert {*row["scores"]["run"]} == {*row["scores"]["step"]}
    assert len(row["dropped_prompts"]) == len(runs_linear.PROBES)


def test_every_sequence_is_ranked_in_every_way(results):
    (row,) = results["culprits"]["rows"]
    assert 0 < row["guilty"] < row["sequences"] == 32
    assert row["scores"]["reward"]["auroc"] > 0.5
    assert all(0 <= s["auroc"] <= 1 and 0 <= s["at_10"] <= 1 for s in row["scores"].values())


def test_the_page_has_a_line_for_everything(results):
    page = runs.page(results)
    assert page.count("\n## ") == 3
    assert page.count("the run's account |") == 2
    assert "nan" not in page


@pytest.mark.turns(6)
def test_an_account_costs_what_it_says(tmp_path: Path):
    made = runs_cost.measured("tiny", 2, 1, tokens=8)
    assert {*made["ratios"]} == {*made["seconds"]}
    assert made["ratios"]["limit"] == 1.0


def test_ranks_and_scores():
    scores, guilty = np.array([3.0, 1.0, 1.0, 0.0]), np.array([True, False, True, False])
    assert runs_culprits.auroc(scores, guilty) == (1 + 1 + 0.5 + 1) / 4
    assert runs_culprits.precision(scores, guilty, 2) == (1 + 0.5) / 2
    assert runs_linear.spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 8.0, 27.0])) == pytest.approx(1.0)
    truth = np.array([[1.0], [2.0]])
    exact = runs_linear.score_of(truth, np.zeros(1), truth / 2)
    assert (exact["error"], exact["factor"], exact["error_scaled"]) == pytest.approx((0.5, 2.0, 0.0))


def test_the_classifier_beside_explaind_is_accounted_for():
    """Its shape with random weights, one step from v = 0, both moments empty."""
    torch.manual_seed(0)
    shapes = {"input_emb": (15, 8), "linear1": (16, 8), "linear2": (8, 16), "decoder": (15, 8)}
    shapes |= {f"head{i}_{kind}": shape for i in "1234" for kind, shape in (("encoder", (2, 8)), ("decoder", (8, 2)))}
    params = {f"{name}.weight": torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    params |= {"linear1.bias": torch.zeros(16), "linear2.bias": torch.zeros(8)}
    x, y = torch.randint(13, (6, 4)), torch.randint(13, (6,))
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    optimizer = torch.optim.AdamW([*leaves.values()], lr=1e-3, betas=(0.9, 0.98), weight_decay=0.1)
    (-runs_explaind.log_p(leaves, (x, y)).mean()).backward()
    optimizer.step()
    run = {
        "params": [params, {name: leaf.detach() for name, leaf in leaves.items()}],
        "states": [{"exp_avg": {}, "exp_avg_sq": {}}],
        "batches": [{"X": x, "y": y, "indices": torch.arange(6)}],
        "options": {"lr": 1e-3, "betas": (0.9, 0.98), "weight_decay": 0.1},
    }
    made = account(runs_explaind.log_p, (x, y), [*runs_explaind.steps_of(run)])
    assert made.unexplained.norm() < 1e-3 * made.realised.norm()
    assert made.remainder.norm() < 1e-2 * made.realised.norm()
    assert torch.allclose(runs_explaind.by_example(made, run), made.contributions[0])
