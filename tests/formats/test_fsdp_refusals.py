"""FSDP's rank files that are missing, damaged, of another rank, step or training: refused, and the file is named."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard

from fkernel.checkpoint.formats.fsdp.parts import Part, ShardedTensor, joined, opened, part_of
from fkernel.checkpoint.formats.fsdp.places import rank_files
from fkernel.checkpoint.formats.fsdp.units import cut, find_units, units_of
from fkernel.errors import CheckpointError
from tests.formats.family import copied, loaded, refused
from tests.formats.policy import tiny
from tests.formats.test_fsdp import ACTOR, RANKS, edited, place

RUNS = ("verl_fsdp1", "verl_fsdp1_orig", "verl_fsdp1_hybrid", "verl_fsdp2", *RANKS)
KINDS = ("model", "optim")


class Fresh:
    """A run that may be damaged, and how it is loaded."""

    def __init__(self, run: str, directory: Path) -> None:
        self.run = run
        self.root, truth = copied(run, directory)
        self.options = {"model": tiny(seed=7, tied="lm_head.weight" not in truth.theta)} if run in RANKS else {}
        self.directory = self.root / ACTOR if run.startswith("verl") else self.root

    def load(self) -> Any:
        return loaded(place(self.run, self.root), **self.options)

    def files(self, kind: str) -> list[Path]:
        return rank_files(
            self.directory,
            kind if self.run not in RANKS else {"model": "pytorch_model_fsdp", "optim": "optimizer"}[kind],
        )


@pytest.fixture(params=RUNS)
def fresh(request, tmp_path) -> Fresh:
    return Fresh(request.param, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes(fresh, kind):
    first, second = fresh.files(kind)[:2]
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    refused(fresh.load, second.name)
    second.write_bytes(b"")
    refused(fresh.load, second.name)
    place = whole.index(numbers_in(second.with_suffix(".kept"), whole))
    second.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
    refused(fresh.load, second.name, "Bad CRC-32")
    second.write_bytes(first.read_bytes())
    refused(fresh.load, f"{second.name} was saved as {first.stem}")
    second.unlink()
    refused(fresh.load, second.name if fresh.run not in RANKS else "do not hold each number|ranks")
    first.write_bytes(whole)
    second.write_bytes(whole)
    refused(fresh.load, f"{first.name} was saved as {second.stem}")


def numbers_in(path: Path, whole: bytes) -> bytes:
    """A tensor's bytes in a file of torch.save."""
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as archive:
        tensors = [archive.read(name) for name in archive.namelist() if "/data/" in name]
    path.unlink()
    return max(tensors, key=len)


@pytest.mark.parametrize("kind", KINDS)
def test_another_trainings_files(fresh, kind, tmp_path):
    other = Fresh("verl_fsdp1_lora" if fresh.run.startswith("verl") else "verl_fsdp2", tmp_path / "other")
    theirs, ours = other.files(kind)[1], fresh.files(kind)[1]
    if ours.name == theirs.name:
        shutil.copy(theirs, ours)
        refused(fresh.load, ours.name)
    shutil.copy(theirs, fresh.directory)
    if ours.name != theirs.name and fresh.run not in RANKS:
        refused(fresh.load, "of trainings of")


