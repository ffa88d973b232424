"""A plan's analyses: each is what the low-level function says, is saved and read, and adds up to the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pydantic
import pytest

import fkernel as fk
from fkernel import checkpoint, func
from fkernel.study import FisherKernelPlan, FisherKernelResults, FisherKernelRunner, RequestResult, check_inputs
from tests.study.accounted import EVERYTHING
from tests.study.conftest import MAX_NORM


@pytest.fixture(scope="module")
def study(accounted: Any) -> tuple[dict[str, Any], FisherKernelResults]:
    return accounted


@pytest.fixture(scope="module", params=["held_out", "self"])
def result(study: Any, request: pytest.FixtureRequest) -> RequestResult:
    return study[1][request.param]


@pytest.fixture(scope="module")
def firsts(study: Any, tmp_path_factory: pytest.TempPathFactory) -> FisherKernelResults:
    """The same requests with all gradients at the checkpoint: the first order, and the curvature beside it."""
    plan, _ = study
    changes = {"step": {**plan["step"], "path": "start"}, "capture": {"kernel": True, "curvature": True}}
    spec = {"ledger": True, "tokens": EVERYTHING["tokens"], "observables": plan["analyses"]["observables"]}
    storage = {"workspace": f"{plan['out']}/workspace", "pictures": False}
    out = str(tmp_path_factory.mktemp("firsts") / "out")
    return FisherKernelRunner({**plan, **changes, "analyses": spec, "storage": storage, "out": out}).run()


@pytest.fixture(scope="module")
def first(firsts: Any, result: RequestResult) -> RequestResult:
    return firsts[result.name]


def test_the_ledger_closes(result, first):
    ledger = result.analysis("ledger")
    parts = ("batch", "momentum", "decay", "unexplained", "remainder")
    assert {*ledger.arrays} == {*parts, "realised", "floor"}
    np.testing.assert_allclose(sum(ledger[name] for name in parts), result.realised, rtol=0, atol=1e-9)
    np.testing.assert_allclose(ledger["batch"], result.batch, rtol=1e-6)
    assert ledger.facts["clip"] < 1
    assert (ledger["floor"] > 0).all()
    np.testing.assert_allclose(ledger["momentum"], result.momentum, rtol=1e-6)
    start = first.analysis("ledger").facts
    assert (ledger.facts["path"], start["path"]) == ("midpoint", "start")
    assert ledger.facts["error"] < 0.02
    assert ledger.facts["error"] < start["error"] < 0.1
    left = np.linalg.norm(ledger["remainder"] + ledger["unexplained"]) / np.linalg.norm(ledger["realised"])
    assert left == pytest.approx(result.calibration["predicted"].relative_error, rel=1e-3)
    assert ledger.facts["unexplained"] < 1e-3
    assert 1 <= ledger.facts["floor_scale"] < 20
    assert ledger.facts["floor"] < 0.05


def test_what_the_ledger_at_the_start_leaves_is_the_curvature(first):
    ledger = first.analysis("ledger")
    parts = ("batch", "momentum", "decay", "unexplained", "remainder")
    np.testing.assert_allclose(sum(ledger[name] for name in parts), first.realised, rtol=0, atol=1e-9)
    left = np.linalg.norm(ledger["remainder"] - first.curvature) / np.linalg.norm(first.realised)
    assert left < 0.02
    assert left < 0.5 * ledger.facts["error"]


@pytest.mark.parametrize("path", ["midpoint", "start"])
def test_tokens_add_up(result, first, path):
    """To the prediction along either path; and pairs of tokens to the sequences' contribution."""
    result = {"midpoint": result, "start": first}[path]
    tokens = result.analysis("tokens")
    np.testing.assert_allclose(tokens["logprob"].sum(1), result.predicted, rtol=1e-3, atol=1e-7)
    assert tokens["logprob"].shape == tokens["response"].shape
    for row, texts in enumerate(tokens.facts["tokens"]):
        assert len(texts) == tokens["response"][row].sum()
        if len("".join(texts).encode()) == len(result.evaluation[row].response.encode()):
            assert "".join(texts).startswith(result.evaluation[row].response[:1])
    for pair in tokens.facts["pairs"]:
        e, u = result.row(pair["row"]), result.column(pair["column"])
        np.testing.assert_allclose(tokens[pair["array"]].sum(), result.contributions[e, u], rtol=2e-4, atol=1e-9)
    assert len(tokens.facts["pairs"]) == (result.name == "held_out")


