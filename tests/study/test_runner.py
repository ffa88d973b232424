"""What a study says is what the engine says, what the optimizer did, and the same each time it is asked."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fkernel as fk
from fkernel import checkpoint
from fkernel.rollout import GeneratedBatch, SampleGenerator
from fkernel.study import (
    FisherKernelPlan,
    FisherKernelResults,
    FisherKernelRunner,
    influence_of,
    load_workspace,
    recorded,
    serialize_workspace,
)
from tests.study.conftest import MAX_NORM, Run

EFFECTS = ("batch", "momentum", "decay", "realised", "kernel", "contributions")


def executed(plan: dict[str, Any]) -> FisherKernelResults:
    return FisherKernelRunner(plan).run()


def same(one: FisherKernelResults, other: FisherKernelResults, rtol: float = 0.0) -> None:
    """Equal to the last bit, or nearly."""
    assert list(one.requests) == list(other.requests)
    for name in one.requests:
        assert one[name].evaluation == other[name].evaluation
        for field in (*EFFECTS, "squared_norms", "diagonal", "top", "top_contributions"):
            a, b = getattr(one[name], field), getattr(other[name], field)
            assert (a is None) == (b is None)
            if a is not None:
                atol = 10 * rtol * float(np.abs(b).max())
                np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=f"{name}.{field}")


@pytest.fixture(scope="module")
def study(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], FisherKernelResults]:
    plan = run.plan(tmp_path_factory.mktemp("study") / "out")
    plan["requests"] += [{"kind": "update", "name": "self"}]
    results = executed(plan)
    results.save_results(plan["out"])
    return plan, results


@pytest.fixture(scope="module")
def start(study: Any, tmp_path_factory: pytest.TempPathFactory) -> FisherKernelResults:
    """The same study with all gradients at the checkpoint."""
    plan, _ = study
    return executed({**along(plan, "start", tmp_path_factory.mktemp("start")), "capture": CURVED})


CURVED = {"kernel": True, "curvature": True}


@pytest.mark.parametrize("path", ["midpoint", "start", "gauss2"])
def test_it_is_what_explain_step_says(run, study, start, path, tmp_path):
    plan, results = study  # its path is a plan's default
    if path != "midpoint":
        results = start if path == "start" else executed(along(plan, path, tmp_path))
    loaded = checkpoint.load(run.before)
    apply, params = fk.func.make_functional(loaded.model)
    S = fk.func.sequence_logprob(apply)
    assert loaded.optimizer is not None
    own = run.batch
    effect, step = fk.explain_step(
        S, params, own.sequences, own.sequences, own.weighted_advantages, loaded.optimizer, max_norm=MAX_NORM, path=path
    )
    found = results["self"]
    assert effect.clip < 1
    assert effect.path == found.path == found.facts["path"] == path
    assert results.step["clip"] == pytest.approx(effect.clip, rel=1e-5)
    for name in ("kernel", "contributions", "batch", "momentum", "decay", "predicted"):
        expected = getattr(effect, name).numpy()
        np.testing.assert_allclose(getattr(found, name), expected, rtol=2e-4, atol=1e-5 * np.abs(expected).max())
    J = _gradients(S, params, own, step.total, path)
    np.testing.assert_allclose(found.kept("squared_norms"), [float(fk.tree.norm(g)) ** 2 for g in J], rtol=1e-4)
    for name, v in (("batch", step.batch), ("momentum", step.momentum), ("decay", step.decay)):
        expected = np.array([float(fk.tree.dot(g, v)) for g in J])
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert step.total.keys() == params.keys()


PLACES = {"start": [(1.0, 0.0)], "midpoint": [(1.0, 0.5)], "gauss2": [(0.5, 0.5 - 3**0.5 / 6), (0.5, 0.5 + 3**0.5 / 6)]}


def _gradients(S, params, batch, step, path):
    """Of every sequence, at the path's nodes, by the definition."""
    total = None
    for q, s in PLACES[path]:
        node = {name: leaf + s * step[name] for name, leaf in params.items()}
        J = {name: q * leaf for name, leaf in fk.func.per_sequence_grad(S)(node, batch.sequences).items()}
        total = J if total is None else fk.tree.add(total, J)
    assert total is not None
    return [{name: leaf[i] for name, leaf in total.items()} for i in range(len(batch))]


