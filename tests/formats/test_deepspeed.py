"""DeepSpeed's checkpoints by DeepSpeed's own writer: every stage of ZeRO, laid as its trainers lay it.

fp16 is not written here: DeepSpeed does not run it on a CPU. Its files differ from bfloat16's in their names, and in
steps that an overflow skipped, which are edited into others' files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fkernel as fk
from fkernel import checkpoint
from fkernel.checkpoint.files import read_tensors
from fkernel.checkpoint.formats.deepspeed.flat import flat_group, pieces_of
from fkernel.checkpoint.formats.deepspeed.places import files_of
from fkernel.checkpoint.formats.deepspeed.sliced import slices_of
from fkernel.io import fingerprint
from tests.formats.deepspeed_runs import PLACES, TAG, Fresh, runs
from tests.formats.family import check_next_step, check_state, copied, loaded, refused
from tests.formats.places import UNSAID, options_of
from tests.formats.policy import DECAY, tiny


@pytest.fixture(scope="module", params=PLACES)
def run(request, tmp_path_factory) -> tuple[str, Path, Any]:
    return request.param, *copied(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def fresh(request, tmp_path) -> Fresh:
    return Fresh(request.param, tmp_path)


def test_the_state_is_deepspeeds(run):
    name, path, truth = run
    found = loaded(path / PLACES[name][0], **options_of(name, path))
    check_state(found, truth)
    check_next_step(found, truth)
    assert found.provenance.layout == "deepspeed"
    state: Any = found.optimizer
    assert set(state.weight_decay.values()) <= {DECAY, 0.0}
    for key, leaf in found.as_it_ran().named_parameters():
        if key in truth.rounded:
            assert torch.equal(leaf, truth.rounded[key].float()), key
    assert bool(found.rounded) == bool(truth.rounded)


def test_every_place_is_the_same_checkpoint(run):
    name, path, _ = run
    prints = {
        (found.provenance.fingerprint, found.step, fingerprint(moments_of(found)))
        for found in (loaded(path / place, **options_of(name, path)) for place in PLACES[name])
    }
    assert len(prints) == 1


def moments_of(found: checkpoint.Checkpoint) -> Any:
    state: Any = found.optimizer
    return state.exp_avg_sq


def test_weights_alone(run):
    name, path, truth = run
    found = loaded(path / PLACES[name][0], **options_of(name, path), optimizer=False)
    assert found.optimizer is None
    for key, leaf in found.model.named_parameters():
        if key in truth.theta:
            assert torch.equal(leaf, truth.rounded.get(key, truth.theta[key]).float()), key


@runs("deepspeed_zero1_frozen", "deepspeed_zero3_frozen")
def test_what_was_frozen_is_there_and_is_not_trained(fresh):
    found, original = fresh.load(), tiny()
    frozen = {name: leaf for name, leaf in found.model.named_parameters() if not leaf.requires_grad}
    assert set(frozen) == {name for name, _ in original.named_parameters()} - set(fresh.truth.theta)
    for name, leaf in frozen.items():
        assert torch.equal(leaf, original.get_parameter(name).bfloat16().float()), name


def test_a_trainers_directory_has_its_tokenizer_and_step(tmp_path):
    fresh = Fresh("deepspeed_trainer_zero2", tmp_path)
    found = fresh.load()
    assert found.tokenizer is not None
    assert found.step == 2
    assert found.trained_dtypes["model.norm.weight"] == torch.bfloat16


def test_openrlhf_exports_a_configuration_beside(tmp_path):
    fresh = Fresh("deepspeed_openrlhf", tmp_path)
    with pytest.raises(fk.ModelError, match=r"says nothing about the architecture .* give model="):
        loaded(fresh.path, decoupled=True)
    tiny().config.save_pretrained(fresh.root / f"{TAG}_hf")
    check_state(loaded(fresh.path, decoupled=True), fresh.truth)


@runs(*(name for name in UNSAID if name.startswith("deepspeed")))
def test_whose_decay_it_is_must_be_said(fresh):
    refused(lambda: fresh.load(decoupled=None), "does not say whose", "decoupled=True")


def test_parameters_are_kept_apart_by_gaps(tmp_path):
    """The run with parameter_alignment has gaps, and the one with round_robin_gradients another order."""
    gapped, dealt = (
        Fresh("deepspeed_zero2_aligned", tmp_path / "a"),
        Fresh("deepspeed_zero2_round_robin", tmp_path / "b"),
    )
    state = read_tensors(gapped.file("rank_0_mp_rank_00_optim"), "a file")["optimizer_state_dict"]
    assert any(map(any, state["param_alignment_paddings"]))
    shapes = read_tensors(dealt.file("model_states"), "a file")["param_shapes"]
    assert [*shapes[0]] != [name for name, _ in tiny(tied=False).named_parameters() if name in shapes[0]]


@runs("deepspeed_trainer_zero3")
def test_a_trainer_that_did_not_gather_its_weights(fresh):
    """Without stage3_gather_16bit_weights_on_model_save there is config.json, and no weights but the masters."""
    next(fresh.path.glob("model.safetensors")).unlink()
    found = fresh.load()
    check_state(found, fresh.truth)
    assert found.tokenizer is not None
    for name, leaf in fresh.load(optimizer=False).model.named_parameters():
        assert torch.equal(leaf, fresh.truth.rounded[name].float()), name


@runs("deepspeed_zero1_bf16", "deepspeed_zero3_fp32", "deepspeed_zero0_bf16")
def test_steps_that_overflow_skipped_are_not_counted(fresh):
    def skip(held: Any) -> None:
        held["global_steps"], held["skipped_steps"] = 7, 5

    fresh.edit("model_states", skip, every=True)
    check_state(fresh.load(), fresh.truth)
    fresh.edit("model_states", lambda held: held.update(skipped_steps=8), every=True)
    refused(fresh.load, "skipped_steps=8")


@runs("deepspeed_zero2_bf16", "deepspeed_zero3_bf16")
def test_an_early_deepspeed_took_an_empty_step_before(fresh):
    fresh.edit("model_states", lambda held: held.update(global_steps=1), every=True)
    refused(fresh.load, "is of step 2, .* of step 1")
    fresh.edit("model_states", lambda held: held.update(ds_version="0.12.6+unknown"), every=True)
    check_state(fresh.load(), fresh.truth)


def test_ranks_are_ordered_as_numbers(tmp_path):
    for rank in range(12):
        (tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    (tmp_path / "mp_rank_00_model_states.pt").touch()
    names = [path.name.split("_")[3] for path in files_of(tmp_path).optimizer]
    assert names == [str(rank) for rank in range(12)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_parts_cover_every_number_once(ranks):
    shapes = {name: leaf.shape for name, leaf in tiny().named_parameters()}
    group = flat_group(shapes, [number % 3 for number in range(len(shapes))])
    size = -(-group.total // (2 * ranks)) * 2
    for cut in (lambda rank: pieces_of(group, size, rank), lambda rank: slices_of(shapes, ranks, rank)):
        seen = {name: torch.zeros(shape.numel()) for name, shape in shapes.items()}
        for rank in range(ranks):
            for name, into, _, numel in cut(rank):
                seen[name][into : into + numel] += 1
        assert all(bool((counts == 1).all()) for counts in seen.values())


def test_before_the_first_step(tmp_path):
    """A checkpoint before any step has masters and no moments: the state begins at zero."""
    fresh = Fresh("deepspeed_zero2_fp32", tmp_path)
    fresh.edit(
        "optim_states", lambda held: held["optimizer_state_dict"]["base_optimizer_state"]["state"].clear(), every=True
    )
    fresh.edit("model_states", lambda held: held.update(global_steps=0))
    state: Any = fresh.load().optimizer
    assert {*state.step.values()} == {0}
    assert all(not bool(leaf.any()) for leaf in state.exp_avg.values())


def test_equal_weights_without_zero_leave_the_order_to_the_caller(tmp_path):
    """ZeRO-0 in bfloat16 with norms that are not trained among equal ones: masters fit in several ways."""
    fresh = Fresh("deepspeed_zero0_bf16", tmp_path)
    names = [name for name, _ in tiny().named_parameters()]

    def drop(held: Any) -> None:
        own = held["optimizer"]
        place = names.index("model.layers.0.input_layernorm.weight")
        own["fp32_groups"][0].pop(place)
        base = own["optimizer_state_dict"]
        base["param_groups"][0]["params"].remove(place)
        del base["state"][place]

    fresh.edit("model_states", drop)
    refused(fresh.load)
    rest = [name for name in names if name != "model.layers.0.input_layernorm.weight"]
    found = fresh.load(names=rest)
    assert {*moments_of(found)} == {*rest}
    for name in rest:
        assert torch.equal(found.model.get_parameter(name), fresh.truth.theta[name]), name
