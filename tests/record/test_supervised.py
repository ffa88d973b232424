"""TRL's SFTTrainer and a Trainer of transformers, recorded: ω is autograd's, and the optimizer's gradient is met."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fkernel.errors import BatchError, ModelError
from fkernel.record import Recorder
from tests.checkpoint.writers import TOKENIZER
from tests.record.trainers import SEEN, SETTINGS, Run, answer, plain, right, rows, sft
from tests.study.trl_run import policy

CASES: dict[str, Any] = {
    "sft": lambda place: sft(place),
    "sft, whole texts, adapter": lambda place: sft(
        place, lora=True, data=[{"text": f"{prompt}{answer(prompt)}"} for prompt in SEEN]
    ),
    "sft, dft, checkpointed": lambda place: sft(place, loss_type="dft", gradient_checkpointing=True),
    "trainer": lambda place: plain(place),
    "trainer, mean of each pass": lambda place: plain(place, model=local(policy()), gradient_accumulation_steps=3),
}


def local(model: Any) -> Any:
    """A model whose forward takes no num_items_in_batch: each pass's loss is its own mean."""
    model.accepts_loss_kwargs = False
    return model


@pytest.fixture(scope="module", params=CASES)
def run(request, tmp_path_factory) -> Run:
    place = tmp_path_factory.mktemp("run")
    return Run(place, CASES[request.param](place))


def test_the_trainers_gradient_is_met(run):
    assert run.recording.steps == (0, 1, 2)
    for number in run.recording.steps:
        step = run.recording.step(number)
        assert step.check is not None
        assert step.check["relative_error"] < 1e-6
        assert step.grad_norm == pytest.approx(run.log[number]["grad_norm"], rel=1e-5)
        assert step.clip == pytest.approx(min(1.0, 0.3 / (step.grad_norm + 1e-6)), rel=1e-5)
        assert step.lr[0][0] == pytest.approx(run.log[number]["learning_rate"], rel=1e-6)
        assert step.loss == pytest.approx(run.log[number]["loss"], rel=1e-5)


def test_rows_are_what_the_model_was_given(run):
    for number in run.recording.steps:
        step = run.recording.step(number)
        assert len(step.microbatches) == run.trainer.args.gradient_accumulation_steps
        for recorded, given in zip(step.microbatches, run.given[number], strict=True):
            assert torch.equal(recorded.input_ids, given["input_ids"])
            assert torch.equal(recorded.attention_mask, given["attention_mask"].bool())
            assert torch.equal(recorded.response_mask[:, 1:], given["labels"][:, 1:] != -100)
            assert not recorded.response_mask[:, 0].any()
        assert len({record.provenance.group for record in step.batch}) == len(step.batch)
        assert step.batch.ids == [f"U-{i:03d}-00" for i in range(len(step.rows))]


def test_token_weights_are_autograds(run):
    for number in run.recording.steps:
        step = run.recording.step(number)
        for recorded, (leaf, g) in zip(step.microbatches, run.weights[number], strict=True):
            mask, ids = recorded.response_mask[:, 1:], recorded.input_ids[:, 1:, None]
            assert mask.any()
            if leaf.ndim == 3:  # logits: ∂L/∂z_y = ω (1 − p_y)
                log_p = leaf[:, :-1].log_softmax(-1).gather(-1, ids)[..., 0]
                g = g[:, :-1].gather(-1, ids)[..., 0] / -log_p.expm1()
            else:
                log_p = leaf
            assert torch.allclose(recorded.token_weights[:, 1:][mask], g[mask], rtol=1e-4)
            assert torch.allclose(recorded.logprobs[:, 1:][mask], log_p[mask], atol=1e-6)
            assert not recorded.token_weights[:, 1:][~mask].any()


def test_the_weights_of_a_mean_over_the_step_are_one_number(tmp_path):
    run = Run(tmp_path, plain(tmp_path))
    step = run.recording.step(1)
    n = sum(int(each.response_mask.sum()) for each in step.microbatches)
    assert len({int(each.response_mask.sum()) for each in step.microbatches}) == 2  # as many in no two passes
    for each in step.microbatches:
        assert torch.allclose(each.token_weights[each.response_mask], torch.tensor(-1.0 / n))


@pytest.mark.turns(6)
def test_autocast_is_met_to_its_rounding(tmp_path):
    for name, made in (("sft", sft), ("plain", plain)):
        place = tmp_path / name
        place.mkdir()
        run = Run(place, made(place, bf16=True))
        for number in run.recording.steps:
            step = run.recording.step(number)
            assert step.check is not None
            assert step.check["relative_error"] < 1e-6
        assert run.recording.about["autocast"] == "bfloat16"
        assert run.recording.about["head"] == {"sft": "trl", "plain": "linear"}[name]


