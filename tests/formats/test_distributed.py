"""Distributed checkpoints by their trainers' writers: prime-rl, NeMo-RL, torchtitan, and what is refused of them."""

from __future__ import annotations

import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fkernel as fk
from fkernel import checkpoint
from fkernel.checkpoint.chunks import covers
from fkernel.io import fingerprint
from tests.formats.family import check_next_step, check_state, copied, loaded, refused
from tests.formats.policy import tiny

NEMO = ("nemo_v1", "nemo_v2", "nemo_v2_dcp")
PLACES = {
    "prime_fsdp2": ("step_2", "step_2/trainer"),
    "prime_offload": ("step_2", "step_2/trainer"),
    "torchtitan_fsdp2": ("step-2",),
    "nemo_v1": ("step_2", "step_2/policy", "step_2/policy/weights"),
    "nemo_v2": ("step_2", "step_2/policy", "step_2/policy/weights", "step_2/policy/weights/model"),
    "nemo_v2_dcp": ("step_2", "step_2/policy", "step_2/policy/weights", "step_2/policy/weights/model"),
}
"""{run: what a user may point at; all are the same checkpoint}."""
TIED = ("nemo_v1", "nemo_v2_dcp")


def model_of(run: str) -> Any:
    return tiny(seed=7, tied=run in TIED)


