"""What `fkernel` predicts is what TRL's GRPOTrainer did between two checkpoints that it wrote itself.

The update batch is what the trainer differentiated, the optimizer's state is what it saved, and what happened is
measured on the weights that it saved one step later: nothing of the step is done here. Of eight steps the one after the
fourth is explained: there is momentum in it, and its learning rate has left the schedule's peak.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import Qwen2ForCausalLM

from fkernel import checkpoint
from fkernel.engine import Calibration, calibrate
from fkernel.precond import AdamWState
from fkernel.rollout import GeneratedBatch, save_batch
from fkernel.study import FisherKernelResults, FisherKernelRunner, RequestResult
from tests.checkpoint.writers import TOKENIZER
from tests.study.trl_run import DECAY, LONGEST, SEEN, STEPS, WARMUP, Asked, Trained, held_out, trained, update_batch

AT = 4
RUNS = {
    "full, dapo": Asked("dapo", lora=False, schedule="cosine", peak=1e-4, max_norm=0.1),
    "lora, dr_grpo": Asked("dr_grpo", lora=True, schedule="linear", peak=3e-4, max_norm=0.5),
    "full, dapo, two micro-batches": Asked("dapo", False, "cosine", 1e-4, max_norm=0.1, accumulation=2),
    "lora, dr_grpo, two micro-batches": Asked("dr_grpo", True, "linear", 3e-4, max_norm=0.1, accumulation=2),
}


class Explained(NamedTuple):
    """A run, the batch of its fifth step, sequences that it never saw, and what was said of them."""

    run: Trained
    place: Path
    U: GeneratedBatch
    E: GeneratedBatch
    results: FisherKernelResults

    @property
    def effects(self) -> RequestResult:
        return self.results["held_out"]

    @property
    def error(self) -> float:
        """Of the prediction."""
        return self.effects.calibration["predicted"].relative_error

    def without(self, part: str) -> Calibration:
        """The prediction that lacks a part, against what happened."""
        return calibrate(
            torch.from_numpy(self.effects.predicted - self.effects.kept(part)),
            torch.from_numpy(self.effects.kept("realised")),
        )

    def otherwise(self, update: Path | None = None, **changes: Any) -> Calibration:
        """Another plan's prediction, against the same change."""
        plan = self.run.plan(AT, update or self.place / "update", self.E, **changes)
        return FisherKernelRunner(plan).run()["held_out"].calibration["predicted"]


@pytest.fixture(scope="module", params=RUNS)
def explained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Explained:
    place = tmp_path_factory.mktemp("trl")
    run = trained(place, RUNS[request.param])
    U, E = update_batch(run, AT), held_out(run, AT)
    save_batch(U, place / "update")
    return Explained(run, place, U, E, FisherKernelRunner(run.plan(AT, place / "update", E)).run())


@pytest.mark.turns(6)
def test_padding_inside_of_a_response_is_differentiated_as_the_trainer_did(tmp_path):
    """Its embedding's row is withheld from U's gradients, and not from E's (`func.with_masked_padding_grad`)."""
    run = trained(tmp_path, Asked("dapo", False, "cosine", 1e-4, max_norm=0.1, padding=True))
    U, E = update_batch(run, AT), held_out(run, AT)
    inside = [record for record in U if TOKENIZER.pad_token_id in (*record.prompt_ids, *record.response_ids)[:-1]]
    assert inside
    save_batch(U, tmp_path / "update")
    results = FisherKernelRunner(run.plan(AT, tmp_path / "update", E)).run()
    assert results.step["grad_norm"] == pytest.approx(run.log[AT + 1]["grad_norm"], rel=1e-5)
    found = results["held_out"].calibration
    assert found["predicted"].relative_error <= 0.003, found


def test_the_prediction_is_what_the_trainer_did(explained):
    found = explained.effects.calibration
    assert explained.effects.path == "midpoint"
    assert found["predicted"].pearson >= 0.9999, found
    assert found["predicted"].relative_error <= 0.003, found
    assert abs(found["predicted"].slope - 1) <= 0.003, found


def test_at_the_start_it_is_the_first_order_and_two_nodes_add_nothing_here(explained):
    """Gradients at the checkpoint leave the curvature out; halfway along the step one node is enough for it."""
    step = explained.run.plan(AT, explained.place / "update", explained.E)["step"]
    start, two = (explained.otherwise(step={**step, "path": path}) for path in ("start", "gauss2"))
    assert start.pearson >= 0.999, start
    assert start.relative_error <= 0.02, start
    assert start.relative_error > 3 * explained.error
    assert two.relative_error <= 0.003, two


