"""A loop of one's own: what is recorded is what autograd says, and its gradient is the optimizer's."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from fkernel import tree
from fkernel.engine import gradient_in
from fkernel.errors import NonFiniteError, StoreError
from fkernel.func import make_functional, weighted_logprob
from fkernel.precond import AdamWState
from fkernel.record import Recorder, Recording, resuming
from fkernel.record.directory import set_aside
from fkernel.record.gradients import leaf_norm
from tests.record.loops import MAX_NORM, adamw, backward, gpt2, loss_of, statistics, take, tensors, train
from tests.torture.leftovers import dead_beside


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three steps, with every snapshot: directory, what was given, and the weights before each step."""
    directory = tmp_path_factory.mktemp("run") / "recording"
    model = gpt2()
    taken = train(directory, range(3), model, adamw(model), snapshots="every")
    return directory, taken, model


def test_token_weights_are_autograds(run):
    directory, taken, _ = run
    for number, (given, _) in enumerate(taken):
        step = Recording.open(directory).step(number)
        for recorded, each in zip(step.microbatches, given, strict=True):
            assert torch.equal(recorded.input_ids, each.ids)
            assert torch.equal(recorded.attention_mask, each.attention.bool())
            assert torch.equal(recorded.response_mask, each.response.bool())
            assert torch.equal(recorded.token_weights[:, 1:], each.ω)
            assert recorded.entropy_weights is not None
            assert torch.equal(recorded.entropy_weights[:, 1:], each.η)
            assert not recorded.token_weights[:, 0].any()


def test_the_batch_read_back_has_the_steps_gradient(run):
    directory, taken, _ = run
    model, recording = gpt2().eval(), Recording.open(directory)
    for number, (_, g) in enumerate(taken):
        step = recording.step(number)
        apply, _ = make_functional(model)
        batch = step.weighted
        got = gradient_in(
            weighted_logprob(apply), recording.snapshot(number).params, batch, torch.ones(5), microbatches=step.passes
        )
        assert float(tree.norm(tree.axpy(-1.0, g, got))) < 1e-6 * float(tree.norm(g))
        assert step.check is not None
        assert step.check["relative_error"] < 1e-6


def test_norm_clip_and_settings(run):
    directory, taken, _ = run
    for number, (_, g) in enumerate(taken):
        step, norm = Recording.open(directory).step(number), float(tree.norm(g))
        assert step.grad_norm == pytest.approx(norm, rel=1e-6)
        assert step.clip == pytest.approx(min(1.0, MAX_NORM / (norm + 1e-6)), rel=1e-5)
        assert step.lr == ((0.01,),)
        assert step.facts == {"seed": 7, "epoch": 0.5}


def test_the_batch_has_tokens_weights_and_what_was_given(run):
    directory, taken, _ = run
    step = Recording.open(directory).step(1)
    batch = step.batch
    assert batch.ids == ["U-000-00", "U-001-00", "U-002-00", "U-003-00", "U-004-00"]
    assert step.sequence_ids[1] == "0001/U-001-00"
    assert [record.prompt_ids for record in batch][:4] == [(2, 3, 4), (5, 6, 9), (7, 8), (2, 2, 9)]
    assert batch.records[1].response_ids == (5, 1)
    assert batch.advantages.tolist() == pytest.approx([1.0, -0.5, 0.7, -1.0, 0.3])
    given, _ = taken[1]
    assert batch.records[3].token_weights["loss"] == pytest.approx(given[1].ω[1, -2:].tolist())
    assert batch.records[3].entropy_weights["entropy"] == pytest.approx(given[1].η[1, -2:].tolist())
    assert [(each.prompt_width, each.width) for each in step.passes] == [(None, 6), (3, 5)]


def test_snapshots_are_the_state_before_the_step_and_after_the_last(run):
    directory, _, model = run
    recording = Recording.open(directory)
    assert recording.snapshots == (0, 1, 2, 3)
    end = recording.snapshot(3)
    assert all(torch.equal(end.params[name], leaf) for name, leaf in model.named_parameters())
    state = end.optimizer
    assert isinstance(state, AdamWState)
    assert {*state.exp_avg} == {*end.params}
    assert state.step["lm_head.weight" if "lm_head.weight" in state.step else "transformer.wte.weight"] == 3
    assert all(not leaf.any() for leaf in recording.snapshot(0).state_dicts[0]["state"].values())


