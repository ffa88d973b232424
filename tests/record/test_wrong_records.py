"""A record that is wrong is found when it is written, and bad input before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fkernel.errors import BatchError, ModelError, ModelWarning, OptimizerStateError, StoreError
from fkernel.record import Recorder, Recording
from tests.record.loops import adamw, backward, gpt2, loss_of, statistics, take, tensors


@pytest.fixture
def model() -> Any:
    return gpt2()


@pytest.fixture
def optimizer(model) -> Any:
    return adamw(model)


def beside(model: Any) -> Any:
    """A term of the loss that no log-probability knows of."""
    return lambda: (0.1 * model.transformer.wte.weight.square().sum()).backward()


def test_a_gradient_beside_the_tap_is_told(tmp_path, model, optimizer):
    told = pytest.raises(ModelError, match=r"Step 0: the optimizer was given another gradient.*wte")
    with Recorder(tmp_path, model, optimizer) as recorder, told:
        take(recorder, model, optimizer, beside(model))
    assert Recording.open(tmp_path).steps == Recording.open(tmp_path).snapshots == ()


def test_later_steps_warn(tmp_path, model, optimizer):
    with Recorder(tmp_path, model, optimizer, snapshots="every") as recorder:
        take(recorder, model, optimizer)
        with pytest.warns(ModelWarning, match="Step 1: the optimizer was given another gradient"):
            take(recorder, model, optimizer, beside(model))
    step = Recording.open(tmp_path).step(1)
    assert step.check is not None
    assert step.check["relative_error"] > 0.01


def test_gradients_that_still_add_up_are_told(tmp_path, model, optimizer):
    with Recorder(tmp_path, model, optimizer) as recorder:
        backward_alone(model)
        with pytest.raises(ModelError, match="Step 0"):
            take(recorder, model, optimizer)


def test_the_same_gradient_twice_is_told(tmp_path, model, optimizer):
    with Recorder(tmp_path / "once", model, optimizer) as recorder, pytest.raises(ModelError, match="no optimizer"):
        passes_alone(recorder, model)
    with (
        Recorder(tmp_path / "twice", model, optimizer) as recorder,
        pytest.raises(ModelError, match=r"in the same direction.*still add up"),
    ):
        take(recorder, model, optimizer)


def passes_alone(recorder: Recorder, model: Any) -> None:
    with recorder.step():
        backward(recorder, model)


def backward_alone(model: Any) -> None:
    ids, attention, response, advantages = tensors(0)
    loss_of(*statistics(model, ids, attention), response, advantages).backward()


def test_a_scale_that_the_recorder_does_not_know_is_told(tmp_path, model, optimizer):
    def unscale():
        for leaf in model.parameters():
            leaf.grad /= 8.0

    with Recorder(tmp_path, model, optimizer) as recorder, recorder.step():
        backward(recorder, model, scale=8.0)
        unscale()
        optimizer.step()
    assert Recording.open(tmp_path).step(0).clip == pytest.approx(1 / 8)  # as a clipping factor: the same step


def test_dropout_is_named(tmp_path):
    model = gpt2(dropout=0.5)
    optimizer = adamw(model)
    told = pytest.raises(ModelError, match=r"drop\(s\) activations out")
    with Recorder(tmp_path, model, optimizer) as recorder, told:
        take(recorder, model, optimizer)


def test_another_temperature_is_told(tmp_path, model, optimizer):
    ids, attention, response, advantages = tensors(0)

    def step(recorder: Recorder) -> None:
        with recorder.step():
            log_p, entropy = statistics(model, ids, attention, temperature=0.5)
            log_p = recorder.tap(log_p, input_ids=ids, attention_mask=attention, response_mask=response)
            loss_of(log_p, entropy.detach(), response, advantages).backward()
            optimizer.step()

    with Recorder(tmp_path / "1", model, optimizer) as recorder:
        with pytest.raises(ModelError, match="not at temperature 1"):
            step(recorder)
        optimizer.zero_grad()
    with Recorder(tmp_path / "½", model, optimizer, temperature=0.5) as recorder:
        step(recorder)
    batch = Recording.open(tmp_path / "½").step(0).batch
    assert batch.sampling is not None
    assert batch.sampling.temperature == 0.5
    assert not batch.records[0].logprobs
    assert len(batch.records[0].logqs) == 3


def test_a_clipping_factor_of_its_own_is_told(tmp_path, model, optimizer):
    with Recorder(tmp_path, model, optimizer) as recorder:
        take(recorder, model, optimizer)
        with pytest.warns(ModelWarning, match="not all multiplied by the same clipping factor"):
            take(recorder, model, optimizer, lambda: torch.nn.utils.clip_grad_norm_(model.transformer.wte.weight, 0.01))
    assert Recording.open(tmp_path).steps == (0, 1)


# ----------------------------------------------------------------------------------------------------------- bad input


def tapped(recorder: Recorder, logp: Any, given: Any) -> None:
    with recorder.step():
        recorder.tap(logp, **given)


def test_what_a_tap_refuses(tmp_path, model, optimizer):
    ids, attention, response, _ = tensors(0)
    with Recorder(tmp_path, model, optimizer) as recorder:
        log_p, entropy = statistics(model, ids, attention)
        whole = {"input_ids": ids, "attention_mask": attention, "response_mask": response}
        with pytest.raises(ModelError, match="No step is open for tap"):
            recorder.tap(log_p, **whole)
        for changed, said in (
            ({"input_ids": ids[:1]}, r"input_ids \[1, 6\]"),
            ({"response_mask": response[:, :2]}, r"response_mask \[2, 2\]"),
            ({"entropy": entropy[:, 1:]}, r"entropy is \[2, 4\] and logp \[2, 5\]"),
            ({"reward": [1.0]}, "'reward' was given as list with a micro-batch of 2 sequences"),
            ({"answer": [object(), 1]}, "is no JSON"),
            ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])}, "has holes"),
        ):
            with pytest.raises(BatchError, match=said):
                tapped(recorder, log_p, {**whole, **changed})


def test_log_probabilities_without_a_gradient_pass_unseen(tmp_path, model, optimizer):
    ids, attention, response, _ = tensors(0)
    with Recorder(tmp_path, model, optimizer) as recorder, torch.no_grad():
        log_p, _ = statistics(model, ids, attention)
        assert recorder.tap(log_p, input_ids=ids, attention_mask=attention, response_mask=response) is log_p


def test_a_loss_outside_of_the_mask_is_told(tmp_path, model, optimizer):
    ids, attention, response, _ = tensors(0)

    def step(recorder: Recorder) -> None:
        with recorder.step():
            log_p, _ = statistics(model, ids, attention)
            recorder.tap(log_p, input_ids=ids, attention_mask=attention, response_mask=response)
            (-log_p.sum()).backward()
            optimizer.step()

    told = pytest.raises(BatchError, match=r"∂L/∂log π of row 0, column 1 is -1, and response_mask is 0")
    with Recorder(tmp_path, model, optimizer) as recorder, told:
        step(recorder)


def test_a_step_needs_a_tap_and_an_optimizer(tmp_path, model, optimizer):
    def only_backward(recorder: Recorder) -> None:
        with recorder.step():
            backward(recorder, model)

    def only_optimizer(recorder: Recorder) -> None:
        with recorder.step():
            optimizer.step()

    with Recorder(tmp_path, model, optimizer) as recorder:
        with pytest.raises(ModelError, match="no optimizer stepped"):
            only_backward(recorder)
        with pytest.raises(ModelError, match="came through the tap"):
            only_optimizer(recorder)
        with pytest.raises(ModelError, match="No step is open for the optimizer's step"):
            optimizer.step()
    optimizer.step()  # closed: the hooks are gone
    with pytest.raises(ModelError, match="closed"):
        recorder.bind(model, optimizer)


def test_what_a_recorder_refuses(tmp_path, model, optimizer):
    told = pytest.raises(ModelError, match="has its model already")
    with Recorder(tmp_path / "bound", model, optimizer) as recorder, told:
        recorder.bind(model, optimizer)
    with pytest.raises(ModelError, match="snapshots is 'often'"):
        Recorder(tmp_path, snapshots="often")
    with pytest.raises(ModelError, match="resume is 'overwrite'"):
        Recorder(tmp_path, resume="overwrite")
    with pytest.raises(ModelError, match="the model and its optimizer, or neither"):
        Recorder(tmp_path, model)
    with pytest.raises(OptimizerStateError, match="parameters that are not the model's"):
        Recorder(tmp_path, model, adamw(gpt2()))
    with pytest.raises(OptimizerStateError, match="no optimizer moves them"):
        Recorder(tmp_path, model, torch.optim.AdamW([next(model.parameters())]))
    with pytest.raises(StoreError, match=r"There is no recording at '.*nowhere'"):
        Recording.open(tmp_path / "nowhere")