class Payload:
    """What a hostile file would run."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


@pytest.mark.parametrize("kind", KINDS)
def test_other_contents(fresh, kind):
    path = fresh.files(kind)[1]
    for contents, says in (
        (Payload(), "GLOBAL (builtins.)?exec"),
        ([1], "holds a list"),
        ({"x": 1}, f"{path.name}|{path}"),
    ):
        path.unlink()
        torch.save(contents, path)
        refused(fresh.load, path.name, says)


EDITS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "step": (lambda found: first_of(found).update(step=torch.tensor(3.0)), "says step 3 of .*two steps"),
    "lr": (lambda found: found["param_groups"][0].update(lr=0.5), "other parameter groups"),
    "groups": (lambda found: found.pop("param_groups"), "expected one rank's part of an optimizer's"),
    "state": (lambda found: found.pop("state"), "expected one rank's part of an optimizer's"),
    "number": (lambda found: found["state"].update({99: {}}), "the state of 99, which is in none"),
    "moment": (lambda found: first_of(found).pop("exp_avg_sq"), "exp_avg_sq"),
    "text": (lambda found: first_of(found).update(exp_avg="many"), "exp_avg"),
    "dtype": (lambda found: halved(first_of(found)), "exp_avg.* in torch.float64"),
    "shape": (lambda found: shortened(first_of(found)), "exp_avg|order of this model's parameters"),
    "NaN": (lambda found: first_of(found)["exp_avg_sq"].fill_(float("nan")), "."),
}


def first_of(found: Any) -> dict[str, Any]:
    return next(iter(found["state"].values()))


def halved(entry: dict[str, Any]) -> None:
    leaf = entry["exp_avg"]
    if hasattr(leaf, "_local_tensor"):
        leaf._local_tensor = leaf._local_tensor.double()
    else:
        entry["exp_avg"] = leaf.double()


def shortened(entry: dict[str, Any]) -> None:
    leaf = entry["exp_avg"]
    if hasattr(leaf, "_local_tensor"):
        leaf._local_tensor = leaf._local_tensor[:-1].clone()
    else:
        entry["exp_avg"] = leaf[:-1].clone()


@pytest.mark.parametrize("edit", [name for name in EDITS if name != "NaN"])
@pytest.mark.parametrize("name", [run for run in RUNS if run != "accelerate_fsdp1_ranks"])
def test_an_optimizers_file_that_was_edited(name, edit, tmp_path):
    fresh = Fresh(name, tmp_path)
    change, says = EDITS[edit]
    edited(fresh.files("optim")[1], change)
    refused(fresh.load, says)


@pytest.mark.parametrize("name", ["verl_fsdp1", "verl_fsdp2"])
def test_a_models_file_that_was_edited(name, tmp_path):
    for number, (change, says) in enumerate(
        (
            (lambda found: found.pop("model.norm.weight"), "differ in 'model.norm.weight'"),
            (lambda found: found.update(extra=torch.ones(2)), "differ in 'extra'"),
            (lambda found: shortened_weight(found), r"model.norm.weight'; rank 1's part of \[8\] is"),
            (lambda found: found.update({"model.norm.weight": 3}), "as a int; expected a tensor"),
        )
    ):
        fresh = Fresh(name, tmp_path / str(number))
        path = edited(fresh.files("model")[1], change)
        refused(fresh.load, path.name, says)


def shortened_weight(found: Any) -> None:
    found["model.norm.weight"]._local_tensor = found["model.norm.weight"]._local_tensor[:-1].clone()


@pytest.mark.parametrize("name", ["verl_fsdp2", "accelerate_fsdp2_ranks"])
def test_ranks_under_each_others_names_saved_again(name, tmp_path):
    """The mesh in a DTensor knows which rank saved it, whatever the file is called."""
    for number, kind in enumerate(KINDS):
        fresh = Fresh(name, tmp_path / str(number))
        held = [dict(opened(path, "a file")) for path in fresh.files(kind)]
        for path in fresh.files(kind):
            path.unlink()
        for path, theirs in zip(sorted(fresh_names(fresh, kind, len(held))), [*held[1:], held[0]], strict=True):
            torch.save(theirs, path)
        refused(fresh.load, "it is not rank 0's file")


def fresh_names(fresh: Fresh, kind: str, ranks: int) -> list[Path]:
    named = {"model": "pytorch_model_fsdp_0_rank{}.bin", "optim": "optimizer_0_rank{}.bin"}
    if fresh.run.startswith("verl"):
        return [fresh.directory / f"{kind}_world_size_{ranks}_rank_{rank}.pt" for rank in range(ranks)]
    return [fresh.directory / named[kind].format(rank) for rank in range(ranks)]


def test_one_ranks_file_by_itself(fresh):
    for kind in KINDS:
        path = fresh.files(kind)[0]
        refused(lambda path=path: loaded(path), "one rank's part", str(path.parent))


def test_what_verl_says_of_its_training(tmp_path):
    fresh = Fresh("verl_fsdp1", tmp_path)
    config = fresh.directory / "fsdp_config.json"
    for text, says in (
        ('{"FSDP_version": 1, "world_size": 4}', "world_size is 4; the names .* say 2"),
        ('{"FSDP_version": 2, "world_size": 2}', "flat tensors, as FSDP1 keeps them; fsdp_config.json .* says FSDP2"),
        ('{"FSDP_version": 3, "world_size": 2}', "FSDP_version is 3"),
        ('{"FSDP_version": 1}', "no whole number 'world_size'"),
        ("[]", "no whole number 'world_size'"),
        ("{", "is no JSON"),
    ):
        config.write_text(text)
        refused(fresh.load, str(fresh.directory), says)
    config.unlink()
    assert fresh.load().step == 2


def test_directories_of_verls(tmp_path):
    fresh = Fresh("verl_fsdp2", tmp_path)
    (fresh.root / "latest_checkpointed_iteration.txt").write_text("2")
    refused(lambda: loaded(fresh.root), f"name one of them, such as {fresh.root / 'global_step_2'}")
    shutil.copy(fresh.files("model")[0], fresh.directory / "model_world_size_3_rank_3.pt")
    refused(fresh.load, r"beyond the number of ranks, 'model_world_size_3_rank_3.pt'")
    (fresh.directory / "model_world_size_3_rank_3.pt").unlink()
    for path in fresh.files("optim"):
        path.unlink()
    found = fresh.load()
    assert found.optimizer is None


def test_numbers_of_ranks_that_differ(tmp_path):
    """Ranks are sorted as numbers; ten of them come after nine."""
    for rank in range(12):
        (tmp_path / f"model_world_size_12_rank_{rank}.pt").touch()
    assert [path.name[:-3].rsplit("_", 1)[1] for path in rank_files(tmp_path, "model")] == [str(r) for r in range(12)]
    (tmp_path / "model_world_size_12_rank_7.pt").unlink()
    refused(lambda: rank_files(tmp_path, "model"), "lacks 'model_world_size_12_rank_7.pt'")


def test_a_scheduler_of_another_step(tmp_path):
    fresh = Fresh("verl_fsdp1", tmp_path)
    for path in fresh.files("optim"):
        edited(path, lambda found: found["param_groups"][0].update(lr=5e-4))
    refused(fresh.load, r"learning rates are \[0.0005\], its scheduler at .*extra_state_world_size_2_rank_0.pt")


def test_weights_of_another_step_where_they_were_exported_too(tmp_path):
    """Otherwise nothing tells a model's rank file of another step, whole and under its own name, from this one's."""
    fresh = Fresh("verl_fsdp2_bf16", tmp_path)
    export = fresh.directory / "huggingface" / "model.safetensors"
    edited(fresh.files("model")[1], lambda found: found["model.norm.weight"]._local_tensor.add_(0.01))
    refused(fresh.load, f"hold other weights than {export}", "'model.norm.weight'")
    export.write_bytes(export.read_bytes()[:100])
    refused(fresh.load, f"{export} cannot be read")
    export.unlink()
    assert fresh.load().step == 2


def test_models_of_accelerates(tmp_path):
    fresh = Fresh("accelerate_fsdp2_ranks", tmp_path)
    shutil.copy(fresh.files("optim")[0], fresh.directory / "optimizer_1_rank0.bin")
    refused(fresh.load, "parts of 2 models or optimizers: .*optimizer_1_rank0.bin")
    (fresh.directory / "optimizer_1_rank0.bin").unlink()
    for path in fresh.files("model"):
        path.rename(path.with_name(path.name.replace("_0_rank", "_rank")))
    refused(fresh.load, "LOCAL_STATE_DICT, whose flat parameters have no names")


def test_a_model_of_another_size(tmp_path):
    from transformers import Qwen2ForCausalLM

    for number, name in enumerate(("verl_fsdp1", "verl_fsdp2")):
        fresh = Fresh(name, tmp_path / str(number))
        config = tiny().config
        config.intermediate_size = 14
        refused(
            lambda fresh=fresh, config=config: loaded(fresh.directory, model=Qwen2ForCausalLM(config)),
            r"model has \[14, 8\]",
        )
        path = fresh.directory / "huggingface" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 3, "layer_types": None}))
        refused(fresh.load, "lacks .* of the model's parameters|known way to wrap|known order of this model")


def test_another_way_to_wrap_is_refused(tmp_path):
    """transformer_layer_cls_to_wrap or min_num_params of the user's own: no file tells."""
    fresh = Fresh("verl_fsdp1", tmp_path)
    for path in fresh.files("optim"):
        edited(path, split_unit)
    refused(
        fresh.load,
        r"4 flat parameters of FSDP1, of \[64, 268, 2 × 134\] numbers on each of 2 ranks, and no known way",
        r"a unit for each Qwen2DecoderLayer: 3 of \[64, 2 × 268\]; one unit: 1 of \[600\]",
        "use_orig_params=True",
    )