@pytest.fixture(scope="module", params=PLACES)
def run(request, tmp_path_factory) -> tuple[str, Path, Any]:
    return request.param, *copied(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def fresh(request, tmp_path) -> tuple[Path, Any]:
    """A copy that may be damaged, and the model."""
    path, _ = copied(request.param, tmp_path)
    return path / PLACES[request.param][0], model_of(request.param)


def test_the_state_is_the_writers(run):
    name, path, truth = run
    found = loaded(path / PLACES[name][0], model=model_of(name))
    check_state(found, truth)
    check_next_step(found, truth)
    state: Any = found.optimizer
    assert {*state.lr.values()} == {truth.meta["lr"]}


def test_every_place_is_the_same_checkpoint(run):
    name, path, _ = run
    prints = {
        (found.provenance.fingerprint, found.step, fingerprint(moments_of(found)))
        for found in (loaded(path / place, model=model_of(name)) for place in PLACES[name])
    }
    assert len(prints) == 1


def moments_of(found: checkpoint.Checkpoint) -> Any:
    state: Any = found.optimizer
    return state.exp_avg_sq


def test_weights_alone(run, monkeypatch):
    name, path, truth = run
    load, read = torch.load, list[Any]()
    monkeypatch.setattr(torch, "load", lambda *given, **how: read.append(load(*given, **how)) or read[-1])
    found = loaded(path / PLACES[name][0], model=model_of(name), optimizer=False)
    assert found.optimizer is None
    tensors = [leaf.numel() for leaf in read if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    assert sum(tensors) <= sum(leaf.numel() for leaf in found.model.state_dict().values())  # no moments
    for key, leaf in found.model.named_parameters():
        if key in truth.theta:
            assert torch.equal(leaf, truth.rounded.get(key, truth.theta[key]).float()), key


def test_nemo_v2_has_its_own_configuration(tmp_path):
    path, truth = copied("nemo_v2", tmp_path)
    found = loaded(path / "step_2")
    check_state(found, truth)
    assert {*truth.meta["frozen"]} == {name for name, leaf in found.model.named_parameters() if not leaf.requires_grad}
    assert found.provenance.layout == "nemo"
    assert found.tokenizer is not None


def test_nemo_v2_of_lora(tmp_path):
    """The adapter is PEFT's; the optimizer names its parameters as NeMo's own model does."""
    path, truth = copied("nemo_v2_lora", tmp_path / "run")
    base = tiny(tied=False)
    base.save_pretrained(tmp_path / "base")
    for place in ("step_2", "step_2/policy", "step_2/policy/weights", "step_2/policy/weights/model"):
        found = loaded(path / place, base=tmp_path / "base")
        named = {
            f"base_model.model.{name}".replace(".lora_A.", ".lora_A.default.").replace(
                ".lora_B.", ".lora_B.default."
            ): name
            for name in truth.theta
        }
        trees = {
            tree: {own: getattr(truth, tree)[name] for own, name in named.items()}
            for tree in ("theta", "exp_avg", "exp_avg_sq", "grads", "after")
        }
        check_state(found, truth._replace(**trees))
        check_next_step(found, truth._replace(**trees))
    refused(lambda: loaded(path / "step_2"), "base=")


def shard(path: Path, rank: int, where: str = "") -> Path:
    """One rank's file."""
    return next(each for each in sorted(path.rglob(f"__{rank}_0.distcp")) if where in str(each))


ALL = pytest.mark.parametrize("fresh", PLACES, indirect=True)


@ALL
@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_file_is_named(fresh, rank):
    path, model = fresh
    file = shard(path, rank)
    file.unlink()
    refused(lambda: loaded(path, model=model), f"There is no file .*{file.name}", "a rank's file is missing")


@ALL
def test_a_file_that_is_cut_off_is_named(fresh):
    path, model = fresh
    file = shard(path, 1)
    file.write_bytes(file.read_bytes()[:-700])
    refused(lambda: loaded(path, model=model), f"{file.name} is cut off", "Copy it again")


@ALL
def test_one_flipped_bit_is_seen(fresh):
    """In the middle of a tensor's numbers: PyTorch itself would load it."""
    path, model = fresh
    file = shard(path, 1)
    data = bytearray(file.read_bytes())
    name = data.index(b"archive/data/0")  # in the entry's header, which ends with the length of what pads it
    data[name + len(b"archive/data/0") + int.from_bytes(data[name - 2 : name], "little") + 2] ^= 1
    file.write_bytes(data)
    refused(lambda: loaded(path, model=model), f"{file.name} is damaged: Bad CRC-32")


@pytest.mark.parametrize("fresh", ["torchtitan_fsdp2"], indirect=True)
def test_an_archive_of_several_disks(fresh):
    """A flipped bit in an archive's end, which Python's zipfile answers with an error of its own."""
    path, model = fresh
    file = shard(path, 0)
    data = bytearray(file.read_bytes())
    data[data.index(b"PK\x06\x07") + 16] ^= 2
    file.write_bytes(data)
    refused(lambda: loaded(path, model=model), f"{file.name} has at .*span multiple disks")


@ALL
def test_the_file_of_another_rank_is_seen(fresh):
    path, model = fresh
    shutil.copy(shard(path, 0), shard(path, 1))
    refused(lambda: loaded(path, model=model), "__1_0.distcp")


@ALL
def test_a_damaged_list_is_refused(fresh):
    path, model = fresh
    file = next(path.rglob(".metadata"))
    file.write_bytes(file.read_bytes()[:-100])
    refused(lambda: loaded(path, model=model), r"\.metadata is damaged")


@pytest.mark.parametrize("fresh", ["nemo_v2"], indirect=True)
@pytest.mark.parametrize("rank", [1, 2])
def test_a_missing_shard_of_safetensors_is_seen(fresh, rank):
    path, model = fresh
    next(path.rglob(f"shard-0000{rank}-*.safetensors")).unlink()
    refused(lambda: loaded(path, model=model), "do not hold each number of", "one of them is missing")


@pytest.mark.parametrize("fresh", ["nemo_v2"], indirect=True)
def test_shards_of_safetensors_that_are_damaged_or_of_another_model(fresh):
    path, _ = fresh
    refused(lambda: loaded(path, model=tiny(tied=True)), "lm_head|foreign")
    refused(lambda: loaded(path, model=wider()), r"holds .* of 'lm_head.weight' .* the model's is")
    file = next(path.rglob("shard-00002-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-9])
    refused(lambda: loaded(path, model=model_of("nemo_v2")), "shard-00002-.* is damaged")


def wider() -> Any:
    from transformers import Qwen2ForCausalLM

    config = tiny(tied=False).config
    config.hidden_size, config.vocab_size = 16, 14
    return Qwen2ForCausalLM(config)


@pytest.mark.parametrize("fresh", NEMO, indirect=True)
def test_an_optimizer_folder_without_its_list_is_refused(fresh):
    path, model = fresh
    next((path / "policy" / "optimizer").rglob(".metadata")).unlink()
    refused(lambda: loaded(path, model=model), r"policy/optimizer holds neither \.metadata nor optim/\.metadata")
    assert loaded(path, model=model, optimizer=False).optimizer is None


@pytest.mark.parametrize("fresh", NEMO, indirect=True)
def test_a_run_that_saved_no_optimizer(fresh):
    path, model = fresh
    shutil.rmtree(path / "policy" / "optimizer")
    assert loaded(path, model=model).optimizer is None


def edited(path: Path, change: Any) -> None:
    """Change a checkpoint's list and write it back."""
    file = next(each for each in sorted(path.rglob(".metadata")) if b"exp_avg" in each.read_bytes())
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


@ALL
def test_a_key_that_is_missing(fresh):
    path, model = fresh

    def lose(metadata: Any) -> None:
        key = next(key for key in metadata.state_dict_metadata if key.endswith("norm.weight.exp_avg_sq"))
        del metadata.state_dict_metadata[key]
        for index in [index for index in metadata.storage_data if index.fqn == key]:
            del metadata.storage_data[index]

    edited(path, lose)
    refused(lambda: loaded(path, model=model), "but no exp_avg_sq")


@ALL
def test_a_part_that_is_listed_twice_or_not(fresh):
    """Without the check a tensor would be partly what the memory was, or another's."""
    path, model = fresh
    kept = {file: file.read_bytes() for file in path.rglob(".metadata")}

    def shift(metadata: Any) -> None:
        chunks = next(
            each.chunks for each in metadata.state_dict_metadata.values() if len(getattr(each, "chunks", ())) > 1
        )
        chunks.pop()

    def share(metadata: Any) -> None:
        one, other, *_ = (info for info in metadata.storage_data.values() if info.relative_path == "__1_0.distcp")
        other.offset, other.length = one.offset, one.length

    def lie(metadata: Any) -> None:
        about = next(each for each in metadata.state_dict_metadata.values() if hasattr(each, "chunks"))
        about.properties.dtype = torch.float16

    for change, says in ((shift, "do not cover"), (share, "are both stored in"), (lie, "of torch.float16")):
        edited(path, change)
        refused(lambda: loaded(path, model=model), says)
        for file, data in kept.items():
            file.write_bytes(data)


@pytest.mark.parametrize("fresh", ["nemo_v2", "torchtitan_fsdp2"], indirect=True)
def test_a_key_that_went_astray(fresh):
    """AdamW without its amsgrad would be taken for RAdam: nothing that is stored is passed over."""
    path, model = fresh
    kept = {file: file.read_bytes() for file in path.rglob(".metadata")}

    def rename(metadata: Any) -> None:
        key = next(key for key in metadata.planner_data if key.endswith("q_proj.bias.amsgrad"))
        metadata.planner_data[key] = (metadata.planner_data[key][0], "\0\0\0\0m_groups.model.norm.weight.amsgrad")

    def forget(metadata: Any) -> None:
        del metadata.planner_data[next(key for key in metadata.planner_data if key.endswith("q_proj.bias.amsgrad"))]

    for change, says in ((rename, "m_groups.* and is neither"), (forget, "does not say where in the dictionary")):
        edited(path, change)
        refused(lambda: loaded(path, model=model), says)
        for file, data in kept.items():
            file.write_bytes(data)


@pytest.mark.parametrize("fresh", [*NEMO, "torchtitan_fsdp2"], indirect=True)
def test_files_of_different_steps_are_seen(fresh):
    """Ranks' files are laid out alike at every step: only the steps that parameters have taken tell.

    PyTorch puts these into whichever rank's file is smallest. Of prime-rl's two, one has them all, and nothing tells.
    """
    path, model = fresh
    file = next(each for each in sorted(path.rglob(".metadata")) if b"exp_avg" in each.read_bytes())
    other = bytearray((file.parent / "__1_0.distcp").read_bytes())
    for index, info in pickle.loads(file.read_bytes()).storage_data.items():
        if index.fqn.endswith(".step") and "state." in index.fqn and info.relative_path == "__1_0.distcp":
            place = slice(info.offset, info.offset + info.length)
            saved = io.BytesIO()
            torch.save(torch.load(io.BytesIO(other[place])) + 1, saved)
            assert len(saved.getvalue()) == info.length
            other[place] = saved.getvalue()
    (file.parent / "__1_0.distcp").write_bytes(other)
    refused(lambda: loaded(path, model=model), r"of different steps: .* taken 2 in __0_0.distcp and 3 in __1_0.distcp")


@pytest.mark.parametrize(
    ("shape", "boxes", "whole"),
    [
        ((), [((), ())], True),
        ((4, 2), [((0, 0), (2, 2)), ((2, 0), (2, 2))], True),
        ((4, 2), [((0, 0), (2, 2)), ((2, 0), (1, 2))], False),
        ((4, 2), [((0, 0), (3, 2)), ((2, 0), (2, 2))], False),
        ((4, 2), [((0, 0), (2, 2)), ((0, 0), (2, 2))], False),
        ((4, 2), [((0, 0), (2, 1)), ((0, 1), (2, 1)), ((2, 0), (2, 2))], True),
        ((4, 2), [((0, 0), (4, 2)), ((4, 0), (0, 2))], True),
        ((4, 2), [((0, 0), (5, 2))], False),
        ((4, 2), [((0,), (8,))], False),
        ((0, 2), [], True),
        ((1,), [], False),
    ],
)
def test_covering_is_exact(shape, boxes, whole):
    assert covers(shape, boxes) is whole


def test_a_model_is_asked_for(tmp_path):
    path, _ = copied("prime_fsdp2", tmp_path)
    with pytest.raises(fk.ModelError, match=r"says nothing about the architecture .* give model="):
        checkpoint.load(path / "step_2")
