"""A checkpoint of FSDP2 on three ranks, read into shards of three and of two: slices of what one process reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fkernel as fk
from fkernel import checkpoint
from fkernel.distributed import group_of, shard_tree
from tests.distributed.cases import two_steps
from tests.distributed.ranks import results
from tests.distributed.test_same_numbers import error_of

SHAPE: Any = {
    "hidden_size": 8,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 13,
}


def save(mesh: Any, folder: Path) -> None:
    """Train a Qwen2 under FSDP2 for two steps of AdamW, and save it as torch.distributed.checkpoint does."""
    from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
    from torch.distributed.fsdp import fully_shard
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model: Any = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    if mesh.get_local_rank() == 0:
        model.save_pretrained(folder / "begun")
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh)
    weights, state = two_steps(model)
    save_distributed({"model": weights, "optimizer": state}, checkpoint_id=folder / "dcp")


def differing(loaded: checkpoint.ShardedCheckpoint, whole: checkpoint.Checkpoint, mesh: Any) -> list[str]:
    """Name what is not, bit for bit, this rank's slice of what was read whole."""
    trees = {"params": (loaded.params, {name: leaf.detach() for name, leaf in whole.model.named_parameters()})}
    if loaded.optimizer is not None:
        for moment in ("exp_avg", "exp_avg_sq"):
            trees[moment] = getattr(loaded.optimizer, moment), getattr(whole.optimizer, moment)
        assert loaded.optimizer.step == whole.optimizer.step  # pyright: ignore
    found = list[str]()
    for what, (own, every) in trees.items():
        slices = shard_tree(group_of(mesh), every)
        assert own.keys() == slices.keys()
        found += [f"{what}: {name}" for name, leaf in slices.items() if not torch.equal(leaf, own[name])]
    held = dict(loaded.model.named_buffers())
    return found + [name for name, value in whole.model.named_buffers() if not torch.equal(held[name], value)]


def loaded_and_explained(mesh: Any, folder: Path) -> dict[str, Any]:
    """What differs between shards and whole, on three ranks and on two; and a step explained from both."""
    save(mesh, folder)
    few, found = dist.device_mesh.DeviceMesh("cpu", [0, 1]), dict[str, Any]()
    given: Any = {"model": folder / "begun", "dtype": torch.float64}
    whole = checkpoint.load(folder / "dcp", **given)
    for mine in (mesh, few):
        if mine.get_coordinate() is None:
            continue
        loaded = checkpoint.load_shards(folder / "dcp", mine, **given)
        begun = checkpoint.load(folder / "begun", dtype=torch.float64)
        weights = checkpoint.load_shards(folder / "begun", mine, dtype=torch.float64)
        found[f"{mine.size()}"] = differing(loaded, whole, mine) + differing(weights, begun, mine)
    loaded = checkpoint.load_shards(folder / "dcp", mesh, **given)
    E, U = fk.func.pad([[1, 2], [3]], [[4, 5], [6, 7]]), fk.func.pad([[2]], [[3, 4]])
    w = torch.ones(1, dtype=torch.float64)
    S = fk.func.sequence_logprob(fk.func.make_functional(loaded.model)[0])
    effect, _ = fk.explain_step(S, loaded.params, E, U, w, loaded.optimizer, mesh=mesh)  # pyright: ignore
    apply, params = fk.func.make_functional(whole.model)
    alone, _ = fk.explain_step(fk.func.sequence_logprob(apply), params, E, U, w, whole.optimizer)  # pyright: ignore
    found["apart"] = float((effect.predicted - alone.predicted).norm() / alone.predicted.norm())
    (torch_file := folder / "one.pt").write_bytes(b"")
    found["file"] = error_of(lambda: checkpoint.load_shards(torch_file, mesh, **given))
    found["architecture"] = error_of(lambda: checkpoint.load_shards(folder / "dcp", mesh))
    return found


@pytest.mark.turns(6)
@pytest.mark.parametrize("ranks", [3])
def test_shards_are_slices_of_the_whole_on_any_number_of_ranks(tmp_path, ranks):
    for rank, found in enumerate(results(ranks, loaded_and_explained, tmp_path)):
        assert found["3"] == []
        assert found.get("2", []) == []
        assert ("2" in found) == (rank < 2)
        assert found["apart"] <= 1e-12
        assert found["file"].startswith("CheckpointError: ")
        assert "read whole by each rank" in found["file"]
        assert found["architecture"].startswith("ModelError: ")
        assert "give model=" in found["architecture"]