def along(plan: dict[str, Any], path: str, place: Path) -> dict[str, Any]:
    """The same plan with another path; U's workspace does not depend on it, and is used again."""
    storage = {"workspace": f"{plan['out']}/workspace", "pictures": False}
    return {**plan, "step": {**plan["step"], "path": path}, "out": str(place / path), "storage": storage}


def test_paths_share_a_workspace_and_the_kernel_of_u_is_where_u_is(study, tmp_path):
    """E's gradients move along the path; U's, K_UU and P do not."""
    plan, results = study
    runner = FisherKernelRunner(along(plan, "start", tmp_path))
    start = runner.run()
    assert runner.workspace is not None
    assert runner.workspace.gradients.computed == 0
    assert start.step == results.step
    assert start.self_kernel is not None
    assert results.self_kernel is not None
    np.testing.assert_array_equal(start.self_kernel.kernel, results.self_kernel.kernel)
    for one, other in ((start["self"], results["self"]), (results["self"], start["self"])):
        np.testing.assert_allclose(one.kept("update_diagonal"), other.kept("update_diagonal"), rtol=2e-6)
    np.testing.assert_array_equal(start["self"].kept("realised"), results["self"].kept("realised"))
    own = start.self_kernel.kernel
    assert own is not None
    # At the start, U asked of itself is its own kernel, read and not computed; halfway along, it is near it.
    np.testing.assert_allclose(start["self"].kept("kernel"), own, rtol=1e-4)
    apart = np.linalg.norm(results["self"].kept("kernel") - own)
    assert 1e-4 < apart / np.linalg.norm(own) < 0.2


def test_curvature_is_what_the_start_lacks_and_the_path_has(study, start):
    _, results = study
    for name in ("held_out", "self"):
        there, here = start[name], results[name]
        assert here.curvature is None  # it is not computed unless it is asked for
        assert there.curvature is not None
        difference = here.predicted - there.predicted
        assert np.linalg.norm(difference - there.curvature) < 0.1 * np.linalg.norm(there.curvature)
        np.testing.assert_allclose(there.predicted, there.batch + there.momentum + there.decay, rtol=1e-6)
        error = {each.path: each.calibration["predicted"].relative_error for each in (there, here)}
        assert error["midpoint"] < 0.2 * error["start"]


def test_the_prediction_meets_the_step_that_torch_took(study):
    _, results = study
    for name in ("held_out", "self"):
        calibration = results[name].calibration
        assert set(calibration) == {"batch", "predicted"}
        assert results[name].path == "midpoint"
        assert calibration["predicted"].pearson > 0.999, calibration
        assert abs(calibration["predicted"].slope - 1) < 0.02
        assert calibration["predicted"].relative_error < 0.02
        assert calibration["batch"].relative_error > 0.1  # momentum matters here


def test_the_step_executed_here_is_the_step_that_torch_took(run, study, tmp_path):
    plan, results = study
    step = {"max_norm": MAX_NORM}
    own = executed({**plan, "step": step, "storage": {"persist": False, "pictures": False}})
    np.testing.assert_allclose(
        own["held_out"].kept("realised"), results["held_out"].kept("realised"), rtol=1e-2, atol=2e-5
    )


def test_a_second_run_computes_no_gradient_and_gives_the_same_bits(study):
    plan, results = study
    again = FisherKernelRunner(plan)
    found = again.run()
    assert again.workspace is not None
    assert again.workspace.gradients.computed == 0
    same(found, results)


def test_the_recorded_plan_reproduces_the_results(study, tmp_path):
    plan, results = study
    record = json.loads((Path(plan["out"]) / "plan.json").read_text())
    spec = FisherKernelPlan.model_validate(record)
    assert spec.record() == record
    assert spec.hash == FisherKernelPlan.model_validate(plan).hash == results.environment["plan_hash"]
    same(FisherKernelRunner(spec).run(), results)


