"""DeepSpeed's checkpoints that are refused: a rank's file is missing, damaged, or of another rank, step or training."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from fkernel.checkpoint.files import read_tensors
from tests.formats.deepspeed_runs import FLAT, PLACES, SHARDED, SLICED, TAG, Fresh, register, runs
from tests.formats.family import check_state, refused
from tests.formats.policy import DECAY, tiny
from tests.formats.saving import save_again


@pytest.fixture(autouse=True)
def registered(monkeypatch) -> None:
    register(monkeypatch)


@pytest.fixture
def fresh(request, tmp_path) -> Fresh:
    return Fresh(request.param, tmp_path)


@runs(*SHARDED)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_rank_is_named(fresh, rank):
    file = fresh.file(f"rank_{rank}_mp_rank_00_optim_states")
    file.unlink()
    says = f"lacks {file.name}" if rank == 0 else r"rank_1_mp|lacks|files of \d ranks|ranks and optimizer states of"
    refused(fresh.load, says)


@runs(*SLICED)
def test_a_missing_rank_of_the_model_is_named(fresh):
    fresh.file("rank_0_mp_rank_00_model_states").unlink()
    refused(fresh.load, "lacks zero_pp_rank_0_mp_rank_00_model_states")


@runs(*PLACES)
def test_a_file_that_is_cut_off_is_named(fresh):
    file = fresh.file("optim_states" if "zero0" not in fresh.run else "model_states")
    file.write_bytes(file.read_bytes()[:-700])
    refused(fresh.load, file.name)


@runs(*FLAT, *SLICED)
def test_ranks_under_each_others_names_are_seen(fresh):
    one, other = (fresh.file(f"rank_{rank}_mp_rank_00_optim_states") for rank in (0, 1))
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)
    refused(fresh.load, f"{one.name} was saved as {other.name}")


@runs(*FLAT, "deepspeed_zero2_aligned", "deepspeed_zero2_round_robin", "deepspeed_zero1_fp32_gradients")
def test_ranks_that_were_saved_again_under_each_others_names_are_seen(fresh):
    """The archive says the wrong name then: the places that a rank records are another's."""
    one, other = (fresh.file(f"rank_{rank}_mp_rank_00_optim_states") for rank in (0, 1))
    held = [read_tensors(path, "a file") for path in (other, one)]
    for path, found in zip((one, other), held, strict=True):
        save_again(found, path)
    refused(fresh.load, rf"{one.name} .*(another rank's|do not round)")
    for path, found in zip((one, other), held, strict=True):
        del found["optimizer_state_dict"]["param_slice_mappings"]
        save_again(found, path)
    refused(fresh.load, "another rank's file|do not round to the weights")


@runs(*SHARDED)
def test_a_rank_of_another_step_is_seen(fresh):
    def later(held: Any) -> None:
        own = held["optimizer_state_dict"]
        base = own.get("base_optimizer_state", own.get("optimizer_state_dict"))
        for entry in base if isinstance(base, list) else base["state"].values():
            entry["step"] = entry["step"] + 1

    def earlier(held: Any) -> None:
        later(held)
        later(held)
        own = held["optimizer_state_dict"]
        base = own.get("base_optimizer_state", own.get("optimizer_state_dict"))
        for entry in base if isinstance(base, list) else base["state"].values():
            entry["step"] = entry["step"] - 3

    file = fresh.file("rank_1_mp_rank_00_optim_states")
    kept = file.read_bytes()
    for change in (earlier, later):
        file.write_bytes(kept)
        fresh.edit(file.name, change)
        refused(fresh.load, file.name, "different steps")
    for path in fresh.tag.glob("*optim_states.pt"):
        if path != file:
            fresh.edit(path.name, later)
    refused(fresh.load, "is of step 3, .*model_states.pt of step 2")


@runs(*FLAT)
def test_weights_of_another_step_are_seen(fresh):
    def move(held: Any) -> None:
        held["module"]["model.norm.weight"] *= 1.1

    fresh.edit("model_states", move)
    refused(fresh.load, "masters of 'model.norm.weight' that do not round to the weights")


@runs("deepspeed_trainer_zero2", "deepspeed_trainer_zero3", "deepspeed_trainer_lora")
def test_pretrained_weights_of_another_step_are_seen(fresh):
    from safetensors.torch import load_file, save_file

    file = next(fresh.path.glob("*model.safetensors"))
    weights = load_file(file)
    name = next(name for name in sorted(weights) if "norm" in name or "lora_B" in name)
    save_file({**weights, name: weights[name] * 1.125 + 1e-3}, file, metadata={"format": "pt"})
    refused(fresh.load, "are not the rounding of the float32 masters", str(fresh.path))
    assert fresh.load(optimizer=False).optimizer is None