@pytest.mark.parametrize("view", ["kind", "layer"])
def test_parts_add_up(result, view):
    parts = result.analysis("parts")
    np.testing.assert_allclose(parts[f"{view}_batch"].sum(0), result.batch, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(parts[f"{view}_contributions"].sum(0), result.contributions, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(parts[f"{view}_squared_norms"].sum(0), result.squared_norms, rtol=1e-6)
    assert len(parts.facts[f"{view}s"]) == len(parts[f"{view}_batch"])
    assert sum(parts.facts[f"{view}_shares"].values()) == pytest.approx(1)
    assert parts.facts["missed"] > 0


@pytest.mark.parametrize("name", ["entropy", "own", "odds", "reward", "moved"])
def test_observables_are_predicted(study, firsts, name):
    found = study[1]["held_out"].analysis(f"observables.{name}")
    predicted, size = found["batch"] + found["momentum"] + found["decay"], np.linalg.norm(found["realised"])
    assert np.linalg.norm(predicted - found["realised"]) < 0.02 * size
    assert "curvature" not in found.arrays
    start = firsts["held_out"].analysis(f"observables.{name}")
    curved = start["batch"] + start["momentum"] + start["decay"] + start["curvature"]
    assert np.linalg.norm(curved - predicted) < 0.02 * size  # the path has the curvature
    assert np.linalg.norm(curved - predicted) < 0.5 * np.linalg.norm(start["curvature"])
    np.testing.assert_array_equal(start["realised"], found["realised"])
    assert len(found.facts["rows"]) == len(found["value"])
    np.testing.assert_allclose(found["contributions"].sum(1), found["batch"], rtol=1e-9, atol=1e-15)
    assert (np.abs(found["top_contributions"][:, 0]) == np.abs(found["contributions"]).max(1)).all()


def test_a_pair_that_a_request_of_its_own_lacks_is_an_error(run, tmp_path):
    odds = {"name": "odds", "kind": "log_odds", "pairs": [["E-000-00", "E-9"]]}
    request = {"kind": "evaluation", "batch_size_prompts": 2, "analyses": {"observables": [odds]}}
    with pytest.raises(fk.PlanError, match=r"observables.odds.pairs: 'E-9' names no sequence of this request"):
        FisherKernelRunner(run.plan(tmp_path / "out", requests=[request])).run()


def test_an_observable_that_lacks_something_says_so(study):
    lacking = study[1]["self"].analysis("observables.odds")
    assert "none of the pairs" in lacking.facts["left_out"]
    with pytest.raises(fk.ResultsError, match="has no 'batch': none of the pairs"):
        lacking["batch"]


def test_counterfactuals(result, first, study):
    """Of the first order at the checkpoint, with the curvature beside it."""
    same, rloo = (result.analysis(f"counterfactuals.{name}") for name in ("same", "rloo"))
    np.testing.assert_allclose(same["exact"], first.predicted, rtol=1e-4, atol=1e-8)
    assert np.linalg.norm(same["exact"] + same["curvature"] - result.predicted) < 0.1 * np.linalg.norm(first.curvature)
    np.testing.assert_allclose(same["frozen"], same["exact"], rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(same["taken"], first.predicted, rtol=1e-4, atol=1e-8)
    without = result.analysis("counterfactuals.without")
    gone = [i for i, info in enumerate(result.update) if info.id.startswith("U-000-")]
    assert gone
    # Frozen, the rest is linear but for the other clipping factor.
    c = without.facts["clip"] / study[1].step["clip"]
    rest = np.delete(first.contributions, gone, 1).sum(1) * c + first.momentum + first.decay
    np.testing.assert_allclose(without["frozen"], rest, rtol=1e-3, atol=1e-7)
    assert result.analysis("counterfactuals.unclipped").facts["clip"] == 1
    assert rloo.facts["changed"] == {"advantages": "rloo"}
    assert rloo.facts["frozen_error"] > 0


def test_a_counterfactual_is_the_step_that_would_have_been_taken(run, study):
    """Really take the step without one prompt, and hold the prediction against it."""
    loaded = checkpoint.load(run.before)
    apply, params = func.make_functional(loaded.model)
    S = func.sequence_logprob(apply)
    U, result = run.batch.sequences, study[1]["self"]
    weights = run.batch.weighted_advantages.float()
    weights[[name.startswith("U-000-") for name in run.batch.ids]] = 0
    g, _, _ = fk.loss_gradient(S, params, U, weights, max_norm=MAX_NORM)
    assert isinstance(loaded.optimizer, fk.precond.AdamWState)
    step = fk.precond.adamw_step(params, {**g}, loaded.optimizer)
    realised = fk.realised_change(S, params, fk.tree.add(params, step.total), U).numpy()
    without = result.analysis("counterfactuals.without")
    error = np.linalg.norm(without["exact"] + without["curvature"] - realised) / np.linalg.norm(realised)
    assert error < 0.01
    assert np.linalg.norm(result.realised - realised) > 5 * error * np.linalg.norm(realised)


def test_the_optimizers_own_preconditioner_agrees_best(result):
    found = result.analysis("preconditioners")
    table = found.facts["agreement"]
    assert [*table] == found.facts["names"] == ["identity", "post-step", "muon"]
    assert table["post-step"]["of_batch"] > 0.999
    assert table["post-step"]["of_batch"] >= max(row["of_batch"] for row in table.values()) - 1e-9


def test_uncertainty(result):
    found = result.analysis("uncertainty")
    assert (found["low"] <= found["high"]).all()
    np.testing.assert_allclose(found["prompt_contributions"].sum(1), result.batch, rtol=1e-4, atol=1e-9)
    assert (found["p"] > 0).all()
    assert (found["top_p"] <= 1).all()
    assert found["top_p"].shape == result.top.shape
    assert len(found.facts["prompts"]) == found["prompt_p"].shape[1] == 3


def test_covariates(result):
    table = result.analysis("covariates").facts["correlations"]
    assert {"influence", "size", "realised"} == {*table}
    assert {"length", "entropy", "logprob", "reward"} == {*table["influence"]}
    assert table["influence"]["length"]["partial"] is None


def test_the_sweep(result, first):
    sweep = result.analysis("sweep")
    np.testing.assert_allclose(sweep["first"][1], first.predicted, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(sweep["second"][1], first.predicted + first.curvature, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(sweep["realised"][1], result.realised, rtol=0.05, atol=1e-5)
    assert sweep["second_error"][2] < sweep["first_error"][2]


def test_u_itself(study):
    _, results = study
    health, structure = results.analysis("health"), results.analysis("structure")
    assert health.facts["unseen"]["coordinates"] < 0.5
    assert sum(health.facts["by_parameter"].values()) == pytest.approx(1)
    assert sum(structure.facts["sizes"]) == len(results.update) == len(structure["labels"])
    assert {*structure.facts["exemplars"]} <= {info.id for info in results.update}
    assert 0.9 < structure.facts["alignment"] <= 1


def test_what_is_saved_is_what_is_read(study):
    plan, results = study
    read = FisherKernelResults.load(plan["out"])
    pairs = [(results.analyses, read.analyses)]
    pairs += [(results[name].analyses, read[name].analyses) for name in results.requests]
    for ours, theirs in pairs:
        assert [*ours] == [*theirs]
        for name, finding in ours.items():
            assert {*finding.arrays} == {*theirs[name].arrays}
            for key, values in finding.arrays.items():
                np.testing.assert_array_equal(values, theirs[name][key])
            assert theirs[name].facts.keys() == finding.facts.keys()


def test_other_advantages_have_no_ledger_and_say_so(run, tmp_path):
    request = {"kind": "update", "name": "other", "advantages": "rloo"}
    spec = {"ledger": True, "preconditioners": ["identity"], "covariates": True}
    found = FisherKernelRunner(run.plan(tmp_path / "out", requests=[request], analyses=spec)).run()["other"]
    for name in ("ledger", "preconditioners"):
        assert "other advantages than the step" in found.analysis(name).facts["left_out"]
    assert found.analysis("covariates").facts["correlations"]


def test_without_an_optimizer_what_needs_a_step_says_so(run, tmp_path):
    plan = run.plan(
        tmp_path / "out",
        preconditioner={"form": "identity", "calibrated": False},
        checkpoint={"path": str(run.before / "model")},
        step={},
        analyses={**EVERYTHING, "tokens": True, "structure": {"clusters": 2}, "observables": []},
    )
    results = FisherKernelRunner(plan).run()
    found = results["held_out"].analyses
    for name in ("ledger", "sweep", "tokens", "counterfactuals.rloo", "preconditioners"):
        assert "left_out" in found[name].facts
    assert "left_out" not in found["parts"].facts
    assert "second moment" in results.analysis("health").facts["left_out"]


def test_a_request_has_analyses_of_its_own(run, tmp_path):
    requests = [
        {"kind": "evaluation", "name": "one", "batch_size_prompts": 2, "analyses": {"ledger": True}},
        {"kind": "evaluation", "name": "two", "batch_size_prompts": 2},
    ]
    capture = {"kernel": False, "top_k": 0}
    found = FisherKernelRunner(
        run.plan(tmp_path / "out", requests=requests, analyses={"covariates": True}, capture=capture)
    ).run()
    assert [*found["one"].analyses] == ["ledger"]
    assert [*found["two"].analyses] == ["covariates"]
    with pytest.raises(fk.ResultsError, match=r"'two' has covariates of the analyses, and no 'ledger'; ask for it"):
        found["two"].analysis("ledger")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"counterfactuals": [{"name": "nothing"}]}, "changes nothing"),
        (
            {"counterfactuals": [{"name": "a", "lr": 2}, {"name": "a", "lr": 3}]},
            "two counterfactuals have the name 'a'",
        ),
        ({"observables": [{"name": "a", "kind": "kl"}]}, "kind 'kl' needs reference"),
        ({"observables": [{"name": "a", "kind": "entropy", "function": "x.y"}]}, "needs function, and no other kind"),
        ({"preconditioners": ["sgd"]}, "identity"),
        ({"sweep": {"scales": [0.0]}}, "greater than 0"),
        ({"unknown": True}, "unknown"),
    ],
)
def test_mistakes_in_a_plan_are_said(run, tmp_path, spec, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        FisherKernelPlan.model_validate(run.plan(tmp_path, analyses=spec))


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ({"counterfactuals": [{"name": "a", "drop": ["U-9*"]}]}, fk.PlanError, "'U-9\\*' names no sequence of U"),
        ({"counterfactuals": [{"name": "a", "drop_prompts": ["x"]}]}, fk.RolloutError, "the prompts of U"),
        ({"structure": {"clusters": 99}}, fk.PlanError, "clusters is 99, and U has 9"),
        ({"observables": [{"name": "a", "kind": "function", "function": "no.such"}]}, fk.FKernelError, "no.such"),
    ],
)
def test_mistakes_that_only_a_run_sees_are_said(run, tmp_path, spec, error, message):
    with pytest.raises(error, match=message):
        FisherKernelRunner(run.plan(tmp_path / "out", analyses=spec)).run()