def test_in_memory_it_is_the_same(study):
    plan, results = study
    runner = FisherKernelRunner({**plan, "storage": {"persist": False, "pictures": False}})
    same(runner.run(), results, rtol=1e-5)  # where tensors lie in memory decides the order of sums
    assert runner.workspace is not None
    assert runner.workspace.directory is None
    assert runner.workspace.gradients.computed == len(results.update)


def test_what_is_saved_is_what_is_read(study):
    plan, results = study
    again = FisherKernelResults.load(plan["out"])
    same(again, results)
    assert again.step == results.step
    assert again.self_kernel is not None
    assert results.self_kernel is not None
    np.testing.assert_array_equal(again.self_kernel.kernel, results.self_kernel.kernel)
    assert again.self_kernel.effective_rank == results.self_kernel.effective_rank


def test_labelled_arrays(study, tmp_path):
    import xarray as xr

    _, results = study
    row = results["held_out"].row("E-002-00")
    found = results.contributions.sel(eval="E-002-00")
    np.testing.assert_array_equal(found.values, results["held_out"].kept("contributions")[row])
    assert found.dims == ("update",)
    assert float(found.sel(update="U-001-02")) == results["held_out"].kept("contributions")[row, 5]
    assert results.contributions.attrs["units"] == "nats"
    path = results.to_netcdf(tmp_path / "study.nc")
    with xr.open_dataset(path) as again:
        np.testing.assert_array_equal(again["realised"].values, results.to_xarray()["realised"].values)
        assert again["eval"].values.tolist() == results.to_xarray()["eval"].values.tolist()
    frame = results.to_frame("held_out")
    assert frame.loc[("held_out", "E-002-00"), "realised"] == results["held_out"].kept("realised")[row]


@pytest.mark.turns(6)
def test_the_streamed_rows_do_not_depend_on_the_grant(run, study, tmp_path):
    plan, results = study
    changed = {**plan, "numerics": {"microbatch": 2, "memory": "60MB"}, "storage": {"persist": False}}
    runner = FisherKernelRunner({**changed, "storage": {"persist": False, "pictures": False}})
    found = runner.run()
    for name in EFFECTS:
        a, b = (getattr(r["held_out"], name) for r in (found, results))
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max(), err_msg=name)


def test_influence_alone_needs_no_kernel(study):
    plan, results = study
    capture = {"kernel": False, "top_k": 0, "realised": False}
    runner = FisherKernelRunner({**plan, "capture": capture, "self_kernel": False})
    found = runner.run()["held_out"]
    for name in ("batch", "momentum", "decay", "predicted"):  # at the path's nodes, too
        np.testing.assert_allclose(
            getattr(found, name), getattr(results["held_out"], name), rtol=1e-3, atol=1e-6, err_msg=name
        )
    assert (found.kernel, found.top, found.realised, found.curvature) == (None,) * 4
    with pytest.raises(fk.ResultsError, match="kept no contributions"):
        found.kept("contributions")


def test_questions_about_pairs_of_any_batches(run, study):
    plan, results = study
    runner = FisherKernelRunner(plan)
    with runner.prepare_update_workspace() as workspace:
        request = runner.plan.requests[0]
        runner.evaluate_batch(request)
        entry = runner.query("E-001-00", "U-002-01")
        expected = results["held_out"]
        u = workspace.index["U-002-01"]
        assert entry.kernel == pytest.approx(expected.kernel[1, u], rel=1e-4)
        assert entry.contribution == pytest.approx(expected.contributions[1, u], rel=1e-4)
        assert entry.cosine == pytest.approx(expected.cosines[1, u], abs=1e-4)
        assert runner.query("U-002-01", "E-001-00").contribution is None
        assert runner.query("U-002-01", "U-002-01").cosine == pytest.approx(1)
        assert runner.query("E-001-00", "E-001-00").cosine == pytest.approx(1)
        assert runner.query("held_out/E-001-00", "U-002-01").kernel == entry.kernel
        with pytest.raises(fk.RolloutError, match=r"no sequence 'U-002-99'.*near: 'U-002"):
            runner.query("U-002-99", "U-002-01")
        assert workspace.gradients.computed == 0


