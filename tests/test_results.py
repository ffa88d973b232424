"""Finished results: what is saved is what is read, whole or refused; tables and pictures show it."""

import json

import numpy as np
import pytest
from rich.console import Console

from fkernel import report
from fkernel.study import ResultsError, SequenceInfo, StepResults


@pytest.fixture
def results() -> StepResults:
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 4)).astype(np.float32)
    weights = np.array([0.5, -0.5, 0.25, -0.25], dtype=np.float32)
    contributions = 0.5 * kernel * weights
    momentum, decay, curvature = (rng.normal(size=3).astype(np.float32) * s for s in (0.3, 1e-3, 1e-2))
    first = contributions.sum(1) + momentum + decay
    return StepResults(
        evaluation=tuple(SequenceInfo(f"E-00{i}-00", f"{i}+{i}=", str(2 * i), -1.5, 1.0) for i in range(3)),
        update=tuple(
            SequenceInfo(f"U-00{i // 2}-0{i % 2}", f"[{i // 2}]=", "x", -2.0, 0.0, 0.5, 0.25) for i in range(4)
        ),
        kernel=kernel,
        contributions=contributions,
        momentum=momentum,
        decay=decay,
        curvature=curvature,
        realised=first + curvature + np.float32(1e-3),
        step={"clip": 0.5, "grad_norm": 2.0, "lr": 1e-5},
        environment={"torch": "2"},
    )


def test_what_is_saved_is_what_is_read(results, tmp_path):
    again = StepResults.load(results.save(tmp_path / "out"))
    assert again.evaluation == results.evaluation
    assert again.update == results.update
    for name in ("kernel", "contributions", "momentum", "decay", "curvature", "realised"):
        np.testing.assert_array_equal(getattr(again, name), getattr(results, name))
    assert again.step == results.step
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["kernel.npz", "results.json"]


def test_json_says_what_a_reader_needs(results, tmp_path):
    results.save(tmp_path)
    data = json.loads((tmp_path / "results.json").read_text())
    row = data["evaluation"][0]
    assert row["first_order"] == pytest.approx(row["batch"] + row["momentum"] + row["decay"], rel=1e-5)
    assert row["second_order"] == pytest.approx(row["first_order"] + row["curvature"], rel=1e-5)
    top = row["top_contributors"]
    assert len(top) == 3
    assert [abs(t["nats"]) for t in top] == sorted((abs(t["nats"]) for t in top), reverse=True)
    best = np.abs(results.contributions[0]).argmax()
    assert top[0] == {"id": results.update[best].id, "nats": pytest.approx(float(results.contributions[0, best]))}
    assert set(data["calibration"]) == {"batch", "first_order", "second_order"}


def test_arrays_load_without_pickle_and_carry_their_ids(results, tmp_path):
    results.save(tmp_path)
    with np.load(tmp_path / "kernel.npz", allow_pickle=False) as file:
        assert file["evaluation_ids"].tolist() == [s.id for s in results.evaluation]
        assert file["contributions"].shape == (3, 4)


def test_calibration_sees_a_wrong_scale_that_correlation_misses(results):
    import dataclasses

    scaled = dataclasses.replace(results, realised=results.second_order / 2)
    value = scaled.calibration["second_order"]
    assert value.pearson == pytest.approx(1.0)
    assert value.slope == pytest.approx(0.5)
    assert value.relative_error == pytest.approx(1.0)


def test_saving_over_results_leaves_them_whole_when_it_fails(results, tmp_path):
    import dataclasses

    results.save(tmp_path)
    broken = dataclasses.replace(results, step={"clip": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        broken.save(tmp_path)
    assert StepResults.load(tmp_path).step == results.step
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("fault", ["no json", "no arrays", "newer", "other ids", "truncated"])
def test_unfit_directories_are_refused(results, tmp_path, fault):
    results.save(tmp_path)
    path = tmp_path / "results.json"
    data = json.loads(path.read_text())
    if fault == "no json":
        path.unlink()
    elif fault == "no arrays":
        (tmp_path / "kernel.npz").unlink()
    elif fault == "truncated":
        (tmp_path / "kernel.npz").write_bytes((tmp_path / "kernel.npz").read_bytes()[:100])
    else:
        data["schema"] = 99 if fault == "newer" else data["schema"]
        data["update"][0]["id"] = "U-999-99" if fault == "other ids" else data["update"][0]["id"]
        path.write_text(json.dumps(data))
    expected = {"newer": "schema 99", "other ids": "different sequences"}.get(fault, "no readable")
    with pytest.raises(ResultsError, match=expected):
        StepResults.load(tmp_path)


def test_tables_show_every_part_and_the_culprits(results):
    console = Console(width=200, record=True)
    console.print(report.effects_table(results, rows=2))
    console.print(report.calibration_table(results))
    text = console.export_text()
    largest = np.abs(results.realised).argmax()
    assert results.evaluation[largest].id in text
    assert f"{1e3 * results.realised[largest]:+.2f}" in text
    for column in ("batch", "momentum", "decay", "curvature", "realised", "Pearson r", "slope", "relative error"):
        assert column in text
    assert "[0]=" in text or "[1]=" in text  # brackets in a prompt are text, not markup
    assert text.count("E-00") == 2


def test_pictures_have_a_symmetric_scale_whose_zero_is_white(results, tmp_path):
    figure = report.heatmap(results, tmp_path / "heatmap.png")
    image = figure.axes[0].images[0]
    low, high = image.get_clim()
    assert low == -high
    assert image.cmap(0.5)[:3] == pytest.approx((1, 1, 1), abs=0.02)
    report.predicted_vs_realised(results, tmp_path / "scatter.png")
    for name in ("heatmap.png", "scatter.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / name).stat().st_size > 5_000
