"""Other preconditioners than a plan's own, and some of the parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fkernel as fk
from fkernel import checkpoint
from fkernel.study import FisherKernelRunner
from tests.study.conftest import MAX_NORM
from tests.study.test_runner import executed


@pytest.mark.parametrize("form", ["post-step", "frozen", "identity"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_preconditioners(run, tmp_path, form, calibrated):
    chosen = {"form": form, "calibrated": calibrated}
    if form == "frozen":
        chosen["unseen"] = "zero"
    results = executed(run.plan(tmp_path / "out", preconditioner=chosen, storage={"persist": False, "pictures": False}))
    found = results["held_out"]
    loaded = checkpoint.load(run.before)
    apply, params = fk.func.make_functional(loaded.model)
    S = fk.func.sequence_logprob(apply)
    state = loaded.optimizer
    assert isinstance(state, fk.precond.AdamWState)
    g, _, _ = fk.loss_gradient(S, params, run.batch.sequences, run.batch.weighted_advantages, max_norm=MAX_NORM)
    D = {
        "post-step": lambda: fk.precond.adam(state, {**g}, "eps"),
        "frozen": lambda: fk.precond.adam(state, None, "zero"),
        "identity": fk.precond.identity,
    }[form]()
    J = fk.func.per_sequence_grad(S)(params, run.batch.sequences)
    rate = fk.precond.gradient_rates(state) if calibrated else dict.fromkeys(params, 1.0)
    P_J = {name: rate[name] * leaf for name, leaf in D(J).items()}
    # Calibrated there is a step, AdamW's own whatever P is, and E's gradients are halfway along it; bare there is none.
    step = fk.precond.adamw_step(params, {**g}, state).total
    node = fk.tree.axpy(0.5, step, params) if calibrated else params
    assert found.path == ("midpoint" if calibrated else "start")
    generator = FisherKernelRunner(run.plan(tmp_path / "out2")).generator
    E = generator.generate_evaluation_batch(4)
    assert E.ids == [info.id for info in found.evaluation]
    K = fk.func.contract(fk.func.per_sequence_grad(S)(node, E.sequences), P_J)
    np.testing.assert_allclose(found.kept("kernel"), K.numpy(), rtol=2e-3, atol=1e-5 * float(K.abs().max()))
    assert (found.momentum is None) == (not calibrated)
    assert results.units == ("nats" if calibrated else "bare")


def test_a_checkpoint_without_optimizer_is_for_the_bare_identity_only(run, tmp_path):
    plan = run.plan(tmp_path / "out", checkpoint={"path": str(run.before / "model")}, step={})
    with pytest.raises(fk.OptimizerStateError, match=r"has no optimizer state.*identity"):
        executed(plan)
    bare = {"form": "identity", "calibrated": False}
    found = executed({**plan, "preconditioner": bare, "out": str(tmp_path / "bare")})["held_out"]
    assert found.momentum is None
    assert np.isfinite(found.kept("kernel")).all()


def test_a_schedule_that_has_ended_is_said(run, tmp_path):
    state = torch.load(run.before / "optimizer.pt", weights_only=True)
    state["param_groups"][0]["lr"] = 0.0
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "model").symlink_to(run.before / "model")
    torch.save(state, tmp_path / "last" / "optimizer.pt")
    plan = run.plan(tmp_path / "out", checkpoint={"path": str(tmp_path / "last")})
    with pytest.raises(fk.OptimizerStateError, match="its schedule has ended"):
        executed(plan)
    bare = executed({**plan, "preconditioner": {"calibrated": False}, "out": str(tmp_path / "bare")})
    assert np.abs(bare["held_out"].kept("contributions")).max() > 0


def test_some_parameters_only(run, tmp_path):
    chosen = executed(run.plan(tmp_path / "a", parameters=["*norm*", "*layers.1.mlp*"], step={"clip": 0.5}))
    assert chosen.step["clip"] == 0.5
    whole = executed(run.plan(tmp_path / "b"))
    assert 0 < chosen.step["parameters"] < whole.step["parameters"]
    assert (chosen["held_out"].kept("squared_norms") < whole["held_out"].kept("squared_norms")).all()
    with pytest.raises(fk.PlanError, match=r"'\*nothing\*' names none of"):
        executed(run.plan(tmp_path / "c", parameters=["*nothing*"]))
