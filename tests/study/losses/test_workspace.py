"""A workspace keeps what the loss made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import fkernel as fk
from fkernel import checkpoint
from fkernel.study import (
    FisherKernelResults,
    FisherKernelRunner,
    influence_of,
    load_workspace,
)
from tests.study.conftest import MAX_NORM
from tests.study.losses.common import QUIET, RATIO, executed, kl


@pytest.mark.turns(6)
def test_a_workspace_keeps_what_the_loss_made(second, study):
    plan, results = study
    shutil.rmtree(f"{plan['out']}/workspace/kept")  # or answers would be read, and nothing computed
    again = FisherKernelRunner(plan)
    found = again.run()
    assert again.workspace is not None
    assert again.workspace.gradients.computed == 0
    assert found.step == results.step
    np.testing.assert_array_equal(found["held_out"].parts["kl"], results["held_out"].parts["kl"])
    for name in ("batch", "contributions", "realised"):
        np.testing.assert_array_equal(getattr(found["held_out"], name), getattr(results["held_out"], name))
    with load_workspace(f"{plan['out']}/workspace") as workspace:
        assert workspace.loss is not None
        assert workspace.loss.facts == results.step["loss"]
        assert workspace.batch.checkpoint == checkpoint.load(second.first.before).provenance.fingerprint
        with pytest.raises(fk.PlanError, match="of the loss clipped_ratio, and not ∇S"):
            influence_of(workspace)


def test_a_workspace_in_memory_with_a_loss_can_be_written(second, study, tmp_path):
    from fkernel.study import serialize_workspace

    plan, results = study
    runner = FisherKernelRunner({**plan, "storage": QUIET["storage"]})
    with runner.prepare_update_workspace() as workspace:
        serialize_workspace(workspace, tmp_path / "kept")
    with load_workspace(tmp_path / "kept") as again:
        assert again.loss is not None
        assert again.loss.ratio is not None
        np.testing.assert_allclose(again.self_kernel(), results.self_kernel.kernel, rtol=1e-3, atol=1e-9)
        with pytest.raises(fk.PlanError, match="changes its sign"):
            again.weights_with({"U-000-00": 1.0})


def test_what_is_saved_is_what_is_read(study):
    plan, results = study
    read = FisherKernelResults.load(plan["out"])
    assert [*read["held_out"].parts] == ["advantage", "kl"]
    for part, values in read["held_out"].parts.items():
        np.testing.assert_array_equal(values, results["held_out"].parts[part])
    assert read.step["loss"] == results.step["loss"]
    row = json.loads((Path(plan["out"]) / "results.json").read_text())["requests"]["held_out"]["evaluation"][0]
    assert row["part.kl"] == pytest.approx(float(results["held_out"].parts["kl"][0]))


def test_damage_to_what_the_loss_made_is_never_served(study, tmp_path):
    plan, _ = study
    place = tmp_path / "copy"
    shutil.copytree(f"{plan['out']}/workspace", place)
    content = bytearray((place / "loss.safetensors").read_bytes())
    content[len(content) // 2] ^= 0x41
    (place / "loss.safetensors").write_bytes(content)
    with pytest.raises(fk.StoreError, match="is not what was written"):
        load_workspace(place)


@pytest.mark.parametrize("after", [1, 3])
def test_a_run_that_was_cut_off_goes_on(second, study, tmp_path, monkeypatch, after):
    from fkernel.engine.store import Store

    plan, results = study
    plan = {**plan, "numerics": {"microbatch": 2}, "out": str(tmp_path), "analyses": {}, "self_kernel": False}
    write, written = Store.write, []

    def stopping(self, i, handles):
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(i)
        write(self, i, handles)

    monkeypatch.setattr(Store, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        executed(plan)
    monkeypatch.setattr(Store, "write", write)
    runner = FisherKernelRunner(plan)
    found = runner.run()["held_out"]
    np.testing.assert_allclose(found.batch, results["held_out"].batch, rtol=1e-3, atol=1e-7)
    assert runner.workspace is not None
    assert 0 < runner.workspace.gradients.computed < 9


def test_a_workspace_of_another_loss_is_not_served(second, study, tmp_path):
    plan, _ = study
    at = {"workspace": f"{plan['out']}/workspace", "pictures": False}
    others = {
        "low": {**RATIO, "low": 0.2, "kl": kl(second)},
        "kl": RATIO,
        "policies": {**RATIO, "kl": {**kl(second), "reference": {"path": str(second.one)}}},
    }
    for key, loss in others.items():
        changed = {**plan, "step": {**plan["step"], "loss": loss}, "storage": at, "out": str(tmp_path / key)}
        with pytest.raises(fk.StoreError, match=rf"is of something else: (.*; )?loss\.{key}"):
            executed(changed)
    changed = {**plan, "step": {**plan["step"], "loss": None}, "storage": at, "update": second.foreign()}
    with pytest.raises(fk.StoreError, match=r"is of something else: .*loss"):
        executed({**changed, "out": str(tmp_path / "none")})


def test_without_a_loss_nothing_is_asked_that_was_not(second, tmp_path):
    runner = FisherKernelRunner(second.first.plan(tmp_path))
    with runner.prepare_update_workspace() as workspace:
        assert workspace.loss is None
        known = ["checkpoint", "parameters", "optimizer", "update", "temperature", "dtype", "preconditioner", "step"]
        known += ["files"]
        assert sorted({*workspace.spec} - {"schema", "seal", "padding"}) == sorted(known)
        assert workspace.spec["step"] == {"max_norm": MAX_NORM, "clip": None}
    assert sorted(path.name for path in (tmp_path / "workspace").iterdir()) == [
        "ascent.safetensors",
        "asked.json",
        "batch",
        "complete.json",
        "gradients",
        "lock",
        "response.safetensors",
    ]
    assert set(json.loads((tmp_path / "workspace" / "complete.json").read_text())) == {
        "ascent",
        "batch",
        "clip",
        "grad_norm",
        "sha256",
        "seal",
        "walked",
    }