def test_what_a_switch_takes():
    plan = FisherKernelPlan.model_validate
    base = {"checkpoint": {"path": "x"}, "update": {"kind": "from_file", "path": "y"}, "out": "z"}
    on, off = (plan({**base, "analyses": {"sweep": switch}}).analyses.sweep for switch in (True, False))
    assert on is not None
    assert len(on.scales) == 25
    assert off is None


def test_rows_in_small_blocks_give_the_same(run, study, tmp_path):
    plan, results = study
    spec = {"ledger": True, "parts": True, "uncertainty": EVERYTHING["uncertainty"]}
    small = {"analyses": spec, "requests": plan["requests"][:1], "numerics": {"microbatch": 1}}
    again = FisherKernelRunner({**plan, **small, "out": str(tmp_path / "out")}).run()
    for name in ("parts", "uncertainty", "ledger"):
        one, two = (made["held_out"].analysis(name) for made in (results, again))
        for key, values in one.arrays.items():
            other = two[key]
            if key in ("remainder", "unexplained", "top_p", "prompt_p", "p"):
                continue
            if key == "floor":  # its scale is measured, on passes that are rounded otherwise
                values, other = values / one.facts["floor_scale"], other / two.facts["floor_scale"]
                assert one.facts["floor_scale"] == pytest.approx(two.facts["floor_scale"], rel=0.3)
            np.testing.assert_allclose(values, other, rtol=2e-3, atol=1e-5 * np.abs(values).max(), err_msg=key)


def test_what_a_plan_names_is_looked_for_before_anything_is_computed(run, tmp_path):
    missing = {"name": "moved", "kind": "kl", "reference": {"path": str(tmp_path / "nowhere")}}
    plan = FisherKernelPlan.model_validate(run.plan(tmp_path / "out", analyses={"observables": [missing]}))
    with pytest.raises(fk.PlanError, match=r"analyses\.observables\.moved\.reference\.path: there is nothing at"):
        check_inputs(plan)
    request = {"kind": "evaluation", "batch_size_prompts": 1, "analyses": {"observables": [
        {"name": "own", "kind": "function", "function": "tests.study.accounted.no_such"}]}}  # fmt: skip
    with pytest.raises(fk.PlanError, match="no_such"):
        check_inputs(FisherKernelPlan.model_validate(run.plan(tmp_path / "out", requests=[request])))