def split_unit(found: Any) -> None:
    found["param_groups"][0]["params"] = [0, 1, 2, 3]
    entry = found["state"][2]
    for number in (2, 3):
        found["state"][number] = {
            key: leaf.chunk(2)[number - 2].clone() if leaf.ndim else leaf for key, leaf in entry.items()
        }


def test_numbers_in_the_padding(tmp_path):
    """Three ranks' parts of 536 numbers are 179, and the last rank's ends with one zero."""
    model = tiny()
    unit = units_of(model, [model])[0]
    total = sum(torch.Size(shape).numel() for shape in unit.values())
    whole = torch.arange(total + 1.0)
    with pytest.raises(CheckpointError, match="other numbers than zeros after the last parameter"):
        cut(whole, unit, "exp_avg", tmp_path)


def test_two_ways_to_wrap_are_never_chosen_between():
    class Layer(torch.nn.Linear):
        pass

    net = torch.nn.Sequential(Layer(2, 2))
    net._no_split_modules = ["Layer"]  # pyright: ignore[reportArgumentType]
    assert find_units([6], 1, net[0], Path("optim.pt")) == [{"weight": (2, 2), "bias": (2,)}]
    with pytest.raises(CheckpointError, match="more than one known way"):
        find_units([6], 1, net, Path("optim.pt"))


