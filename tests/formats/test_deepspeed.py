"""DeepSpeed's checkpoints by DeepSpeed's own writer: every stage of ZeRO, laid as its trainers lay it, and refusals.

fp16 is not written here: DeepSpeed does not run it on a CPU. Its files differ from bfloat16's in their names, and in
steps that an overflow skipped, which are edited into others' files.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fkernel as fk
from fkernel import checkpoint
from fkernel.checkpoint import files, formats
from fkernel.checkpoint.files import read_tensors
from fkernel.checkpoint.formats import deepspeed
from fkernel.checkpoint.formats.deepspeed.flat import flat_group, pieces_of
from fkernel.checkpoint.formats.deepspeed.places import files_of
from fkernel.checkpoint.formats.deepspeed.sliced import slices_of
from fkernel.io import fingerprint
from tests.formats.family import check_next_step, check_state, copied, loaded, refused
from tests.formats.policy import DECAY, tiny
from tests.formats.saving import save_again

TAG = "global_step2"
PLACES: dict[str, tuple[str, ...]] = {
    **{f"deepspeed_zero{stage}_{dtype}": (".", TAG) for stage in range(4) for dtype in ("fp32", "bf16")},
    **{f"deepspeed_zero0_{name}": (".", TAG) for name in ("fused", "fused_fp32")},
    **{f"deepspeed_zero1_{name}": (".", TAG) for name in ("fp32_gradients", "elastic", "frozen")},
    **{f"deepspeed_zero2_{name}": (".", TAG) for name in ("aligned", "round_robin")},
    **{f"deepspeed_zero3_{name}": (".", TAG) for name in ("frozen", "subgroups", "fused")},
    "deepspeed_openrlhf": (".", "_actor", f"_actor/{TAG}"),
    "deepspeed_open_instruct": (".", TAG),
    "deepspeed_accelerate": (".", "pytorch_model"),
    **{f"deepspeed_trainer_{name}": ("checkpoint-2", f"checkpoint-2/{TAG}") for name in ("zero2", "zero3", "lora")},
}
"""{run: what a user may point at; all are the same checkpoint}."""
UNTIED = ("deepspeed_zero2_aligned", "deepspeed_zero2_round_robin", "deepspeed_zero3_subgroups")
UNSAID = ("deepspeed_openrlhf", "deepspeed_zero0_fused", "deepspeed_zero0_fused_fp32", "deepspeed_zero3_fused")
"""A client's FusedAdam or DeepSpeedCPUAdam: no file says whether decay is decoupled."""
SHARDED = [run for run in PLACES if "zero0" not in run]
FLAT = ["deepspeed_zero1_bf16", "deepspeed_zero2_fp32", "deepspeed_openrlhf", "deepspeed_trainer_zero2"]
SLICED = ["deepspeed_zero3_fp32", "deepspeed_zero3_subgroups", "deepspeed_trainer_zero3"]


def options_of(run: str, path: Path) -> dict[str, Any]:
    """What a user must say besides the path."""
    said: dict[str, Any] = {"decoupled": True} if run in UNSAID else {}
    if "trainer" not in run:
        said["model"] = tiny(seed=7, tied=run not in UNTIED)
    if "lora" in run:
        said["base"] = path / "base"
    return said


@pytest.fixture(autouse=True)
def registered(monkeypatch) -> None:
    """The format is among those that are tried."""
    monkeypatch.setitem(formats.FORMATS, "deepspeed", formats.Format(deepspeed.find, deepspeed.read))
    numpy = ("numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype")
    known = files.STAND_INS
    monkeypatch.setattr(files, "STAND_INS", (*known, *(name for name in numpy if name not in known)))


@pytest.fixture(scope="module", params=PLACES)
def run(request, tmp_path_factory) -> tuple[str, Path, Any]:
    return request.param, *copied(request.param, tmp_path_factory.mktemp(request.param))


class Fresh:
    """A copy of a run that may be damaged."""

    def __init__(self, run: str, directory: Path) -> None:
        self.run = run
        self.root, self.truth = copied(run, directory)
        self.path = self.root / PLACES[run][0]
        self.tag = self.root / PLACES[run][-1]

    def load(self, **options: Any) -> checkpoint.Checkpoint:
        return loaded(self.path, **{**options_of(self.run, self.root), **options})

    def file(self, name: str) -> Path:
        return next(path for path in sorted(self.tag.iterdir()) if name in path.name)

    def edit(self, name: str, change: Callable[[Any], None], every: bool = False) -> Path:
        """Change what files hold and save them under their own names: their sums are right."""
        found = [path for path in sorted(self.tag.iterdir()) if name in path.name]
        for path in found if every else found[:1]:
            held = read_tensors(path, "a file")
            held.pop("rng_states", None)  # numpy's, which only numpy writes
            change(held)
            save_again(held, path)
        return found[0]


@pytest.fixture
def fresh(request, tmp_path) -> Fresh:
    return Fresh(request.param, tmp_path)


def runs(*names: str) -> Any:
    return pytest.mark.parametrize("fresh", names, indirect=True)


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


@runs(*UNSAID)
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


# What is missing, damaged, or another's


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
