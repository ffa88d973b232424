"""Losses that `step.loss` has no name for, explained from their token weights alone: real steps of TRL's trainer.

ω and η are what autograd handed back at the trainer's log-probabilities and entropies; nothing of the loss is modelled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fkernel as fk
from fkernel.rollout import GeneratedBatch, load_batch, save_batch
from fkernel.study import FisherKernelRunner
from tests.study.trl_run import Asked, Trained, held_out, token_weights, trained, update_batch

AT = 5
"""A second inner epoch: its ratios are not 1."""
TWICE = (("num_iterations", 2), ("steps_per_generation", 1))
LOSSES: dict[str, tuple[str, tuple[tuple[str, Any], ...]]] = {
    "cispo, a second inner epoch": ("cispo", (*TWICE, ("epsilon_high", 1.2))),
    "sapo with a KL penalty": ("sapo", (*TWICE, ("beta", 0.05))),
    "grpo on the half of highest entropy, with a bonus": (
        "grpo", (*TWICE, ("top_entropy_quantile", 0.5), ("entropy_coef", 0.01)),
    ),
    "luspo": ("luspo", (*TWICE, ("importance_sampling_level", "sequence"))),
}  # fmt: skip
RULES = {"cispo": "dapo", "sapo": "grpo", "grpo": "grpo", "luspo": "grpo"}
"""Only for weights that records carry beside ω; nothing reads them here."""


def plan_of(run: Trained, place: Path, E: GeneratedBatch, **changes: Any) -> dict[str, Any]:
    plan = run.plan(AT, place / "update", E, analyses={"ledger": True}, capture={"kernel": True})
    step = {**plan["step"], "loss": {"kind": "token_weights"}}
    return {**plan, "step": step, **changes}


@pytest.fixture(scope="module", params=LOSSES)
def explained(request, tmp_path_factory):
    rule, options = LOSSES[request.param]
    place = tmp_path_factory.mktemp("weights")
    run = trained(place, Asked(rule, False, "cosine", 1e-4, max_norm=0.1, options=options))
    run = run._replace(spec=run.spec._replace(rule=RULES[rule]))
    U, E = token_weights(run, AT, update_batch(run, AT)), held_out(run, AT)
    save_batch(U, place / "update")
    return run, place, U, E, FisherKernelRunner(plan_of(run, place, E)).run()


def test_the_step_is_explained_to_the_floor(explained):
    *_, results = explained
    found = results["held_out"]
    ledger = found.analysis("ledger")
    assert found.facts["realised_on"] == "step.after"
    size = np.linalg.norm(ledger["realised"])
    left = np.linalg.norm(ledger["unexplained"] + ledger["remainder"]) / size
    assert ledger.facts["unexplained"] < max(1e-3, ledger.facts["floor"])
    assert ledger.facts["error"] < max(1e-3, 2 * ledger.facts["floor"])
    assert left < max(1e-3, 2 * ledger.facts["floor"]), (left, ledger.facts)
    assert found.calibration["predicted"].relative_error < max(2e-3, 3 * ledger.facts["floor"])
    np.testing.assert_allclose(found.kept("contributions").sum(1), found.batch, rtol=1e-4, atol=1e-8)
    assert np.linalg.norm(found.batch) > 0.1 * np.linalg.norm(found.kept("momentum"))


def test_weights_of_ones_are_not_the_loss(explained):
    """What would be said if every token counted as its advantage says: it is far off, so that ω is what explains."""
    run, place, _, E, results = explained
    plan = plan_of(run, place, E, analyses={})
    wrong = FisherKernelRunner({**plan, "step": {**plan["step"], "loss": None}}).run()["held_out"]
    right = results["held_out"]
    assert np.linalg.norm(wrong.batch - right.batch) > 0.01 * np.linalg.norm(right.batch)


@pytest.mark.turns(6)
def test_parts_add_up_and_are_reweighed(explained, tmp_path):
    run, _, U, E, results = explained
    omega, eta = U.token_weights["loss"], U.entropy_weights
    halves = {"a": 0.25 * omega, "b": 0.75 * omega}
    save_batch(U.with_token_weights(halves, {"b": eta["loss"]} if eta else None), tmp_path / "update")
    analyses = {
        "ledger": True,
        "observables": [{"name": "entropy", "kind": "entropy"}],
        "counterfactuals": [
            {"name": "twice", "parts": {"b": 2}, "observables": [{"name": "entropy", "kind": "entropy"}]},
            {"name": "gone", "parts": {"a": 0, "b": 0}},
            {"name": "without", "drop": ["U-000-*"]},
        ],
        "uncertainty": True,
        "covariates": True,
        "health": True,
        "structure": True,
    }
    plan = plan_of(run, tmp_path, E, analyses=analyses, self_kernel=True, out=str(tmp_path / "out"))
    results_of_parts = FisherKernelRunner({**plan, "storage": {"persist": True, "pictures": False}}).run()
    found, one = results_of_parts["held_out"], results["held_out"]
    np.testing.assert_allclose(found.batch, one.batch, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(found.parts["a"] + found.parts["b"], found.batch, rtol=1e-3, atol=1e-7)
    if not eta:
        np.testing.assert_allclose(3 * found.parts["a"], found.parts["b"], rtol=1e-3, atol=1e-7)
    ledger = found.analysis("ledger")
    lines = [name for name in ledger.arrays if name not in ("realised", "floor")]
    assert lines[:2] == ["part.a", "part.b"]
    np.testing.assert_allclose(sum(ledger[name] for name in lines), found.kept("realised"), rtol=0, atol=1e-9)
    gone = found.analysis("counterfactuals.gone")
    start = found.kept("momentum") + found.kept("decay")
    assert np.linalg.norm(gone["frozen"] - start) < 0.05 * np.linalg.norm(start)  # at the checkpoint, and not midway
    twice = found.analysis("counterfactuals.twice")
    assert {"entropy.exact", "entropy.taken"} <= {*twice.arrays}
    moved = twice["frozen"] - twice["taken"]
    assert twice.facts["clip"] < results.step["clip"] or np.linalg.norm(moved) > 0
    for name, analysis in found.analyses.items():
        assert analysis.skipped is None, (name, analysis.skipped)
    assert {"part.a", "part.b"} <= {*results_of_parts.to_frame().columns}


def test_advantages_of_token_weights_are_not_known(explained, tmp_path):
    run, place, _, E, _ = explained
    plan = plan_of(run, place, E, analyses={"counterfactuals": [{"name": "other", "advantages": "rloo"}]})
    with pytest.raises(fk.PlanError, match="how they depend on the advantages is not known"):
        FisherKernelRunner(plan).run()
    plan = plan_of(run, place, E, analyses={"counterfactuals": [{"name": "other", "parts": {"kl": 2}}]})
    with pytest.raises(fk.PlanError, match="weighs the part 'kl' of the loss, which has"):
        FisherKernelRunner(plan).run()
    plan = plan_of(run, place, E, analyses={"counterfactuals": [{"name": "other", "clip_range": [0.1, 0.3]}]})
    with pytest.raises(fk.PlanError, match="has no clipped ratio"):
        FisherKernelRunner(plan).run()


def test_a_batch_without_token_weights_is_refused(explained, tmp_path):
    run, place, U, E, _ = explained
    bare = load_batch(place / "update")
    records = tuple(
        record.__class__(**{**record.__dict__, "token_weights": {}, "entropy_weights": {}}) for record in bare
    )
    save_batch(GeneratedBatch(records, bare.checkpoint, bare.sampling), tmp_path / "update")
    with pytest.raises(fk.RolloutError, match="token_weights"):
        FisherKernelRunner(plan_of(run, tmp_path, E)).run()
    assert torch.equal(bare.token_weights["loss"], U.token_weights["loss"])