def test_influence_of_u_on_itself_and_under_other_advantages(run, study, start):
    """Of gradients that the workspace keeps: where they are, at the start."""
    plan, _ = study
    with load_workspace(f"{plan['out']}/workspace") as workspace:
        found = influence_of(workspace)
        np.testing.assert_allclose([*found.values()], start["self"].batch, rtol=1e-3, atol=1e-6)
        silent = influence_of(workspace, ("U-000-*",), dict.fromkeys(workspace.batch.ids, 0.0))
        assert silent == {"U-000-00": 0.0, "U-000-01": 0.0, "U-000-02": 0.0}
        twice = dict(zip(workspace.batch.ids, (2 * workspace.batch.advantages).tolist(), strict=True))
        for name, value in influence_of(workspace, None, twice).items():
            assert value == pytest.approx(2 * found[name], rel=1e-4, abs=1e-8)
        rloo = workspace.batch.with_advantages("rloo").weighted_advantages
        assert influence_of(workspace, None, "rloo")["U-000-00"] == pytest.approx(
            float(start["self"].kept("kernel")[0] @ (workspace.clip * rloo).numpy()), rel=1e-3, abs=1e-7
        )


def test_one_sequences_gradient_raw_and_preconditioned(run, study, start):
    plan, _ = study
    with load_workspace(f"{plan['out']}/workspace") as workspace:
        cache = workspace.cache("U-001-00")
        own = start["self"]
        row = workspace.index["U-001-00"]
        assert cache.norm**2 == pytest.approx(own.kept("squared_norms")[row], rel=1e-4)
        assert cache.preconditioned_norm**2 == pytest.approx(own.kept("diagonal")[row], rel=1e-4)
        assert float(fk.tree.dot(cache.raw, cache.preconditioned)) == pytest.approx(own.kept("diagonal")[row], rel=1e-4)
        assert workspace.cache("U-001-00") is cache
        cache.release()
        assert "raw" not in vars(cache)
        assert float(fk.tree.norm(cache.raw)) == cache.norm


def test_self_kernel_of_some_sequences(study, start):
    plan, _ = study
    with load_workspace(f"{plan['out']}/workspace") as workspace:
        runner = FisherKernelRunner(plan)
        runner.adopt(workspace)
        part = runner.compute_self_kernel(sequence_ids=("U-001-*",), capture_full=True)
        assert part.ids == ("U-001-00", "U-001-01", "U-001-02")
        assert part.kernel is not None
        np.testing.assert_allclose(part.kernel, start["self"].kept("kernel")[3:6, 3:6], rtol=1e-4)
        assert 1 <= part.effective_rank <= 3
        assert part.cross_prompt[2] == 0
        assert runner.compute_self_kernel().kernel is None
        with pytest.raises(fk.RolloutError, match="names no sequence"):
            runner.compute_self_kernel(sequence_ids=("V-*",))


# --------------------------------------------------------------------------------------------------- kinds of requests


def callback(generator: SampleGenerator) -> GeneratedBatch:
    return generator.build_custom_sequence("3+4=", "8")