def test_layouts_of_tensors_that_are_not_read(tmp_path):
    fresh = Fresh("verl_fsdp2_hybrid", tmp_path)
    leaf = opened(fresh.files("model")[0], "a model")["model.norm.weight"]
    for placements in ((Shard(0), Shard(0)), (Partial(), Shard(0))):
        leaf._spec.placements = placements
        refused(lambda: part_of(leaf, 0, "norm", tmp_path), "laid out by .*, which is not read")
    leaf._spec.placements = (Replicate(), Replicate())
    refused(lambda: part_of(leaf, 0, "norm", tmp_path), r"holds \[4\] of 'norm'; rank 0's part of \[8\] is \[8\]")
    refused(lambda: part_of(leaf, 9, "norm", tmp_path), "it is not rank 9's file")


def test_sharded_tensors_that_do_not_say_where_they_are(tmp_path):
    fresh = Fresh("accelerate_fsdp1_ranks", tmp_path)
    leaf = opened(fresh.files("model")[1], "a model")["model.norm.weight"]
    assert isinstance(leaf, ShardedTensor)
    assert part_of(leaf, 1, "norm", tmp_path) is not None
    refused(lambda: part_of(leaf, 0, "norm", tmp_path), "of rank 1: it is not rank 0's file")
    shard = leaf.saved[0][0].state[1]
    kept = shard["tensor"]
    shard["tensor"] = kept[:-1]
    refused(lambda: part_of(leaf, 1, "norm", tmp_path), "the file is damaged")
    shard["tensor"] = kept
    del shard["metadata"].state[1]["shard_offsets"]
    refused(lambda: part_of(leaf, 1, "norm", tmp_path), "is not one shard with its offsets")


def test_copies_that_differ(tmp_path):
    a, b = (Part((2,), (0,), torch.tensor([1.0, number])) for number in (2.0, 3.0))
    path = tmp_path / "rank.pt"
    assert joined([("w", a, path), ("w", a, path)])["w"].tolist() == [1.0, 2.0]
    refused(lambda: joined([("w", a, path), ("w", b, path)]), f"{path} holds other numbers of w than")
    half = Part((2,), (0,), torch.ones(1))
    refused(lambda: joined([("w", half, path), ("w", half, path)]), "do not hold each number of 'w' once")
    refused(lambda: joined([("w", half, path), ("w", a._replace(shape=(3,)), path)]), "another rank's file says")
