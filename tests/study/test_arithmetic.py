"""What the training's own precision did is a column: real TRL steps under autocast, and in pure bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fkernel.rollout import GeneratedBatch, save_batch
from fkernel.study import FisherKernelRunner, RequestResult
from tests.study.trl_run import Asked, Trained, held_out, recorded_microbatches, token_weights, trained, update_batch

AT = 4
DEFAULTS = (("bf16", True), ("gradient_checkpointing", True))
"""TRL's own, which the other runs of these tests switch off."""
RUNS = {
    "full": Asked("dapo", lora=False, schedule="cosine", peak=1e-4, max_norm=0.1, options=DEFAULTS),
    "lora, two micro-batches": Asked(
        "dapo", lora=True, schedule="linear", peak=3e-4, max_norm=0.1, accumulation=2, options=DEFAULTS
    ),
}


class Told:
    """A run, the batch of one of its steps, and sequences that it never saw."""

    def __init__(self, place: Path, spec: Asked) -> None:
        self.run: Trained = trained(place, spec)
        self.place, self.E = place, held_out(self.run, AT)
        self.drawn: GeneratedBatch = update_batch(self.run, AT)
        self.recorded = token_weights(self.run, AT, self.drawn)
        for name, batch in (("drawn", self.drawn), ("recorded", self.recorded)):
            save_batch(batch, place / name)

    def explained(self, batch: str, **step: Any) -> tuple[RequestResult, dict[str, Any]]:
        plan = self.run.plan(AT, self.place / batch, self.E, analyses={"ledger": True})
        given = {"loss": {"kind": "token_weights"}} if batch == "recorded" else {}
        results = FisherKernelRunner({**plan, "step": {**plan["step"], **given, **step}}).run()
        return results["held_out"], results.step


@pytest.fixture(scope="module", params=RUNS)
def told(request, tmp_path_factory):
    return Told(tmp_path_factory.mktemp("autocast"), RUNS[request.param])


def shares(found: RequestResult) -> dict[str, float]:
    """Sizes of columns over the realised change's."""
    ledger = found.analysis("ledger")
    size = np.linalg.norm(ledger["realised"])
    return {name: float(np.linalg.norm(values) / size) for name, values in ledger.arrays.items()} | {
        "left": float(np.linalg.norm(ledger["unexplained"] + ledger["remainder"]) / size)
    }


def test_from_a_recording_the_step_is_explained_to_the_floor(told):
    passes = recorded_microbatches(told.run, AT, told.recorded)
    found, step = told.explained("recorded", autocast="bfloat16", microbatches=passes)
    size = shares(found)
    assert size["left"] < max(1e-3, 2 * size["floor"]), size
    assert size["unexplained"] < max(1e-3, size["floor"]), size
    assert step["audit"]["fine"], step["audit"]["verdict"]
    exact = told.explained("recorded")[0]
    assert shares(exact)["unexplained"] > 3 * size["left"]  # what arithmetic did is unexplained without it
    assert size["arithmetic"] > 3 * size["left"]


def test_without_a_recording_less_than_a_hundredth_is_left(told):
    found, step = told.explained("drawn", autocast="bfloat16", microbatches=16)
    size = shares(found)
    assert size["left"] < 1e-2, size
    assert step["audit"]["fine"], step["audit"]["verdict"]


PURE = (1e-6, 1e-5, 1e-4)
"""Learning rates of trainings whose weights and moments are bfloat16."""


@pytest.fixture(scope="module", params=PURE)
def pure(request, tmp_path_factory):
    spec = Asked("dapo", False, "constant", request.param, max_norm=0.1, dtype="bfloat16")
    return request.param, Told(tmp_path_factory.mktemp("pure"), spec)


def test_a_step_in_pure_bfloat16_is_explained_by_what_arithmetic_did(pure):
    lr, told = pure
    passes = recorded_microbatches(told.run, AT, told.recorded)
    found, step = told.explained("recorded", microbatches=passes)
    size = shares(found)
    assert size["unexplained"] < 1e-5, size  # bit for bit, but for the order in which float32 adds
    assert size["remainder"] < max(1e-2, 2 * size["floor"]), size
    assert 0 < step["moved"] < {1e-6: 0.05, 1e-5: 0.1, 1e-4: 0.2}[lr]
    predicted = found.batch + found.kept("momentum") + found.kept("decay")  # in real numbers
    slope = float(predicted @ found.kept("realised") / (predicted @ predicted))
    assert slope < {1e-6: 0.1, 1e-5: 0.1, 1e-4: 0.3}[lr]
    assert step["audit"]["fine"], step["audit"]["verdict"]
