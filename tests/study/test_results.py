"""Finished results: what is saved is what is read, whole or refused; tables and pictures show it."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from fkernel import report
from fkernel.cli import app
from fkernel.errors import ResultsError, StoreError
from fkernel.io import checksum, checksummed_json
from fkernel.study import (
    AnalysisResult,
    Entry,
    FisherKernelPlan,
    FisherKernelResults,
    FisherKernelRunner,
    RequestResult,
    SelfKernel,
    SequenceInfo,
    claimed,
)

VECTORS = ("batch", "momentum", "decay", "curvature", "realised", "squared_norms", "diagonal")


@pytest.fixture
def result() -> RequestResult:
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 4)).astype(np.float32)
    weights = np.array([0.5, -0.5, 0.25, -0.25], dtype=np.float32)
    contributions = 0.5 * kernel * weights
    momentum, decay, curvature = (rng.normal(size=3).astype(np.float32) * s for s in (0.3, 1e-3, 1e-2))
    batch = contributions.sum(1)
    top = np.argsort(-np.abs(contributions), axis=1)[:, :3]
    return RequestResult(
        name="held_out",
        kind="evaluation",
        evaluation=tuple(
            SequenceInfo(f"E-00{i}-00", f"{i}+{i}=", str(2 * i), -1.5, 1.0, prompt_id=f"test-{i}") for i in range(3)
        ),
        update=tuple(
            SequenceInfo(f"U-00{i // 2}-0{i % 2}", f"[{i // 2}]=", "x", -2.0, 0.0, 0.5, 0.25, f"train-{i // 2}")
            for i in range(4)
        ),
        batch=batch,
        momentum=momentum,
        decay=decay,
        curvature=curvature,
        realised=batch + momentum + decay + np.float32(1e-3),
        squared_norms=np.array([1.0, 4.0, 9.0]),
        diagonal=np.array([9.0, 9.0, 9.0]),
        update_diagonal=np.array([9.0, 16.0, 9.0, 9.0]),
        top=top,
        top_contributions=np.take_along_axis(contributions, top, 1),
        kernel=kernel,
        contributions=contributions,
        selected=(Entry("E-000-00", "U-000-01", 0.5, 0.1, 0.2),),
        facts={"blocks": {"same_prompt": [None, None, 0], "cross_prompt": [0.1, 0.2, 12]}, "path": "gauss2"},
    )


@pytest.fixture
def results(result) -> FisherKernelResults:
    bare = dataclasses.replace(
        result, name="influence", momentum=None, decay=None, curvature=None, realised=None, squared_norms=None,
        diagonal=None, update_diagonal=None, top=None, top_contributions=None, kernel=None, contributions=None,
        selected=(), facts={},
    )  # fmt: skip
    own = SelfKernel(
        tuple(u.id for u in result.update), np.array([4.0, 2.0, 1.0, 0.5]), 3.1, 2.8, np.ones(4), np.ones(4),
        (0.5, 0.6, 4), (0.1, 0.2, 8), np.eye(4),
    )  # fmt: skip
    plan = {"preconditioner": {"calibrated": True}}
    step = {"clip": 0.5, "grad_norm": 2.0, "lr": [1e-5]}
    return FisherKernelResults(plan, {"torch": "2"}, result.update, step, own, {"held_out": result, "influence": bare})


def test_what_is_saved_is_what_is_read(results, tmp_path):
    again = FisherKernelResults.load(results.save_results(tmp_path / "out"))
    assert again.update == results.update
    for name, result in results.requests.items():
        read = again[name]
        assert (read.evaluation, read.update, read.selected, read.facts) == (
            result.evaluation, result.update, result.selected, result.facts,
        )  # fmt: skip
        for field in (*VECTORS, "update_diagonal", "top", "top_contributions", "kernel", "contributions"):
            np.testing.assert_array_equal(getattr(read, field), getattr(result, field))
    assert (again.step, again.plan, again.environment) == (results.step, results.plan, results.environment)
    assert again.self_kernel is not None
    assert results.self_kernel is not None
    assert again.self_kernel.same_prompt == results.self_kernel.same_prompt
    np.testing.assert_array_equal(again.self_kernel.eigenvalues, results.self_kernel.eigenvalues)
    files = ["environment.json", "kernel.npz", "plan.json", "results.json"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == files


@pytest.mark.parametrize("name", ["self", "update"])
def test_a_request_may_have_any_name_but_one(results, tmp_path, name):
    """Arrays of U against itself are kept under `update_batch`, which a plan gives to no request."""
    found = dataclasses.replace(results.requests["held_out"], name=name)
    health = {"health": AnalysisResult({"x": np.ones(2)}, {"y": 1})}
    given = dataclasses.replace(results, requests={name: found}, analyses=health)
    again = FisherKernelResults.load(given.save_results(tmp_path / "out"))
    assert again.self_kernel is not None
    np.testing.assert_array_equal(again.self_kernel.kernel, results.self_kernel.kernel)
    np.testing.assert_array_equal(again[name].kernel, found.kernel)
    np.testing.assert_array_equal(again.analysis("health")["x"], np.ones(2))
    assert again.analysis("health").facts == {"y": 1}


def test_json_says_what_a_reader_needs(results, tmp_path):
    results.save_results(tmp_path)
    data = json.loads((tmp_path / "results.json").read_text())["requests"]["held_out"]
    row = data["evaluation"][0]
    assert row["predicted"] == pytest.approx(row["batch"] + row["momentum"] + row["decay"], rel=1e-5)
    assert row["curvature"] == pytest.approx(
        float(results["held_out"].curvature[0])
    )  # beside the prediction, not in it
    assert data["facts"]["path"] == "gauss2"
    assert not {"first_order", "second_order"} & {*row}
    top = row["top_contributors"]
    assert [abs(t["value"]) for t in top] == sorted((abs(t["value"]) for t in top), reverse=True)
    C = results["held_out"].contributions[0]
    best = np.abs(C).argmax()
    assert top[0] == {"id": results.update[best].id, "value": pytest.approx(float(C[best]))}
    assert set(data["calibration"]) == {"batch", "predicted"}


def test_every_field_of_the_json_is_documented(results, tmp_path):
    from pathlib import Path

    results.save_results(tmp_path)
    data = json.loads((tmp_path / "results.json").read_text())
    page = (Path(__file__).parents[2] / "docs" / "results.md").read_text()
    request = data["requests"]["held_out"]
    fields = [*data, *data["self_kernel"], *request, *request["evaluation"][0], *request["selected"][0]]
    assert [name for name in fields if not re.search(rf"[`.]{name}\b", page)] == []
    with np.load(tmp_path / "kernel.npz", allow_pickle=False) as file:
        names = {name.removeprefix("held_out/").removeprefix("influence/") for name in file.files}
    assert [name for name in names if not re.search(rf"[`./]{name}\b", page)] == []


def test_arrays_load_without_pickle_and_carry_their_ids(results, tmp_path):
    results.save_results(tmp_path)
    with np.load(tmp_path / "kernel.npz", allow_pickle=False) as file:
        assert file["held_out/evaluation_ids"].tolist() == [s.id for s in results["held_out"].evaluation]
        assert file["update_ids"].tolist() == [s.id for s in results.update]
        assert file["held_out/contributions"].shape == (3, 4)
        assert "influence/kernel" not in file


def test_calibration_sees_a_wrong_scale_that_correlation_misses(result):
    scaled = dataclasses.replace(result, realised=result.predicted / 2)
    value = scaled.calibration["predicted"]
    assert value.pearson == pytest.approx(1.0)
    assert value.slope == pytest.approx(0.5)
    assert value.relative_error == pytest.approx(1.0)


def test_a_prediction_is_all_that_moved_the_sequence_and_nothing_beside(result):
    np.testing.assert_allclose(result.predicted, result.batch + result.momentum + result.decay, rtol=1e-6)
    rounded = dataclasses.replace(result, arithmetic=np.ones(3, dtype=np.float32), unexplained=np.ones(3))
    np.testing.assert_allclose(rounded.predicted, result.predicted + 1, rtol=1e-6)
    assert (rounded.predicted != result.predicted).all()
    bare = dataclasses.replace(result, momentum=None, decay=None)
    np.testing.assert_array_equal(bare.predicted, result.batch)
    assert set(bare.calibration) == {"batch"}
    assert (result.path, dataclasses.replace(result, facts={}).path) == ("gauss2", "start")


def test_cosines_and_lookups(result):
    assert result.cosines[0, 1] == pytest.approx(result.kernel[0, 1] / 12)
    assert (result.row("E-002-00"), result.column("U-001-01")) == (2, 3)
    with pytest.raises(ResultsError, match=r"no sequence 'E-9'; it has 'E-000-00'"):
        result.row("E-9")


def test_labelled_arrays_tell_what_is_missing(results):
    found = results.to_xarray()
    assert dict(found.sizes) == {"eval": 6, "update": 4}
    rows = found["contributions"].sel(eval="E-001-00")
    assert rows.sizes["eval"] == 2  # one of each request
    assert found["request"].sel(eval="E-001-00").values.tolist() == ["held_out", "influence"]
    assert np.isnan(found["realised"].values[3:]).all()
    one = results.to_xarray("held_out")["contributions"].sel(eval="E-001-00", update="U-001-00")
    assert float(one) == results["held_out"].contributions[1, 2]
    with pytest.raises(ResultsError, match="no request 'nothing'"):
        results.to_xarray("nothing")
    bare = dataclasses.replace(results, requests={"influence": results["influence"]})
    with pytest.raises(ResultsError, match="No request kept its contributions"):
        bare.contributions  # noqa: B018
    frame = results.to_frame()
    assert frame.loc[("held_out", "E-000-00"), "top_contributor"] == results["held_out"].top_contributors(0)[0][0].id


@pytest.mark.parametrize(
    "broken", [{"step": {"clip": float("nan")}}, {"environment": {"a": "\ud800"}}, {"environment": {"a": {1}}}]
)
def test_results_that_cannot_be_written_leave_the_old_ones(results, tmp_path, broken):
    results.save_results(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ResultsError, match="cannot be written"):
        dataclasses.replace(results, **broken).save_results(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_over_results_never_leaves_old_and_new_together(results, tmp_path, monkeypatch):
    results.save_results(tmp_path)

    def stopped(*_: object, **__: object) -> None:
        raise OSError("stopped")

    monkeypatch.setattr(np, "savez", stopped)
    with pytest.raises(OSError, match="stopped"):
        results.save_results(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ResultsError, match=r"no readable results\.json"):
        FisherKernelResults.load(tmp_path)
    results.save_results(tmp_path)
    assert FisherKernelResults.load(tmp_path).step == results.step
    assert len(list(tmp_path.iterdir())) == 4


def edited(place, change, sealed=True):
    """Change results.json, and seal it again."""
    path = place / "results.json"
    data = json.loads(path.read_text())
    change(data)
    del data["seal"]
    path.write_bytes(checksummed_json(data) if sealed else json.dumps(data).encode())


@pytest.mark.parametrize("fault", ["no json", "no arrays", "empty", "newer", "other ids", "truncated", "lacking"])
def test_unfit_directories_are_refused(results, tmp_path, fault):
    results.save_results(tmp_path)
    arrays = tmp_path / "kernel.npz"
    if fault == "no json":
        (tmp_path / "results.json").unlink()
    elif fault == "no arrays":
        arrays.unlink()
    elif fault == "empty":
        arrays.write_bytes(b"")
    elif fault == "truncated":
        arrays.write_bytes(arrays.read_bytes()[:100])
    elif fault == "newer":
        edited(tmp_path, lambda data: data.update(schema=99))
    elif fault == "other ids":
        edited(tmp_path, lambda data: data["update"][0].update(id="U-999-99"))
    else:
        edited(tmp_path, lambda data: data["requests"]["held_out"].pop("kind"))
    expected = {"newer": "schema 99", "other ids": "different sequences", "lacking": "damaged"}.get(
        fault, "no readable"
    )
    with pytest.raises(ResultsError, match=expected):
        FisherKernelResults.load(tmp_path)


def test_an_edited_number_is_refused(results, tmp_path):
    """By the seal; and, where it is sealed again, since the arrays say another one."""
    results.save_results(tmp_path)
    row = "requests", "held_out", "evaluation", 0

    def doubled(data):
        for key in row:
            data = data[key]
        data["realised"] *= 2

    edited(tmp_path, doubled, sealed=False)
    with pytest.raises(ResultsError, match="checksum differs"):
        FisherKernelResults.load(tmp_path)
    results.save_results(tmp_path)
    edited(tmp_path, doubled)
    with pytest.raises(ResultsError, match=r"differ in requests\.held_out\.evaluation\.0\.realised"):
        FisherKernelResults.load(tmp_path)


@pytest.mark.parametrize("name", ["kernel.npz", "plan.json"])
def test_a_file_of_another_run_is_refused(results, tmp_path, name):
    results.save_results(tmp_path / "one")
    own = dataclasses.replace(results.self_kernel, kernel=2 * np.eye(4))
    other = dataclasses.replace(results, plan={**results.plan, "seed": 1}, environment={"torch": "3"}, self_kernel=own)
    other.save_results(tmp_path / "two")
    shutil.copy(tmp_path / "two" / name, tmp_path / "one")
    with pytest.raises(ResultsError, match=rf"{name} is not the file that was written with"):
        FisherKernelResults.load(tmp_path / "one")


@pytest.mark.parametrize(("name", "value"), [("top", -1), ("top", 4), ("realised", np.nan), ("kernel", np.inf)])
def test_arrays_that_no_run_writes_are_refused(results, result, tmp_path, name, value):
    """Whoever wrote them sealed them."""
    array = getattr(result, name).copy()
    array.flat[0] = value
    wrong = dataclasses.replace(results, requests={"held_out": result})
    wrong.save_results(tmp_path)
    with np.load(tmp_path / "kernel.npz") as file:
        arrays = {**file, f"held_out/{name}": array}
    np.savez(tmp_path / "kernel.npz", **arrays)
    edited(tmp_path, lambda data: data["sha256"].update({"kernel.npz": checksum(tmp_path / "kernel.npz")}))
    with pytest.raises(ResultsError, match=f"{name} of the request 'held_out'"):
        FisherKernelResults.load(tmp_path)


def test_two_runs_into_one_directory_are_refused(run, tmp_path):
    plan = FisherKernelPlan.model_validate(run.plan(tmp_path / "out"))
    with claimed(plan):
        with pytest.raises(StoreError, match="is in use by process"), claimed(plan):
            pass
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(run.plan(tmp_path / "out")))
        refused = CliRunner().invoke(app, ["run", str(tmp_path / "plan.yaml")])
    assert refused.exit_code == 2
    assert "is in use by process" in refused.output
    with claimed(plan):
        pass


def test_tables_show_every_part_and_the_culprits(results, result):
    console = Console(width=200, record=True)
    console.print(report.effects_table(result, rows=2))
    console.print(report.calibration_table(result))
    console.print(report.effects_table(results["influence"]))
    console.print(report.pair_view(result, "E-001-00", "U-001-00"))
    for line in report.study_lines(results):
        console.print(line)
    text = console.export_text()
    largest = np.abs(result.realised).argmax()
    assert result.evaluation[largest].id in text
    assert f"{1e3 * result.realised[largest]:+.2f}".replace("-", "−") in text
    for column in ("batch", "momentum", "decay", "realised", "gauss2", "Pearson r", "slope", "relative error"):
        assert column in text
    assert "[0]=" in text or "[1]=" in text  # brackets in a prompt are text, not markup
    assert f"{1e3 * result.contributions[1, 2]:+.3f}" in text
    assert "effective rank" in text


def test_pictures_have_a_symmetric_scale_whose_zero_is_white(result, tmp_path):
    figure = report.heatmap(result, tmp_path / "heatmap.png")
    image = figure.axes[0].images[0]
    low, high = image.get_clim()
    assert low == -high
    assert image.cmap(0.5)[:3] == pytest.approx((1, 1, 1), abs=0.02)
    assert (tmp_path / "heatmap.png").read_bytes().startswith(b"\x89PNG")


def test_every_picture_that_there_are_numbers_for_is_drawn(results, tmp_path):
    found = {path.name for path in report.draw_all(results, tmp_path / "pictures")}
    kinds = ("contributors", "heatmap", "influence", "predicted_vs_realised")
    assert found == {*(f"held_out_{kind}.png" for kind in kinds), "influence_influence.png", "spectrum.png"}
    for name in found:
        assert (tmp_path / "pictures" / name).stat().st_size > 5_000


def test_rows_and_columns_of_a_heatmap_are_grouped_by_prompt(result):
    mixed = dataclasses.replace(
        result,
        update=tuple(result.update[i] for i in (0, 2, 1, 3)),
        contributions=result.contributions[:, [0, 2, 1, 3]],
    )
    shown = report.heatmap(mixed).axes[0].images[0].get_array()
    np.testing.assert_allclose(np.asarray(shown), 1e3 * result.contributions)


def test_agreement_with_a_step_that_was_executed_here_is_not_shown_as_evidence(run, tmp_path):
    """Without step.after table, picture and certificate say what it is no evidence for; with it, what was taken."""
    for name, after in (("without", None), ("with", {"path": str(run.after)})):
        plan = run.plan(tmp_path / name)
        plan["step"] = {**plan["step"], "after": after}
        results = FisherKernelRunner(FisherKernelPlan.model_validate(plan)).run()
        result = results["held_out"]
        console = Console(record=True, width=200)
        console.print(report.calibration_table(result))
        text = console.export_text()
        assert ("executed from the optimizer's state as it was read" in text) is (after is None)
        assert ("really taken" in text) is (after is not None)
        label = report.predicted_vs_realised(result).axes[0].get_ylabel()
        assert ("self-consistent" in label) is (after is None)
        (state,) = [one for one in results.environment["certificates"] if one["name"] == "state"]
        assert state["passed"] is (None if after is None else True), state
        assert "step.after" in state["detail"]
