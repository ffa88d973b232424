"""A recording replayed is the run; states are restored within a grant; a dropped sequence is out of the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call

from fkernel import tree
from fkernel.errors import ModelError, StoreError
from fkernel.record import Recorder, Recording, States, distance, replay, training_of
from tests.record.loops import MAX_NORM, adamw, backward, gpt2, statistics, tensors, train
from tests.record.test_trl import Run

STEPS = 5
NOISE = 1e-10
"""Of parameters that the function does not depend on (a key's bias): their gradient is 0 up to 1e-17, and AdamW divides
it by ε."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> tuple[Recording, Any]:
    """A run in float64, a snapshot before every step."""
    model = gpt2().double()
    place = tmp_path_factory.mktemp("run") / "recording"
    train(place, range(STEPS), model, adamw(model), snapshots="every")
    return Recording.open(place), model


def test_a_replay_equals_the_run(recorded):
    recording, model = recorded
    states = [*replay(recording)]
    assert [state.number for state in states] == [*range(STEPS + 1)]
    ids, attention, *_ = tensors(0)
    for state in states:
        there = recording.snapshot(state.number).params
        ours, theirs = (
            functional_call(model, {**params}, (), {"input_ids": ids, "attention_mask": attention}).logits
            for params in (state.params, there)
        )
        assert float((ours - theirs).abs().max()) < 1e-12
        assert (distance(recording, state) or 0) < NOISE
    assert len(recording.snapshots) == STEPS + 1
    last = recording.snapshot(STEPS).optimizer
    entry: Any = states[-1].stored.entries["transformer.wte.weight"]
    assert (entry["exp_avg"] - last.exp_avg["transformer.wte.weight"]).abs().max() < 1e-12  # pyright: ignore


def test_a_replay_ends_and_begins_where_it_is_told(recorded):
    recording, _ = recorded
    assert [state.number for state in replay(recording, upto=4, start=2)] == [2, 3, 4]


@pytest.mark.parametrize("disk", [None, 3, 4])
def test_states_are_restored_within_a_grant(tmp_path, recorded, disk):
    recording, _ = recorded
    sparse = tmp_path / "sparse"
    model = gpt2().double()
    train(sparse, range(STEPS), model, adamw(model), snapshots="first")
    scratch, steps = tmp_path / "scratch", range(0, STEPS)
    size = 3 * sum(leaf.nbytes for leaf in recording.snapshot(0).params.values())
    states = States(training_of(Recording.open(sparse)), steps, scratch, None if disk is None else disk * size)
    for _ in range(2):
        most, seen = 0, list[int]()
        for state in states:
            assert (distance(recording, state) or 0) < NOISE
            seen.append(state.number)
            most = max(most, len([*(scratch / "snapshots").iterdir()]))
        assert seen == [*reversed(range(STEPS + 1))]
        assert most <= (disk or STEPS)


def test_states_of_another_run_are_not_taken_for_this_ones(tmp_path):
    """An account that was killed leaves states; the next one in the same directory may be of another recording."""
    last = []
    for name, lr in (("one", 0.01), ("another", 0.02)):
        model = gpt2()
        train(tmp_path / name, range(3), model, adamw(model, lr), snapshots="first")
        for scratch in (tmp_path / "scratch", tmp_path / f"scratch of {name}"):
            states = States(training_of(Recording.open(tmp_path / name)), range(3), scratch)
            last.append(next(iter(states)).params["transformer.wte.weight"])
    assert torch.equal(last[0], last[1])
    assert torch.equal(last[2], last[3])
    assert not torch.equal(last[0], last[2])


def test_a_grant_that_is_too_small_is_refused(tmp_path):
    model = gpt2().double()
    train(tmp_path / "sparse", range(STEPS), model, adamw(model), snapshots="first")
    with pytest.raises(StoreError, match=r"hold 1 states.*give \d+ bytes"):
        list(States(training_of(Recording.open(tmp_path / "sparse")), range(STEPS), tmp_path / "scratch", 200_000))


def test_what_is_dropped_is_as_if_it_had_no_weight_in_the_loss(tmp_path):
    """Against a run of torch's own whose loss leaves the sequence out, clipping and all."""
    model = gpt2().double()
    train(tmp_path / "run", range(3), model, adamw(model))
    recording = Recording.open(tmp_path / "run")
    dropped = recording.step(1).sequence_ids[3]
    *_, ours = replay(recording, change=lambda name, _: 0.0 if name == dropped else 1.0)
    plain = gpt2().double()
    optimizer = adamw(plain)
    for number in range(3):
        for i, each in enumerate(recording.step(number).microbatches):  # as they were padded: GPT-2 counts padding
            log_p, H = statistics(plain, each.input_ids, each.attention_mask.long())
            kept = torch.tensor([[1.0], [0.0], [1.0]]) if (number, i) == (1, 1) else torch.ones(len(each), 1)
            ω, η = each.token_weights[:, 1:], each.entropy_weights
            assert η is not None
            ((ω * log_p + η[:, 1:] * H) * kept).sum().backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    theirs = {name: leaf.detach() for name, leaf in plain.named_parameters()}
    apart = float(tree.norm(tree.map(lambda a, b: a - b, ours.params, theirs)))
    moved = float(tree.norm(tree.map(lambda a, b: a - b, theirs, recording.snapshot(0).params)))
    assert apart < NOISE * moved
    whole = {name: leaf.detach() for name, leaf in model.named_parameters()}
    assert float(tree.norm(tree.map(lambda a, b: a - b, ours.params, whole))) > 1e-3 * moved


@pytest.mark.parametrize("case", ["dapo", "lora", "cispo, KL, two inner epochs, autocast"])
def test_a_real_run_is_replayed(tmp_path, case):
    options: dict[str, Any] = {
        "dapo": {"lora": False},
        "lora": {"lora": True},
        "cispo, KL, two inner epochs, autocast": {
            "lora": False,
            "loss_type": "cispo",
            "beta": 0.05,
            "num_iterations": 2,
            "bf16": True,
        },
    }[case]
    run = Run(tmp_path, learning_rate=1e-3, **options)
    states = [*replay(run.recording)]
    apart = [distance(run.recording, state) for state in states]
    assert len(apart) == 4
    assert max(each for each in apart if each is not None) < 1e-5


def test_a_base_model_that_is_another_is_refused(tmp_path):
    run = Run(tmp_path, lora=True)
    other = Path(tmp_path / "other")
    model = run.recording.policy()
    assert {name for name, leaf in model.named_parameters() if leaf.requires_grad} == {*run.recording.about["shapes"]}
    from tests.study.trl_run import policy

    torch.manual_seed(3)
    changed = policy()
    with torch.no_grad():
        next(iter(changed.parameters())).mul_(1.1)
    changed.save_pretrained(other)
    with pytest.raises(ModelError, match="is not the one that was trained on"):
        run.recording.policy(base=other)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"no directory here.*base="):
        run.recording.policy()
    run.recording.policy(base=tmp_path / "moved")


