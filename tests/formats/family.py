"""What every family of formats must do, whatever wrote it: shared by its tests."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fkernel as fk
from fkernel import checkpoint
from tests.formats.archives import unpack
from tests.formats.truth import Truth, load_truth

REFUSED = (fk.CheckpointError, fk.OptimizerStateError, fk.ModelError)


def loaded(path: Path, **options: Any) -> checkpoint.Checkpoint:
    """Load without the warnings about conditions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fk.CheckpointWarning)
        return checkpoint.load(path, **options)


def check_state(found: checkpoint.Checkpoint, truth: Truth) -> None:
    """Hold masters or weights, moments and steps against what the writer knew."""
    params = dict(found.model.named_parameters())
    state: Any = found.optimizer
    assert set(state.names) == set(truth.theta)
    assert {name for name, leaf in params.items() if leaf.requires_grad} == set(truth.theta)
    for name, theta in truth.theta.items():
        assert torch.equal(params[name], theta.to(params[name].dtype)), name
        for moment in ("exp_avg", "exp_avg_sq"):
            stored, known = getattr(state, moment)[name], getattr(truth, moment)[name]
            assert float((stored - known).norm()) <= 1e-7 * float(known.norm()), (moment, name)
    assert {*state.step.values()} == {truth.meta["step"]} == {found.step}
    assert {name: found.rounded[name] for name in truth.rounded if name in found.rounded}.keys() == found.rounded.keys()
    for name, leaf in found.rounded.items():
        assert torch.equal(leaf, truth.rounded[name]), name


def check_next_step(found: checkpoint.Checkpoint, truth: Truth, rtol: float = 1e-4, atol: float = 2e-7) -> None:
    """Hold the step that the state predicts against the one that the training took."""
    state: Any = found.optimizer
    params = {name: leaf.detach() for name, leaf in found.model.named_parameters() if leaf.requires_grad}
    step = fk.precond.adamw_step(params, {**truth.grads}, state)
    for name, moved in step.total.items():
        taken = truth.after[name] - truth.theta[name]
        torch.testing.assert_close(moved, taken, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    assert max(float(leaf.abs().max()) for leaf in step.total.values()) > 1e-4


def refused(load: Callable[[], Any], *says: str) -> None:
    """Check that loading is refused by an error that says all of it."""
    with pytest.raises(REFUSED) as error:
        load()
    for text in says:
        assert re.search(text, str(error.value)), f"{text!r} is not in: {error.value}"


def copied(run: str, directory: Path) -> tuple[Path, Truth]:
    """Unpack a run where it may be damaged: (its checkpoint, the truth)."""
    shutil.rmtree(directory, ignore_errors=True)
    unpack(run, directory)
    return directory / "checkpoint", load_truth(directory)
