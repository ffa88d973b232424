"""A study of some of the parameters is about the whole model; and one analysis that fails does not cost the others."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import fkernel as fk
from fkernel import checkpoint, func, precond, report
from fkernel.precond import AdamWState
from fkernel.study import FisherKernelResults, FisherKernelRunner, prepare
from fkernel.study.analyses import health, parts, structure, sweep
from fkernel.study.config.plan import PreconditionerPlan, StepPlan
from fkernel.study.optimizer_step import response
from fkernel.study.policy import unselected_of
from tests.rollout import conftest as rollout
from tests.study.conftest import MAX_NORM, Run, made

STEP = StepPlan.model_validate({})


def model(place: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(place / "model", attn_implementation="eager").double().eval()


def log_p(net: Any, E: func.Sequences) -> torch.Tensor:
    """The distribution at every position, by plain torch in float64."""
    with torch.no_grad():
        return net(E.input_ids, attention_mask=E.attention_mask).logits[:, :-1].log_softmax(-1)


def S(net: Any, E: func.Sequences) -> np.ndarray:
    each = log_p(net, E).gather(-1, E.input_ids[:, 1:, None])[..., 0]
    return (each * E.response_mask[:, 1:]).sum(1).numpy()


def kl(net: Any, reference: Any, E: func.Sequences) -> np.ndarray:
    p, q = log_p(net, E), log_p(reference, E)
    return ((p.exp() * (p - q)).sum(-1) * E.response_mask[:, 1:]).sum(1).numpy()


@pytest.fixture(scope="module")
def selected(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a study of the MLPs alone finds, its sequences, and the models before, half-way and after."""
    out = tmp_path_factory.mktemp("selected") / "out"
    observables = [{"name": "moved", "kind": "kl", "reference": {"path": str(run.after)}}]
    plan = run.plan(
        out,
        parameters=["*mlp*"],
        step={"clip": 0.5, "after": {"path": str(run.after)}},
        analyses={"ledger": True, "preconditioners": ["identity", "post-step"], "observables": observables},
    )
    runner = FisherKernelRunner(plan)
    results = runner.run()
    results.save_results(out)
    before, half, after = model(run.before), model(run.before), model(run.after)
    half.load_state_dict({n: v for n, v in after.state_dict().items() if "mlp" in n}, strict=False)
    return out, results["held_out"], runner._batches["held_out"].sequences, before, half, after


def test_what_was_realised_is_the_whole_models_change(selected):
    _, result, E, before, half, after = selected
    np.testing.assert_allclose(result.realised, S(after, E) - S(before, E), rtol=1e-3, atol=2e-5)
    np.testing.assert_allclose(result.unselected, S(after, E) - S(half, E), rtol=1e-3, atol=2e-5)
    assert np.abs(result.unselected).max() > 2 * np.abs(result.realised - result.unselected).max() > 1e-3
    own = result.realised - result.unselected  # what the study is about, and predicts up to its clipping
    np.testing.assert_allclose(own, S(half, E) - S(before, E), rtol=1e-3, atol=2e-5)


