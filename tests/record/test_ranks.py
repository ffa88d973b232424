"""Several processes: their record is that of one process on all their rows, and an error of one is raised in all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fkernel.errors import ModelError
from fkernel.record import Recorder, Recording
from tests.record.loops import MAX_NORM, adamw, gpt2, loss_of, statistics, tensors
from tests.record.test_trl import brevity, digits
from tests.record.worker import ORDERS, launch, optimizer_of
from tests.study.trl_run import policy


def ran(place: Path, what: str) -> None:
    done = launch(place, what)
    assert [each.returncode for each in done] == [0, 0], "\n".join(each.stderr[-2000:] for each in done)


def failed(place: Path, what: str, said: str) -> None:
    """Every process ends, with the same error."""
    for rank, done in enumerate(launch(place, what)):
        assert done.returncode == 1, f"process {rank}: {done.stderr[-3000:]}"
        assert said in done.stderr, f"process {rank}: {done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> tuple[Recording, Recording]:
    """Of two processes, and of one on the same micro-batches."""
    place = tmp_path_factory.mktemp("ranks")
    ran(place, "loop")
    model = gpt2()
    optimizer = optimizer_of(model)
    order = [i for own in ORDERS for i in own]
    with Recorder(place / "one", model, optimizer, snapshots="every") as recorder:
        for _ in range(3):
            one(recorder, model, optimizer, order)
    return Recording.open(place / "recording"), Recording.open(place / "one")


def one(recorder: Recorder, model: Any, optimizer: Any, order: list[int]) -> None:
    """The step of both processes in this one: every loss is divided by 2."""
    optimizer.zero_grad()
    with recorder.step():
        for start in (0, 3):
            passes(recorder, model, order[start : start + 3])
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()


def passes(recorder: Recorder, model: Any, order: list[int]) -> None:
    for j, i in enumerate(order):
        ids, attention, response, advantages = tensors(i)
        log_p, entropy = statistics(model, ids, attention)
        masks = {"input_ids": ids, "attention_mask": attention, "response_mask": response}
        both = recorder.tap(log_p, **masks, entropy=entropy, advantage=advantages)
        loss = (j + 1) / 3 / 2 * loss_of(both[0], both[1], response, advantages)
        loss.backward()
        assert recorder.opened is not None
        recorder.opened.note(loss=loss.detach())


def test_two_processes_are_one_on_all_their_rows(recordings):
    several, single = recordings
    assert several.steps == single.steps == (0, 1, 2)
    for number in several.steps:
        step, expected = several.step(number), single.step(number)
        for a, b in zip(step.microbatches, expected.microbatches, strict=True):
            assert torch.equal(a.input_ids, b.input_ids)
            assert torch.equal(a.response_mask, b.response_mask)
            assert torch.allclose(a.token_weights, b.token_weights, rtol=1e-4, atol=1e-8)
            assert torch.allclose(a.entropy_weights, b.entropy_weights, rtol=1e-4, atol=1e-8)
            assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert step.loss == pytest.approx(expected.loss, rel=1e-5)
        assert step.batch.ids == expected.batch.ids
        assert torch.equal(step.batch.advantages, expected.batch.advantages)
        assert [row["rank"] for row in step.rows] == [0] * 8 + [1] * 8


def test_the_averaged_gradient_is_met(recordings):
    several, single = recordings
    for number in several.steps:
        step, expected = several.step(number), single.step(number)
        assert step.check is not None
        assert step.check["relative_error"] < 1e-6
        assert step.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
        assert step.clip == pytest.approx(expected.clip, rel=1e-5)


def test_the_same_weights_come_of_it(recordings):
    several, single = recordings
    for number in several.snapshots:
        a, b = several.snapshot(number).params, single.snapshot(number).params
        assert all(torch.allclose(a[name], leaf, atol=1e-6) for name, leaf in b.items())
    assert several.snapshots == (0, 1, 2, 3)


@pytest.mark.turns(6)
def test_an_error_in_one_process_is_raised_in_all(tmp_path):
    failed(tmp_path, "beside", "the optimizer was given another gradient than that of the recorded token weights")
    assert not [*(tmp_path / "recording").glob("steps/*")]


@pytest.mark.turns(6)
def test_what_one_process_cannot_record_ends_all(tmp_path):
    failed(tmp_path, "overflow", "is not finite")


@pytest.mark.turns(6)
def test_a_directory_with_steps_ends_all(tmp_path):
    failed(tmp_path, "again", "holds the steps 0 to 2 already")


@pytest.mark.turns(6)
def test_a_model_without_its_wrapper_is_refused(tmp_path):
    failed(tmp_path, "unwrapped", "expected one in DistributedDataParallel")


def test_a_number_without_a_group_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    model = gpt2()
    with pytest.raises(ModelError, match="init_process_group"):
        Recorder(tmp_path, model, adamw(model))


# -------------------------------------------------------------------------------------------------------- trainers


@pytest.mark.turns(6)
def test_grpo_in_two_processes(tmp_path):
    for rank in (0, 1):
        policy().save_pretrained(tmp_path / f"rank-{rank}" / "base")
    ran(tmp_path, "grpo")
    recording = Recording.open(tmp_path / "recording")
    given = [torch.load(tmp_path / f"given-{rank}.pt", weights_only=False) for rank in (0, 1)]
    log = [row for row in given[0]["log"] if "grad_norm" in row]
    assert recording.steps == (0, 1, 2)
    for number in recording.steps:
        step = recording.step(number)
        assert step.check is not None
        assert step.check["relative_error"] < 1e-6
        assert step.grad_norm == pytest.approx(log[number]["grad_norm"], rel=1e-5)
        own = [each["given"][2 * number : 2 * number + 2] for each in given]
        for recorded, inputs in zip(step.microbatches, [*own[0], *own[1]], strict=True):
            assert torch.equal(recorded.input_ids, torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1))
        advantages = torch.cat([inputs["advantages"] for inputs in [*own[0], *own[1]]])
        assert torch.allclose(step.batch.advantages, advantages)
        assert {row["rank"] for row in step.rows} == {0, 1}
        groups: dict[int, list[Any]] = {}
        for record in step.batch:
            text = record.response.replace("<pad>", "")  # TRL decodes without special tokens
            assert record.rewards["digits"] == digits([text])[0]
            assert record.rewards["brevity"] == pytest.approx(brevity([text])[0])
            groups.setdefault(record.provenance.group, []).append(record)
        assert [len(group) for group in groups.values()] == [4] * 6  # of 24 rows; groups span processes
        for group in groups.values():
            assert len({record.prompt for record in group}) == 1
            rewards = torch.tensor([record.reward or 0.0 for record in group])
            centred = rewards - rewards.mean()
            assert torch.allclose(
                torch.tensor([record.advantage for record in group]), centred / (rewards.std() + 1e-4), atol=1e-4
            )


@pytest.mark.turns(6)
def test_supervised_in_two_processes(tmp_path):
    ran(tmp_path, "supervised")
    for name in ("sft", "plain"):
        recording = Recording.open(tmp_path / name / "recording")
        log = [row for row in torch.load(tmp_path / name / "log-0.pt", weights_only=False) if "grad_norm" in row]
        for number in recording.steps:
            step = recording.step(number)
            assert step.check is not None
            assert step.check["relative_error"] < 1e-6
            assert step.grad_norm == pytest.approx(log[number]["grad_norm"], rel=1e-5)
            assert step.loss == pytest.approx(log[number]["loss"], rel=1e-5)
            assert len(step.microbatches) == 4
            n = sum(int(each.response_mask.sum()) for each in step.microbatches)
            for each in step.microbatches:
                assert torch.allclose(each.token_weights[each.response_mask], torch.tensor(-1.0 / n))
            assert len({record.provenance.group for record in step.batch}) == 16
        assert recording.about["arguments"]["num_processes"] == 2


@pytest.mark.turns(6)
def test_preference_in_two_processes(tmp_path):
    for rank in (0, 1):
        policy().save_pretrained(tmp_path / f"rank-{rank}" / "base")
    ran(tmp_path, "preference")
    recording = Recording.open(tmp_path / "recording")
    log = [row for row in torch.load(tmp_path / "log-0.pt", weights_only=False) if "grad_norm" in row]
    for number in recording.steps:
        step = recording.step(number)
        assert step.check is not None
        assert step.check["relative_error"] < 1e-6
        assert step.grad_norm == pytest.approx(log[number]["grad_norm"], rel=1e-5)
        assert step.loss == pytest.approx(log[number]["loss"], rel=1e-5)
        pairs: dict[int, list[Any]] = {}
        for row, record in zip(step.rows, step.batch, strict=True):
            assert record.provenance.group == row["pair"] + 8 * row["rank"]
            assert record.sequence_id.endswith("00" if row["chosen"] else "01")
            pairs.setdefault(record.provenance.group, []).append(record.prompt)
        assert sorted(pairs) == [*range(16)]
        assert all(len(prompts) == 2 and len({*prompts}) == 1 for prompts in pairs.values())
        for each in step.microbatches:
            assert bool(each.others["reference_logprobs"].any())