@runs("deepspeed_trainer_zero2", "deepspeed_trainer_zero3", "deepspeed_trainer_lora")
def test_a_trainers_directory_without_its_state(fresh):
    shutil.rmtree(fresh.tag)
    refused(fresh.load, f"no directory .*{TAG}")
    assert fresh.load(optimizer=False).optimizer is None


@runs(*SHARDED)
def test_keys_that_are_missing_are_named(fresh):
    keys = {
        "model_states": ("module", "param_shapes", "global_steps", "ds_config"),
        "optim_states": ("optimizer_state_dict",),
    }
    for name, lost in keys.items():
        for key in lost:
            file = fresh.file(name)
            kept = file.read_bytes()
            fresh.edit(name, lambda held, key=key: held.pop(key))
            refused(fresh.load, file.name, key) if "trainer" not in fresh.run or key != "module" else None
            file.write_bytes(kept)


@runs(*FLAT, *SLICED)
def test_keys_within_a_ranks_state(fresh):
    inner = ("exp_avg", "exp_avg_sq", "step")

    def lose(held: Any, key: str) -> None:
        own = held["optimizer_state_dict"]
        base = own.get("base_optimizer_state", own.get("optimizer_state_dict"))
        del base["state"][0][key]

    file = fresh.file("rank_1_mp_rank_00_optim_states")
    kept = file.read_bytes()
    for key in inner:
        fresh.edit(file.name, lambda held, key=key: lose(held, key))
        refused(fresh.load, file.name)
        file.write_bytes(kept)
    for key in [*read_tensors(file, "a file")["optimizer_state_dict"]]:
        fresh.edit(file.name, lambda held, key=key: held["optimizer_state_dict"].pop(key))
        needed = {
            *("base_optimizer_state", "single_partition_of_fp32_groups", "partition_count", "group_paddings"),
            *("optimizer_state_dict", "fp32_flat_groups"),
        }
        refused(fresh.load, file.name, key) if key in needed else check_state(fresh.load(), fresh.truth)
        file.write_bytes(kept)


@runs(*FLAT, *SLICED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_moments_in_other_dtypes(fresh, dtype):
    def change(held: Any) -> None:
        own = held["optimizer_state_dict"]
        base = own.get("base_optimizer_state", own.get("optimizer_state_dict"))
        base["state"][0]["exp_avg"] = base["state"][0]["exp_avg"].to(dtype)

    file = fresh.edit("optim_states", change)
    refused(fresh.load, file.name, "exp_avg", str(dtype).removeprefix("torch."), "float32")


@runs(*FLAT, *SLICED)
@pytest.mark.parametrize("what", ["moment", "master", "square", "text", "nan"])
def test_tensors_of_other_kinds(fresh, what):
    def change(held: Any) -> None:
        own = held["optimizer_state_dict"]
        base = own.get("base_optimizer_state", own.get("optimizer_state_dict"))
        masters = own.get("single_partition_of_fp32_groups", own.get("fp32_flat_groups"))
        moment = base["state"][0]["exp_avg_sq"]
        if what == "moment":
            base["state"][0]["exp_avg_sq"] = moment[:-1].clone()
        elif what == "master":
            masters[0] = masters[0].detach()[:-1].clone()
        elif what == "square":
            base["state"][0]["exp_avg_sq"] = moment[None].clone()
        elif what == "text":
            base["state"][0]["exp_avg_sq"] = "numbers"
        else:
            moment[0] = float("nan")

    file = fresh.edit("rank_1_mp_rank_00_optim_states", change)
    refused(fresh.load, file.name)


@runs(*FLAT, *SLICED)
def test_shapes_and_names_of_another_model(fresh):
    def wider(held: Any) -> None:
        held["param_shapes"][0] |= {"model.norm.weight": torch.Size([9])}

    def renamed(held: Any) -> None:
        held["param_shapes"][0] = {f"critic.{name}": shape for name, shape in held["param_shapes"][0].items()}

    file = fresh.file("model_states")
    kept = file.read_bytes()
    for change, says in ((wider, "of shape"), (renamed, "which the model does not have")):
        fresh.edit(file.name, change)
        refused(fresh.load, file.name, says)
        file.write_bytes(kept)


def test_a_model_that_is_tied_otherwise(tmp_path):
    tied, untied = Fresh("deepspeed_zero2_fp32", tmp_path / "a"), Fresh("deepspeed_zero3_subgroups", tmp_path / "b")
    refused(lambda: tied.load(model=tiny(tied=False)), "ties 'lm_head.weight' to 'model.embed_tokens.weight'")
    refused(lambda: untied.load(model=tiny(tied=True)), "keeps .* apart, and the model ties them")


@runs("deepspeed_zero1_bf16", "deepspeed_zero3_fp32", "deepspeed_openrlhf")
def test_files_of_two_trainings(fresh):
    other = fresh.tag / "mp_rank_00_model_states.pt"
    if other.is_file():
        other = fresh.tag / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    shutil.copy(fresh.file("model_states"), other)
    refused(fresh.load, "files of two trainings")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mp_rank_01_model_states.pt", "tensor parallelism"),
        ("layer_0_expert_0_mp_rank_00_model_states.pt", "expert or pipeline parallelism"),
        ("offloaded_tensors", "NVMe"),
        ("zero", "universal format"),
    ],
)
def test_other_parallelism_is_refused_by_name(tmp_path, name, says):
    fresh = Fresh("deepspeed_zero2_bf16", tmp_path)
    (fresh.tag / name).touch()
    refused(fresh.load, says, name)