def test_the_ledger_closes_with_a_line_for_what_was_not_selected(selected):
    out, result, *_ = selected
    found = result.analysis("ledger")
    lines = ("batch", "momentum", "decay", "unexplained", "remainder", "unselected")
    np.testing.assert_allclose(sum(found[name] for name in lines), result.realised, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(found["unselected"], result.unselected)
    read = FisherKernelResults.load(out)
    np.testing.assert_array_equal(read["held_out"].kept("unselected"), result.unselected)
    np.testing.assert_array_equal(read.to_frame()["unselected"].to_numpy(), result.unselected)
    assert "unselected" in json.loads((out / "results.json").read_text())["requests"]["held_out"]["evaluation"][0]


def test_pictures_and_tables_add_up_to_the_whole_models_change(selected):
    _, result, *_ = selected
    found = result.analysis("ledger")
    order = np.argsort(-np.abs(found["realised"]), kind="stable")[:12]
    left = report.ledger_panel(result).axes[0]
    bars = [np.array([bar.get_width() for bar in bars]) for bars in left.containers]
    np.testing.assert_allclose(sum(bars), 1e3 * (found["realised"] - found["remainder"])[order], atol=1e-6)
    assert any("not selected" in str(bars.get_label()) for bars in left.containers)
    assert "not selected" in [str(column.header) for column in report.effects_table(result).columns]
    table = report.ledger_table(result, rows=2)
    heads = [str(column.header) for column in table.columns]
    cells = [[*column.cells] for column in table.columns]
    for row in range(2):
        line = {head: column[row] for head, column in zip(heads, cells, strict=True)}
        parts = ("batch", "momentum", "decay", "unexplained", "remainder", "not selected")
        numbers = {part: float(str(line[part]).replace("−", "-")) for part in (*parts, "realised")}
        assert sum(numbers[part] for part in parts) == pytest.approx(numbers["realised"], abs=0.004)
    kl_found = result.analysis("observables.moved")
    dots = report.observable_panel(result, "moved").axes[0].collections
    (crosses,) = (dot for dot in dots if dot.get_label() == "with what is not selected")
    parts = ("batch", "momentum", "decay", "unselected")
    whole = sum(kl_found[part] for part in parts)
    assert "curvature" not in kl_found.arrays
    np.testing.assert_allclose(np.asarray(crosses.get_offsets())[:, 0], 1e3 * whole, rtol=1e-6)
    rest = report.predicted_vs_realised(result).axes[2].collections[-1]
    left_over = 1e3 * (result.realised - result.predicted - result.unselected)
    np.testing.assert_allclose(np.asarray(rest.get_offsets())[:, 1], left_over, rtol=1e-6, atol=1e-9)


def test_an_agreement_is_with_what_the_selected_parameters_did(selected):
    _, result, *_ = selected
    found = result.analysis("preconditioners")
    rest = result.realised - result.unselected - result.momentum - result.decay
    expected = np.corrcoef(found["influence"][0], rest)[0, 1]
    assert found.facts["agreement"]["identity"]["of_batch"] == pytest.approx(expected, abs=1e-4)


def test_kl_is_to_the_whole_reference_and_so_is_its_change(selected):
    _, result, E, before, half, after = selected
    found = result.analysis("observables.moved")
    np.testing.assert_allclose(found["value"], kl(before, after, E), rtol=0.02, atol=1e-7)
    np.testing.assert_allclose(found["realised"], -kl(before, after, E), rtol=0.02, atol=1e-6)
    np.testing.assert_allclose(found["unselected"], -kl(half, after, E), rtol=0.02, atol=1e-6)


def test_all_parameters_have_no_line_of_others(run, tmp_path):
    runner = FisherKernelRunner(run.plan(tmp_path / "out", parameters=["*"], step={"max_norm": MAX_NORM}))
    runner.prepare_update_workspace().close()
    assert not runner.policy.unselected().after
    other, step = model(run.before), StepPlan.model_validate({"after": {"path": str(run.after)}})
    other.register_parameter("extra", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(fk.PlanError, match="is it the same model's"):
        unselected_of(runner.plan.model_copy(update={"step": step}), replace(runner.checkpoint, model=other), {})


def wrong_shape(apply: Any, temperature: float) -> Any:
    """No observable: it has a value of every token."""
    return func.token_logprobs(apply, temperature)


def failing(rows: Any) -> None:
    raise fk.NonFiniteError("the part of sequence {row} is not finite", row=2)


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Run:
    """A training whose embedding and head are apart: most rows of the embedding were never looked up."""
    config = rollout.Qwen2Config
    monkeypatch.setattr(rollout, "Qwen2Config", lambda **given: config(**{**given, "tie_word_embeddings": False}))
    return made(tmp_path)


@pytest.mark.turns(6)
def test_unseen_coordinates_and_failures_cost_no_other_analysis(unseen, tmp_path, monkeypatch):
    names = ["post-step", "adamw", "rmsprop", "adafactor", "lion", "muon"]
    observables = [
        {"name": "wrong", "kind": "function", "function": "tests.study.test_selected.wrong_shape"},
        {"name": "entropy", "kind": "entropy"},
    ]
    spec = {"ledger": True, "parts": True, "sweep": {"scales": [1.0]}, "preconditioners": names, "covariates": True,
             "observables": observables}  # fmt: skip
    monkeypatch.setattr(parts.PartsAccumulator, "add", lambda self, rows: failing(rows))
    monkeypatch.setattr(sweep, "step_sweep", lambda *given, **more: 1 // 0)
    runner = FisherKernelRunner(unseen.plan(tmp_path / "out", analyses=spec))
    with pytest.warns(UserWarning, match="is left out of the request's analyses; it failed") as heard:
        result = runner.run()["held_out"]
    for name, why in (("parts", "E-002-00: the part of sequence 2"), ("sweep", "by zero"),
                      ("observables.wrong", "expected [n]")):  # fmt: skip
        assert why in result.analysis(name).facts["left_out"]
        assert sum(f"{name} is left out" in str(one.message) for one in heard) == 1
    assert "left_out" not in result.analysis("observables.entropy").facts
    assert result.analysis("covariates").facts["correlations"]
    np.testing.assert_allclose(result.analysis("ledger")["realised"], result.kept("realised"))
    found = result.analysis("preconditioners")
    assert np.isfinite(found["influence"]).all()
    agreement = found.facts["agreement"]
    assert agreement["post-step"]["of_batch"] > 0.9
    state = checkpoint.load(unseen.before).optimizer
    assert isinstance(state, AdamWState)
    assert not state.exp_avg_sq["model.embed_tokens.weight"].all()  # there were unseen ones


def test_an_analysis_of_u_that_fails_costs_no_study(run, tmp_path, monkeypatch):
    def not_converging(*given: Any) -> None:
        raise torch.linalg.LinAlgError("the eigenvalues did not converge")  # pyright: ignore

    monkeypatch.setattr(structure, "kernel_pca", not_converging)
    monkeypatch.setattr(health, "health", lambda *given: failing(None))
    plan = run.plan(tmp_path / "out", analyses={"structure": {}, "health": True, "ledger": True})
    with pytest.warns(UserWarning, match="is left out of the update batch's analyses; it failed") as heard:
        results = FisherKernelRunner(plan).run()
    assert results.analysis("structure").facts["left_out"] == "it failed: the eigenvalues did not converge"
    assert "it failed: U-000-02: the part of" in results.analysis("health").facts["left_out"]
    assert sum("is left out" in str(one.message) for one in heard) == 2
    assert "left_out" not in results["held_out"].analysis("ledger").facts
    told = [str(line) for line in report.update_tables(results)]
    assert any("structure was left out: it failed" in line for line in told)
    wrong = run.plan(tmp_path / "wrong", analyses={"structure": {"clusters": 1000}})
    with pytest.raises(fk.PlanError, match="clusters is 1000"):
        FisherKernelRunner(wrong).run()


def test_a_text_that_was_drawn_twice_is_one_answer(run, tmp_path):
    """Whichever tokens it was written with; what it is worth is weighed by the first."""
    request = {"kind": "evaluation", "name": "few", "batch_size_prompts": 2, "with_replacement": False,
               "completions_per_prompt": 8, "reward": "tests.study.accounted.differs",
               "analyses": {"observables": [{"name": "reward", "kind": "expected_reward"}]}}  # fmt: skip
    sampling = {"temperature": 1.0, "max_new_tokens": 1}
    result = FisherKernelRunner(run.plan(tmp_path / "out", requests=[request], sampling=sampling)).run()["few"]
    prompts: dict[str, dict[str, Any]] = {}
    for info in result.evaluation:
        prompts.setdefault(info.prompt_id, {}).setdefault(info.response, info)
    sizes = [len(texts) for texts in prompts.values()]
    assert min(sizes) < 8  # something was drawn twice
    assert len({*sizes}) > 1  # and not as often of each prompt
    for value, texts in zip(result.analysis("observables.reward")["value"], prompts.values(), strict=True):
        p = np.exp([info.logprob for info in texts.values()])
        assert value == pytest.approx(p @ [info.reward for info in texts.values()] / p.sum(), rel=1e-4)


def test_a_parameter_that_the_loss_never_uses_is_left_alone(run, tmp_path, monkeypatch):
    names = []

    def without(f: Any, params: Any, U: Any) -> frozenset[str]:
        assert not func_unused(f, params, U)  # a language model uses them all
        names.append([*params][-1])
        return frozenset(names[-1:])

    func_unused = prepare.unused_parameters
    monkeypatch.setattr(prepare, "unused_parameters", without)
    runner = FisherKernelRunner(run.plan(tmp_path / "out"))
    runner.prepare_update_workspace().close()
    assert runner._step is not None
    total = runner._step.total
    assert [name for name, leaf in total.items() if not leaf.any()] == names


def test_the_response_of_an_unused_parameter_is_none_at_all():
    params = {"w": torch.ones(2), "u": torch.ones(2)}
    state = precond.adamw_init(params, lr=0.1, weight_decay=0.5)
    ascent = {"w": torch.ones(2), "u": torch.zeros(2)}
    found = response(PreconditionerPlan(), STEP, params, state, ascent, {"u"})
    assert found.step is not None
    assert found.P.d is not None
    assert not found.step.total["u"].any()
    assert not found.P.d["u"].any()
    used = response(PreconditionerPlan(), STEP, params, state, ascent).step
    assert used is not None
    assert used.decay["u"].all()