def test_holes_between_answers_have_no_weight(tmp_path):
    """As of assistant_only_loss: what lies between two answers is of the sequence, and not of the loss."""
    data = []
    for prompt in SEEN:
        ids = TOKENIZER(f"{prompt}{answer(prompt)}+1=").input_ids
        labels = [token if i in (2, 3, len(ids) - 2) else -100 for i, token in enumerate(ids)]
        data.append({"input_ids": ids, "labels": labels})
    run = Run(tmp_path, sft(tmp_path, data=data))
    for number in run.recording.steps:
        step = run.recording.step(number)
        assert step.check is not None
        assert step.check["relative_error"] < 1e-6
        for record in step.batch:
            ω = record.token_weights["loss"]
            assert len(record.prompt_ids) == 2
            assert [i for i, weight in enumerate(ω) if weight] == [0, 1, len(ω) - 2]


@pytest.mark.turns(6)
def test_a_run_that_is_resumed_is_compared(tmp_path):
    Run(tmp_path, sft(tmp_path, save_strategy="steps"))
    place = tmp_path / "recording" / "steps" / "000002" / "step.json"
    before = place.stat().st_mtime_ns
    again = sft(tmp_path)
    Recorder(tmp_path / "recording", snapshots="every").attach(again)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert place.stat().st_mtime_ns == before
    assert not (tmp_path / "recording" / "replaced").exists()


def test_an_evaluation_between_steps_is_not_recorded(tmp_path):
    run = Run(tmp_path, plain(tmp_path, eval_strategy="steps", eval_steps=1, eval_dataset=rows()[:4]))
    assert [len(run.recording.step(number).microbatches) for number in run.recording.steps] == [2, 2, 2]


# ----------------------------------------------------------------------------------------------------------- refused


def refused(place: Any, trainer: Any, said: str, error: Any = ModelError) -> None:
    def attach_and_train(recorder: Recorder) -> None:
        recorder.attach(trainer)
        trainer.train()

    with Recorder(place / "recording") as recorder, pytest.raises(error, match=said):
        attach_and_train(recorder)
    assert not [*(place / "recording").glob("steps/*")]


def test_what_attach_refuses(tmp_path):
    refused(tmp_path, plain(tmp_path, label_smoothing_factor=0.1), "label smoothing")
    refused(tmp_path, plain(tmp_path, compute_loss_func=lambda out, labels, **_: out["logits"].sum()), "loss function")
    refused(tmp_path, plain(tmp_path, neftune_noise_alpha=5.0), "noise on embeddings")
    made = plain(tmp_path)
    made.args.use_liger_kernel = True
    refused(tmp_path, made, "use_liger_kernel=False")
    made = plain(tmp_path)
    made.model.config.is_encoder_decoder = True
    refused(tmp_path, made, "an encoder and a decoder")
    made = plain(tmp_path)
    made.model.config.output_router_logits, made.model.config.router_aux_loss_coef = True, 0.01
    refused(tmp_path, made, "auxiliary loss of the routers")
    refused(tmp_path, sft(tmp_path, packing=True, packing_strategy="wrapped", max_length=8), "packed batches")
    refused(tmp_path, SimpleNamespace(compute_loss=None), "no trainer that can be attached")


def changed(**changes: Any) -> Any:
    return lambda given: {**(batch := right(given)), **{name: change(batch) for name, change in changes.items()}}


def flipped(name: str) -> Any:
    return lambda batch: batch[name].flip(1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"position_ids": lambda batch: (batch["attention_mask"].cumsum(1) - 1) % 3}, "packed"),
        ({"labels": lambda batch: batch["labels"].roll(1, 1)}, "stands at token"),
        ({"pixel_values": lambda batch: batch["labels"]}, "images"),
        ({name: flipped(name) for name in ("input_ids", "labels", "attention_mask")}, "is padded on its left"),
    ],
)
def test_rows_that_are_not_one_sequence_are_refused(tmp_path, changes, said):
    refused(tmp_path, plain(tmp_path, changed(**changes), remove_unused_columns=False), said)


def test_a_loss_that_is_another_function_is_refused(tmp_path):
    model = policy()
    mean = model.loss_function
    model.loss_function = lambda *rest, **others: mean(*rest, **others) + 0.1 * model.lm_head.weight.square().sum()
    refused(tmp_path, plain(tmp_path, model=model), "mean of −log π over its labels")


def test_a_subclass_whose_loss_is_computed_elsewhere_is_told(tmp_path):
    made = plain(tmp_path)
    inner = type(made).compute_loss

    def own(model: Any, inputs: Any, *rest: Any, **others: Any) -> Any:
        _, out = inner(made, model, inputs, True)
        return out.logits.square().mean()

    made.compute_loss = own
    refused(tmp_path, made, "no backward pass came through")


def test_left_padding_that_a_record_cannot_lay_out_is_told(tmp_path):
    def labels(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        flat = batch["labels"].flip(1).clone()
        flat[torch.arange(len(flat)), batch["attention_mask"].flip(1).argmax(1)] = -100
        return flat

    changes = {"input_ids": flipped("input_ids"), "attention_mask": flipped("attention_mask"), "labels": labels}
    refused(tmp_path, plain(tmp_path, changed(**changes)), "padded on their left", BatchError)


def test_settings_are_kept(run):
    assert run.recording.about["arguments"]["seed"] == SETTINGS["seed"]
    assert run.recording.about["trainer"] in ("SFTTrainer", "Trainer")