def test_what_happened_is_measured_on_the_weights_that_the_trainer_saved(explained):
    run, E = explained.run, explained.E
    truth = scored(run, AT + 1, E) - scored(run, AT, E)
    assert np.abs(truth).mean() > 1e-3  # far above what float32 rounds away
    np.testing.assert_allclose(explained.effects.kept("realised"), truth, rtol=0, atol=2e-5)


def scored(run: Trained, at: int, batch: GeneratedBatch) -> np.ndarray:
    """S of every sequence, [n] float64, by transformers and peft alone, one at a time and without padding."""
    path = run.path / f"checkpoint-{at}"
    model: Any = Qwen2ForCausalLM.from_pretrained(run.base or path)
    if run.base is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(path))
    model.double().eval()
    values = []
    for record in batch:
        ids = torch.tensor([[*record.prompt_ids, *record.response_ids]])
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        taken = logp.gather(1, ids[0, 1:, None])[-len(record.response_ids) :]
        values.append(float(taken.sum()))
    return np.array(values)


def test_the_step_is_the_one_that_the_trainer_logged(explained):
    run, step = explained.run, explained.results.step
    logged, spec = run.log[AT + 1], run.spec
    assert step["step"] == AT
    assert step["grad_norm"] == pytest.approx(logged["grad_norm"], rel=1e-5)
    assert step["clip"] == pytest.approx(spec.max_norm / logged["grad_norm"], rel=1e-4)
    assert step["clip"] < 1
    gone = (AT - WARMUP) / (STEPS - WARMUP)
    left = {"cosine": (1 + math.cos(math.pi * gone)) / 2, "linear": 1 - gone}[spec.schedule]
    assert step["lr"] == [pytest.approx(spec.peak * left, rel=1e-9)]
    assert step["lr"] == [pytest.approx(logged["learning_rate"], rel=1e-9)]
    assert left < 0.8
    assert max(step["weight_decay"]) == DECAY


def test_only_what_was_trained_is_explained(explained):
    run = explained.run
    loaded = checkpoint.load(**run.checkpoint(AT))
    assert isinstance(loaded.optimizer, AdamWState)
    assert all("lora_" in name for name in loaded.optimizer.names) == run.spec.lora
    assert {*loaded.optimizer.step.values()} == {AT}
    parameters = dict(loaded.model.named_parameters())
    assert explained.results.step["parameters"] == sum(parameters[name].numel() for name in loaded.optimizer.names)


@pytest.mark.parametrize("part", ["batch", "momentum", "decay"])
def test_no_part_of_the_step_may_be_left_out(explained, part):
    assert explained.without(part).relative_error > max(0.015, 20 * explained.error)


def test_clipping_may_not_be_left_out(explained):
    changed = explained.otherwise(step={"after": explained.run.checkpoint(AT + 1)})
    assert changed.relative_error > max(0.05, 20 * explained.error)


@pytest.mark.parametrize("other", [AT - 1, AT + 1])
def test_the_batch_of_another_step_does_not_explain_this_one(explained, other, tmp_path):
    save_batch(update_batch(explained.run, other, AT), tmp_path / "other")
    wrong = explained.otherwise(tmp_path / "other")
    assert wrong.relative_error > max(0.1, 20 * explained.error)
    assert wrong.pearson < 0.99


def test_the_batches_are_what_they_are_said_to_be(explained):
    run, U, E = explained.run, explained.U, explained.E
    given = run.given[AT]
    assert len(given) == run.spec.accumulation
    assert len(U) == 16 * run.spec.accumulation
    assert any(not each["prompt_mask"].all() for each in given)  # TRL padded on the left
    assert torch.bincount(U.groups).tolist() == [4] * (len(U) // 4)
    lengths = [len(record.response_ids) for record in U]
    assert min(lengths) < max(lengths) == LONGEST
    assert sum(lengths) == int(given[0]["num_items_in_batch"])
    assert float(U.advantages.abs().max()) > 0.5
    assert all(TOKENIZER.pad_token_id not in record.prompt_ids + record.response_ids for record in (*U, *E))
    assert len(E) >= 24
    assert len({record.content_hash for record in E} - {record.content_hash for record in U}) == len(E)
    assert not {record.prompt for record in E} & {*SEEN}
    assert {record.prompt for record in U} <= {*SEEN}
