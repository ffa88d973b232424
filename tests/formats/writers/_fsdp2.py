"""The tiny policy under FSDP2 on gloo ranks: what the writers of sharded trainings share.

Each rank holds a slice of every parameter (`torch.distributed.fsdp.fully_shard`, DTensors on a CPU mesh) and takes its
part of the rows; FSDP2 averages gradients. Whole tensors for the truth come from DTensor's own `full_tensor`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fkernel.shapes import Tree
from tests.formats.policy import BETAS, DECAY, EPS, LR, loss_of, rows, tiny
from tests.formats.truth import Truth, save_truth

MATRICES = ("proj.weight", "embed_tokens.weight", "lm_head.weight")


def mesh() -> DeviceMesh:
    """Start the ranks that torchrun made, on gloo, and give their mesh."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))


def shard(model: Any, of: DeviceMesh, compute: torch.dtype | None = None) -> Any:
    """Shard each layer, then what is outside of them; `compute` is the dtype of forward and backward passes."""
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32 if compute else None)
    for layer in model.model.layers:
        fully_shard(layer, mesh=of, mp_policy=policy)
    return fully_shard(model, mesh=of, mp_policy=policy)


def policy(of: DeviceMesh, tied: bool = True, frozen: tuple[str, ...] = (), compute: torch.dtype | None = None) -> Any:
    """Make the tiny policy, freeze what is asked for, and shard it."""
    model = tiny(tied=tied)
    for name, leaf in model.named_parameters():
        leaf.requires_grad_(name not in frozen)
    return shard(model, of, compute)


def groups(model: Any) -> list[dict[str, Any]]:
    """Two groups: matrices decay, vectors do not."""
    named = [(name, leaf) for name, leaf in model.named_parameters() if leaf.requires_grad]
    decaying = [leaf for name, leaf in named if name.endswith(MATRICES)]
    others = [leaf for name, leaf in named if not name.endswith(MATRICES)]
    return [{"params": decaying, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]


def adamw(parameters: Any) -> torch.optim.AdamW:
    """AdamW with the settings that every run has."""
    return torch.optim.AdamW(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)


def backward(model: Any, number: int) -> None:
    """Compute the gradient of one step's rows, this rank's part of them."""
    model.zero_grad()
    loss_of(model, rows(number).chunk(dist.get_world_size())[dist.get_rank()]).backward()


def full(leaf: Any) -> torch.Tensor:
    """Gather a DTensor; a collective operation."""
    return (leaf.full_tensor() if isinstance(leaf, DTensor) else leaf).detach().clone()


def trained(model: Any) -> dict[str, Any]:
    """List the trained parameters by the model's names."""
    return {name: leaf for name, leaf in model.named_parameters() if leaf.requires_grad}


def gathered(leaves: Mapping[str, Any]) -> Tree:
    """Gather every tensor."""
    return {name: full(leaf) for name, leaf in leaves.items()}


def finish(
    directory: Path,
    model: Any,
    optimizer: torch.optim.Optimizer,
    versions: Mapping[str, str],
    step: Any = None,
    **more: Any,
) -> None:
    """Take the third step after saving, and write what was known at the checkpoint and what the step did."""
    leaves = trained(model)
    theta = gathered(leaves)
    moments = [{name: optimizer.state[leaf][key] for name, leaf in leaves.items()} for key in ("exp_avg", "exp_avg_sq")]
    exp_avg, exp_avg_sq = (gathered(each) for each in moments)
    backward(model, 2)
    grads = gathered({name: leaf.grad for name, leaf in leaves.items()})
    (step or optimizer.step)()
    meta = {"step": 2, "lr": optimizer.param_groups[0]["lr"], "versions": {"torch": torch.__version__, **versions}}
    after = gathered(leaves)
    if dist.get_rank() == 0:
        save_truth(directory, Truth(theta, exp_avg, exp_avg_sq, grads, after, {}, {**meta, **more}))
    close()


def close() -> None:
    """End the process group, all ranks together."""
    dist.barrier()
    dist.destroy_process_group()
