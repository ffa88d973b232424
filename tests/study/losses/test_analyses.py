"""Analyses are of the loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.study.losses.common import QUIET, at_start, executed


@pytest.fixture(scope="package")
def firsts(study: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same study at the checkpoint, without analyses."""
    plan, _ = study
    out = str(tmp_path_factory.mktemp("firsts") / "out")
    return executed(at_start({**plan, "analyses": {}, "storage": QUIET["storage"], "out": out}))


@pytest.mark.parametrize("name", ["held_out", "self"])
def test_analyses_are_of_the_loss(second, study, firsts, name):
    _, results = study
    found = results[name]
    ledger = found.analysis("ledger")
    parts = ("part.advantage", "part.kl", "momentum", "decay", "unexplained", "remainder")
    np.testing.assert_allclose(sum(ledger[part] for part in parts), found.realised, rtol=0, atol=1e-9)
    assert ledger.facts["error"] < 0.005
    for kind in ("kind", "layer"):
        np.testing.assert_allclose(
            found.analysis("parts")[f"{kind}_contributions"].sum(0), found.contributions, rtol=1e-4, atol=1e-9
        )
    same, half = (found.analysis(f"counterfactuals.{name}") for name in ("same", "half"))
    first = firsts[name]
    np.testing.assert_allclose(same["exact"], first.predicted, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(same["frozen"], first.predicted, rtol=1e-4, atol=1e-8)
    bent = np.linalg.norm(same["curvature"])
    assert np.linalg.norm(same["exact"] + same["curvature"] - found.predicted) < 0.1 * bent
    assert half.facts["clip"] == 1
    c = found.analysis("counterfactuals.without").facts["clip"] / results.step["clip"]
    rest = first.contributions[:, 3:].sum(1) * c + first.parts["kl"] * c + first.momentum + first.decay
    np.testing.assert_allclose(found.analysis("counterfactuals.without")["frozen"], rest, rtol=1e-3, atol=1e-7)
    entropy = found.analysis("observables.entropy")
    predicted = sum(entropy[part] for part in ("batch", "momentum", "decay"))
    assert np.linalg.norm(predicted - entropy["realised"]) < 0.02 * np.linalg.norm(entropy["realised"])
    assert found.analysis("preconditioners").facts["agreement"]["post-step"]["of_batch"] > 0.999
    np.testing.assert_allclose(found.analysis("tokens")["logprob"].sum(1), found.predicted, rtol=1e-3, atol=1e-7)
    if name == "held_out":
        pair, u = found.analysis("tokens")["pair_0"], found.column("U-001-01")
        np.testing.assert_allclose(pair.sum(), found.contributions[0, u], rtol=1e-3)
        along, there = found.contributions[0, u], first.contributions[0, u]
        assert abs(pair.sum() - along) < 0.2 * abs(there - along)  # it is the path that is met, not the checkpoint
    sure = found.analysis("uncertainty")
    assert (sure["low"] <= sure["high"]).all()
    assert (sure["p"] == 1).all()
    assert (sure["top_p"] == 1).all()
    assert sure.facts["informative"] == [False] * 3


def test_u_itself_is_of_the_losss_columns(study):
    _, results = study
    assert 0.9 < results.analysis("structure").facts["alignment"] <= 1
    assert results.self_kernel.kernel[6:].any() == False  # noqa: E712 - no advantage, no column
    assert (results["self"].squared_norms > 0).all()  # rows are ∇S