@pytest.mark.turns(6)
def test_every_kind_of_request_and_its_filters(run, study, tmp_path):
    plan, _ = study
    given = replace(run.batch, records=run.batch.records[:2])
    requests = [
        {"kind": "update", "name": "own", "sequence_ids": ["U-001-*"]},
        {"kind": "update", "name": "another", "batch_size_prompts": 2, "completions_per_prompt": 2, "reward": None,
         "weights": None, "seed": 8},
        {"kind": "evaluation", "batch_size_prompts": 3, "sequence_ids": ["E-002-*", "E-000-00"]},
        {"kind": "prompt_ids", "prompt_ids": ["test-000001", 0], "completions_per_prompt": 2},
        {"kind": "custom_prompts", "prompts": ["1+1=", "2+2="]},
        {"kind": "custom_sequence", "prompt": "3+4=", "response": "7"},
        {"kind": "custom_sequence", "prompt": "3+4=", "response": "8", "metadata": {"why": "wrong on purpose"}},
        {"kind": "from_file", "path": str(run.update), "sequence_ids": ["U-002-00"]},
        {"kind": "payload", "name": "written", "samples": [
            {"prompt": "a", "response": "b"}, {"prompt": "a", "response": "c", "name": "good-one"}
        ]},
        {"kind": "payload", "name": "called", "callback": "tests.study.test_runner.callback"},
        {"kind": "payload", "name": "handed", "batch": given},
    ]  # fmt: skip
    runner = FisherKernelRunner({**plan, "out": str(tmp_path / "out"), "requests": requests, "self_kernel": False})
    results = runner.run()
    ids = {name: [info.id for info in result.evaluation] for name, result in results.requests.items()}
    assert ids["own"] == ["U-001-00", "U-001-01", "U-001-02"]
    assert ids["another"] == ["U-000-00", "U-000-01", "U-001-00", "U-001-01"]
    assert ids["evaluation"] == ["E-000-00", "E-002-00"]
    assert ids["prompt_ids"] == ["P-000-00", "P-000-01", "P-001-00", "P-001-01"]
    assert len(ids["custom_prompts"]) == 2
    assert ids["from_file"] == ["U-002-00"]
    assert ids["written"] == ["probe-1", "good-one"]
    assert [ids["probe-1"], ids["probe-2"]] == [["probe-1"], ["probe-2"]]
    called, second = results["called"].evaluation[0], results["probe-2"].evaluation[0]
    assert called.id == f"C-{called.content_hash}-00"
    assert called.content_hash == second.content_hash
    assert ids["handed"] == ["U-000-00", "U-000-01"]
    own = FisherKernelResults.load(plan["out"])["self"]
    np.testing.assert_allclose(results["own"].kept("kernel"), own.kept("kernel")[3:6], rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(results["handed"].kept("kernel"), own.kept("kernel")[:2], rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(results["from_file"].kept("kernel")[0], own.kept("kernel")[6], rtol=1e-3, atol=1e-7)
    assert results.plan["requests"][-1]["kind"] == "from_file"
    runner.save_batches(tmp_path / "out")
    same_again = FisherKernelRunner({**results.plan, "out": str(tmp_path / "out")}).run()
    same(same_again, results)


def test_at_the_start_u_is_read_and_not_computed_again(study, start, tmp_path, monkeypatch):
    from fkernel.study import rows

    plan, _ = study
    spec = {**along(plan, "start", tmp_path), "requests": [
        {"kind": "update", "name": "own", "sequence_ids": ["U-001-*"]}, {"kind": "update", "name": "all"},
    ]}  # fmt: skip
    monkeypatch.setattr(rows, "blocks", lambda *given: pytest.fail("gradients of E were computed"))
    found = executed(spec)
    np.testing.assert_array_equal(found["all"].kept("kernel"), start["self"].kept("kernel"))
    np.testing.assert_array_equal(found["own"].kept("kernel"), start["self"].kept("kernel")[3:6])


def test_the_wrong_answer_is_a_probe_that_moves_differently(study, tmp_path):
    plan, _ = study
    wrong = {"kind": "payload", "samples": [{"prompt": "3+4=", "response": "7"}, {"prompt": "3+4=", "response": "9"}]}
    found = executed({**plan, "requests": [wrong], "out": str(tmp_path)})["payload"]
    assert found.evaluation[0].response == "7"
    assert found.predicted[0] != found.predicted[1]


@pytest.mark.parametrize("advantages", ["rloo", {"U-000-00": 3.0, "U-001-02": 7.0}])
def test_other_advantages_for_one_request(run, study, tmp_path, advantages):
    plan, results = study
    request = {"kind": "evaluation", "name": "held_out", "batch_size_prompts": 4, "advantages": advantages}
    found = executed({**plan, "requests": [request], "out": str(tmp_path)})["held_out"]
    np.testing.assert_array_equal(found.kept("kernel"), results["held_out"].kept("kernel"))
    assert found.realised is None  # no such step was taken
    A = run.batch.advantages
    other = run.batch.with_advantages(advantages).advantages if isinstance(advantages, str) else A.clone()
    if isinstance(advantages, dict):
        other[0], other[5] = 3.0, 7.0
    expected = results["held_out"].kept("kernel") * (results.step["clip"] * other / len(A)).numpy()
    assert not torch.equal(other, A)
    np.testing.assert_allclose(found.kept("contributions"), expected, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(found.batch, expected.sum(1), rtol=1e-3, atol=1e-7)


def test_selected_entries_are_kept_without_the_rest(study, tmp_path):
    plan, results = study
    capture = {
        "pairs": [["E-001-00", "U-000-02"]],
        "submatrices": [{"rows": ["E-00[02]-00"], "columns": ["U-001-*"]}],
        "top_k": 2,
    }
    found = executed({**plan, "capture": capture, "out": str(tmp_path)})["held_out"]
    assert found.kernel is None
    assert len(found.selected) == 1 + 2 * 3
    for entry in found.selected:
        e, u = results["held_out"].row(entry.row), [i.id for i in results.update].index(entry.column)
        assert entry.kernel == pytest.approx(results["held_out"].kept("kernel")[e, u], rel=1e-4)
        assert entry.contribution == pytest.approx(results["held_out"].kept("contributions")[e, u], rel=1e-4)
        assert entry.cosine == pytest.approx(results["held_out"].cosines[e, u], abs=1e-5)
    best = np.abs(results["held_out"].kept("contributions")[0]).argsort()[::-1][:2]
    assert found.kept("top")[0].tolist() == best.tolist()
    own = {**plan["requests"][0], "capture": {"pairs": [["E-999-00", "U-000-00"]]}}
    with pytest.raises(fk.PlanError, match=r"requests\.0\.capture\.pairs: 'E-999-00' names no sequence of the request"):
        executed({**plan, "requests": [own], "out": str(tmp_path)})


def test_a_pair_of_the_plan_that_no_request_has_is_said(study, tmp_path):
    plan, _ = study
    capture = {"pairs": [["E-001-00", "U-000-02"], ["E-999-00", "U-000-00"]]}
    with pytest.raises(fk.PlanError, match=r"capture\.pairs: 'E-999-00' names no sequence of the request"):
        executed({**plan, "capture": capture, "out": str(tmp_path)})
    results = executed({**plan, "capture": {"pairs": capture["pairs"][:1]}, "out": str(tmp_path)})
    assert [entry.row for entry in results["held_out"].selected] == ["E-001-00"]
    assert results["self"].selected == ()


def test_a_workspace_in_memory_can_be_written(run, study, tmp_path):
    plan, results = study
    runner = FisherKernelRunner({**plan, "storage": {"persist": False, "pictures": False}})
    with runner.prepare_update_workspace() as workspace:
        place = serialize_workspace(workspace, tmp_path / "kept")
    with load_workspace(place) as again:
        assert serialize_workspace(again, tmp_path / "elsewhere") == place
        np.testing.assert_array_equal(again.self_kernel().numpy(), results.self_kernel.kernel)


def test_the_log_has_phases_versions_and_counts(study, tmp_path):
    plan, _ = study
    with recorded(tmp_path / "log.jsonl"):
        executed({**plan, "out": str(tmp_path / "out")})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    first = lines[0]
    assert {"versions", "git", "plan_hash", "seed", "threads"} <= set(first)
    ended = {line["phase"]: line for line in lines if line.get("event") == "end"}
    assert {"loading the checkpoint", "preparing the workspace", "request held_out"} <= set(ended)
    assert all(line["seconds"] >= 0 and line["peak_mb"] > 0 for line in ended.values())
    assert ended["preparing the workspace"]["gradients_computed"] == 9
    assert logging.getLogger("fkernel").handlers == [logging.getLogger("fkernel").handlers[0]]