def test_a_group_that_another_set_of_ranks_shares(tmp_path):
    fresh = Fresh("deepspeed_zero2_bf16", tmp_path)
    fresh.edit("optim_states", lambda held: held["optimizer_state_dict"].update(partition_count=[1]), every=True)
    refused(fresh.load, r"cut into \[1\] parts; there are files of 2 ranks")


def test_several_tags_and_none_that_is_the_latest(tmp_path):
    fresh = Fresh("deepspeed_zero2_bf16", tmp_path)
    (fresh.path / "latest").unlink()
    check_state(fresh.load(), fresh.truth)
    shutil.copytree(fresh.tag, fresh.path / "global_step4")
    refused(fresh.load, "holds 2 DeepSpeed checkpoints", "name one's directory")
    (fresh.path / "latest").write_text("global_step9")
    refused(fresh.load, "no directory .*global_step9")


def test_an_optimizer_that_depends_on_the_cut(tmp_path):
    fresh = Fresh("deepspeed_zero2_bf16", tmp_path)

    def muon(held: Any) -> None:
        held["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][0]["use_muon"] = True

    fresh.edit("optim_states", muon, every=True)
    refused(fresh.load, "Muon")


@runs("deepspeed_zero2_round_robin", "deepspeed_open_instruct")
def test_a_schedule_of_another_step_is_seen(fresh):
    fresh.edit("model_states", lambda held: held["lr_scheduler"].update(_last_lr=[9e-4] * 2), every=True)
    if "open" in fresh.run:
        fresh.edit("model_states", lambda held: held["lr_scheduler"].update(_last_lr=[9e-4]), every=True)
    refused(fresh.load, "learning rates", "not of the same step")


def test_an_elastic_checkpoint_needs_its_configuration(tmp_path):
    fresh = Fresh("deepspeed_zero1_elastic", tmp_path)
    state: Any = fresh.load().optimizer
    assert {*state.weight_decay.values()} == {DECAY}
    fresh.edit("model_states", lambda held: held["ds_config"].pop("optimizer"))
    fresh.edit("optim_states", lambda held: held["ds_config"].pop("optimizer"), every=True)
    refused(fresh.load, "elastic_checkpoint, which leaves out lr")


@runs("deepspeed_zero0_bf16", "deepspeed_zero0_fused")
def test_what_is_wrong_without_zero(fresh):
    file = fresh.file("model_states")
    kept = file.read_bytes()

    def inner(held: Any) -> Any:
        return held["optimizer"]["optimizer_state_dict"]["state"]

    def half(held: Any) -> None:
        inner(held)[0]["exp_avg"] = inner(held)[0]["exp_avg"].bfloat16()

    def shorter(held: Any) -> None:
        inner(held)[0]["exp_avg_sq"] = inner(held)[0]["exp_avg_sq"][:-1].clone()

    def text(held: Any) -> None:
        held["module"]["model.norm.weight"] = "a tensor"

    def step(held: Any) -> None:
        inner(held)[1]["step"] = 2.5

    for change, says in (
        (lambda held: [held["optimizer"].pop(key, None) for key in ("fp32_groups", "fp32_groups_flat")], "fp32_groups"),
        (lambda held: held["optimizer"].pop("optimizer_state_dict"), "state"),
        (lambda held: inner(held).pop(1), r"no state of the optimizer's parameters \[1\]"),
        (lambda held: held["module"]["model.norm.weight"].mul_(3), "round|apart"),
        (half, "bfloat16"),
        (shorter, "of one shape"),
        (text, "'model.norm.weight' as str"),
        (step, "a step of 2.5"),
    ):
        fresh.edit(file.name, change)
        refused(fresh.load, says)
        file.write_bytes(kept)