def penalty(own: torch.Tensor, reference: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    """TRL's estimate of a KL divergence, times 0.3."""
    apart = reference - own
    return 0.3 * ((apart.exp() - apart - 1) * response[:, 1:]).sum()


def test_a_kl_penaltys_share_is_told_from_the_references_gradient(tmp_path):
    """−∂L/∂log π_ref, against autograd's gradient of the penalty alone; twice, since two passes add up."""
    model = gpt2().double()
    optimizer = adamw(model)
    expected = []
    with Recorder(tmp_path, model, optimizer) as recorder, recorder.step():
        for i in range(2):
            ids, attention, response, advantages = tensors(i)
            log_p, entropy = statistics(model, ids, attention)
            reference = (log_p.detach() + 0.1 * torch.rand_like(log_p)).requires_grad_()
            masks = {"attention_mask": attention, "response_mask": response}
            recorder.tap(log_p, input_ids=ids, **masks, entropy=entropy, reference_logprobs=reference)
            (loss_of(log_p, entropy, response, advantages) + penalty(log_p, reference, response)).backward()
            alone = log_p.detach().requires_grad_()
            expected.append(torch.autograd.grad(penalty(alone, reference.detach(), response), alone)[0])
        optimizer.step()
    step = Recording.open(tmp_path).step(0)
    assert step.parts == ("loss", "kl", "entropy")
    for each, kl in zip(step.microbatches, expected, strict=True):
        assert each.kl_weights is not None
        assert torch.allclose(each.kl_weights[:, 1:], kl, atol=1e-12)
    record, whole = step.records[2], step.microbatches[1].token_weights[0]
    together = [a + b for a, b in zip(record.token_weights["loss"], record.token_weights["kl"], strict=True)]
    assert together == pytest.approx(whole[-2:].tolist(), abs=1e-12)


def test_norms_of_large_gradients_are_exact():
    """torch's own, of so many float32 numbers on a CPU, is 6e-5 short: enough for a right record to be refused."""
    x = torch.randn(3000, 1000, generator=torch.Generator().manual_seed(0))
    assert abs(float(leaf_norm(x)) / float(x.double().norm()) - 1) < 1e-6
    assert leaf_norm(x.double()).dtype == torch.float64
    assert float(leaf_norm(torch.zeros(0))) == 0.0
    assert float(leaf_norm(torch.ones(2, 3).T)) == pytest.approx(6**0.5)


def test_nothing_is_pickled(run):
    directory, _, _ = run
    files = [file for file in directory.rglob("*") if file.is_file() and file.name != "lock"]
    assert {file.suffix for file in files} == {".json", ".jsonl", ".safetensors"}
    assert not [file for file in files if file.read_bytes()[:2] == b"\x80\x02"]


def test_a_summary_says_what_there_is(run):
    summary = Recording.open(run[0]).summary()
    assert [row["step"] for row in summary["steps"]] == [0, 1, 2]
    assert (summary["snapshots"], summary["missing"]) == ([0, 1, 2, 3], [])
    assert all(row["sequences"] == 5 and row["check"] < 1e-5 for row in summary["steps"])


# ----------------------------------------------------------------------------------------------- killed and resumed


def test_a_killed_run_is_resumed(tmp_path):
    model = gpt2()
    optimizer = adamw(model)
    states = {}
    for number in range(3):
        states[number] = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        train(tmp_path / "r", range(number, number + 1), model, optimizer)
    place = tmp_path / "r" / "steps" / "000002" / "step.json"
    before = place.stat().st_mtime_ns
    model.load_state_dict(states[1][0])
    optimizer.load_state_dict(states[1][1])
    train(tmp_path / "r", range(1, 4), model, optimizer)  # from the checkpoint before step 1
    assert Recording.open(tmp_path / "r").steps == (0, 1, 2, 3)
    assert place.stat().st_mtime_ns == before


def test_a_run_that_goes_another_way_is_no_silent_overwrite(tmp_path):
    model = gpt2()
    train(tmp_path, range(3), model, adamw(model), snapshots="every")
    other = gpt2()
    with pytest.raises(StoreError, match="other weights"):
        train(tmp_path, range(1, 2), other, adamw(other), snapshots="every")
    other = gpt2()
    with pytest.raises(StoreError, match=r"Step 2 is recorded in .* already, and token weights differ"):
        train(tmp_path, range(2, 3), other, adamw(other))
    other = gpt2()
    train(tmp_path, range(1, 2), other, adamw(other), snapshots=5, resume="replace")
    recording = Recording.open(tmp_path)
    assert recording.steps == (0, 1)
    assert recording.snapshots == (0, 1, 2)
    assert len([*(tmp_path / "replaced").iterdir()]) == 4


@pytest.mark.parametrize("moved", range(5))
def test_an_earlier_run_is_set_aside_whole_however_often_that_is_stopped(tmp_path, monkeypatch, moved):
    """What would be left of it, a later snapshot or step, would be taken for the new run's."""
    model, left = gpt2(), [moved]
    train(tmp_path, range(3), model, adamw(model), snapshots="every")

    def stopping(*given):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return set_aside(*given)

    with monkeypatch.context() as patch:
        patch.setattr(resuming, "set_aside", stopping)
        with suppress(KeyboardInterrupt):
            model = gpt2()
            train(tmp_path, range(1), model, adamw(model, 0.02), resume="replace")
    assert left[0] == -1  # three steps and the three snapshots behind the first
    model = gpt2()
    train(tmp_path, range(1), model, adamw(model, 0.02), resume="replace")
    recording = Recording.open(tmp_path)
    assert recording.step(0).lr == ((0.02,),)
    assert recording.steps == (0,)
    assert recording.snapshots == (0,)
    assert len([*(tmp_path / "replaced").iterdir()]) == 6


def test_a_failure_within_a_step_leaves_nothing(tmp_path):
    model = gpt2()
    optimizer = adamw(model)

    def interrupt():
        raise KeyboardInterrupt

    with Recorder(tmp_path, model, optimizer) as recorder:
        with pytest.raises(KeyboardInterrupt):
            take(recorder, model, optimizer, interrupt)
        (tmp_path / "steps").mkdir()
        dead_beside(tmp_path / "steps" / "000000").mkdir()
        assert Recording.open(tmp_path).steps == ()
    with Recorder(tmp_path, model, optimizer):
        assert not [*(tmp_path / "steps").iterdir()]


def test_a_resumed_run_must_say_where_it_is(tmp_path):
    model = gpt2()
    train(tmp_path, range(2), model, adamw(model))
    with (
        Recorder(tmp_path, model, adamw(model)) as recorder,
        pytest.raises(StoreError, match=r"holds the steps 0 to 1 already.*number="),
        recorder.step(),
    ):
        pass


def test_another_run_in_the_directory(tmp_path):
    model = gpt2()
    train(tmp_path, range(1), model, adamw(model))
    with pytest.raises(StoreError, match="its temperature differ"):
        Recorder(tmp_path, model, adamw(model), temperature=0.7)


def test_one_writer(tmp_path):
    with Recorder(tmp_path), pytest.raises(StoreError, match="in use by process"):
        Recorder(tmp_path)


def test_damage_is_told(tmp_path):
    model = gpt2()
    train(tmp_path, range(1), model, adamw(model))
    place = tmp_path / "steps" / "000000" / "sequences.jsonl"
    place.write_text(place.read_text().replace("1.0", "1.5"))
    with pytest.raises(StoreError, match=r"sequences\.jsonl is not what was written"):
        Recording.open(tmp_path).step(0)


# --------------------------------------------------------------------------------------------- precision, optimizers


def test_the_scale_is_divided_out(tmp_path):
    class Scaler:
        def get_scale(self) -> float:
            return 1024.0

    plain, scaled = gpt2(), gpt2()
    [(given, _)] = train(tmp_path / "plain", range(1), plain, adamw(plain))
    optimizer = adamw(scaled)
    with (
        Recorder(tmp_path / "scaled", scaled, optimizer, autocast=None) as recorder,
        recorder.step(scaler=Scaler()),
    ):
        backward(recorder, scaled, scale=1024.0)
        for leaf in scaled.parameters():
            assert leaf.grad is not None
            leaf.grad /= 1024.0
        optimizer.step()
    step = Recording.open(tmp_path / "scaled").step(0)
    assert torch.allclose(step.microbatches[0].token_weights[:, 1:], given[0].ω, rtol=1e-6)
    assert step.clip == 1.0
    assert step.grad_norm == pytest.approx(Recording.open(tmp_path / "plain").step(0).grad_norm, rel=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_leaves_out_is_none(tmp_path, fused):
    """A fused optimizer is called all the same, and told to do nothing."""
    model, scaler = gpt2(), torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    with Recorder(tmp_path, model, optimizer, autocast=None) as recorder:
        for attempt in range(3):
            with recorder.step(scaler=scaler):
                backward(recorder, model, scale=float(scaler.scale(torch.ones(()))))
                if attempt == 1:
                    model.lm_head.weight.grad[0, 0] = torch.inf
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
    facts = [json.loads((tmp_path / "steps" / name / "step.json").read_text()) for name in ("000000", "000001")]
    assert Recording.open(tmp_path).steps == (0, 1)
    assert [each["scale"] for each in facts] == [4.0, 2.0]


def test_a_gradient_that_is_not_finite_is_named(tmp_path):
    model = gpt2()
    optimizer = adamw(model)
    with Recorder(tmp_path, model, optimizer) as recorder:
        take(recorder, model, optimizer)
        before = model.lm_head.weight.detach().clone()
        with pytest.raises(NonFiniteError, match=r"Step 1: the gradient of 'transformer\.wpe\.weight' is not finite"):
            take(recorder, model, optimizer, lambda: model.transformer.wpe.weight.grad.fill_(torch.nan))
        assert torch.equal(model.lm_head.weight, before)
    assert Recording.open(tmp_path).steps == (0,)


def test_several_backward_passes_through_one_tap_add_up(tmp_path):
    model = gpt2()
    optimizer = adamw(model)
    ids, attention, response, _ = tensors(0)
    with Recorder(tmp_path, model, optimizer) as recorder, recorder.step():
        log_p, _ = statistics(model, ids, attention)
        recorder.tap(log_p, input_ids=ids, attention_mask=attention, response_mask=response)
        for weight in (0.25, 0.5):
            (-weight * (log_p * response[:, 1:]).sum()).backward(retain_graph=True)
        optimizer.step()
    step = Recording.open(tmp_path).step(0)
    assert torch.equal(step.microbatches[0].token_weights, -0.75 * response)


def test_several_optimizers_share_a_model(tmp_path):
    model = gpt2()
    matrices = [leaf for leaf in model.parameters() if leaf.ndim > 1]
    rest = [leaf for leaf in model.parameters() if leaf.ndim == 1]
    both = [torch.optim.AdamW(matrices, lr=0.01), torch.optim.SGD(rest, lr=0.1, momentum=0.9)]
    with Recorder(tmp_path, model, both, snapshots="every") as recorder:
        for _ in range(2):
            with recorder.step():
                backward(recorder, model)
                for optimizer in both:
                    optimizer.step()
            model.zero_grad()
    recording = Recording.open(tmp_path)
    assert recording.step(1).lr == ((0.01,), (0.1,))
    assert recording.step(1).clip == 1.0
    first, second = recording.snapshot(2).state_dicts
    assert set(first["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(second["state"][0]) == {"momentum_buffer"}
    assert {*recording.snapshot(2).optimizer.names} == {*recording.snapshot(2).params}


def test_frozen_parameters_are_left_out(tmp_path):
    model = gpt2()
    for name, leaf in model.named_parameters():
        leaf.requires_grad_("ln_" in name)
    train_only = torch.optim.AdamW([leaf for leaf in model.parameters() if leaf.requires_grad], lr=0.01)
    with Recorder(tmp_path, model, train_only) as recorder, recorder.step():
        backward(recorder, model)
        train_only.step()
    assert all("ln_" in name for name in Recording.open(tmp_path).snapshot(0).params)


def test_step_files_are_plain_json(run):
    facts = json.loads((Path(run[0]) / "steps" / "000001" / "step.json").read_text())
    assert facts["number"] == 1
    assert facts["check"]["relative_error"] < 1e-6
