"""The calibration cannot rot: a small instance of it, held to its targets."""

from __future__ import annotations

from benchmarks import calibration


def test_a_step_under_autocast_is_explained_from_its_recording_and_without():
    recorded, drawn = calibration.steps({name: calibration.STEPS[name] for name in calibration.QUICK[:1]})
    for row in (recorded, drawn):
        assert row["left"] < max(calibration.TARGETS[row["from"]], 2 * row["floor"]), row
        assert row["audit"] == "the step is the one described"
    assert recorded["left"] < 0.1 * recorded["exact_leaves"]


def test_every_optimizer_is_the_real_one_and_has_a_line():
    rows = calibration.optimizers()
    assert {*calibration.real.TORCH} < {row["optimizer"] for row in rows}
    for row in rows:
        bound = 1e-3 if "bitsandbytes" in row["optimizer"] else 5e-12
        assert row["exact"] < bound, row
        assert row["parts"] < (1e-5 if "bitsandbytes" in row["optimizer"] else 1e-10), row
        assert row.get("executed", 0.0) < 1e-4, row
    results = {"environment": {"date": "", "cpu": "", "torch": ""}, "steps": [], "optimizers": rows}
    assert calibration.page(results).count("\n| ") == len(rows) + 2