def test_a_missing_step_is_named(tmp_path):
    model = gpt2()
    train(tmp_path, range(3), model, adamw(model))
    for file in (tmp_path / "steps" / "000001").iterdir():
        file.unlink()
    (tmp_path / "steps" / "000001").rmdir()
    with pytest.raises(StoreError, match="lacks the steps 1 of 0 to 2"):
        next(iter(replay(Recording.open(tmp_path))))


def test_a_model_that_is_not_transformers_is_given(tmp_path):
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = gpt2()

        def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
            return self.inner(input_ids, attention_mask=attention_mask).logits

    torch.manual_seed(0)
    model = Plain().double()  # in float32 the sign of a gradient that is 0 is rounding's, and AdamW steps on it
    optimizer = adamw(model)
    with Recorder(tmp_path, model, optimizer, snapshots="every") as recorder, recorder.step():
        backward(recorder, _Logits(model))
        optimizer.step()
    recording = Recording.open(tmp_path)
    with pytest.raises(ModelError, match="give the model"):
        next(iter(replay(recording)))
    *_, last = replay(recording, model=model)
    assert (distance(recording, last) or 0) < 1e-5


class _Logits:
    """The loop's model returns an object with logits."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, ids: Any, attention_mask: Any) -> Any:
        return type("Out", (), {"logits": self.model(ids, attention_mask)})
