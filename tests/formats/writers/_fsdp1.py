"""What the writers of FSDP trainings know of their state, gathered whole by torch's own means: FSDP1 and FSDP2.

torch gathers an FSDP1 optimizer's states through one buffer, and takes for granted that they are then copied from the
accelerator to the CPU. On a CPU nothing is copied: each state is left as a view of the buffer, which the next one
overwrites (torch 2.13, `_optim_utils._allgather_orig_param_states`), and a full state of weights is freed. `on_a_cpu`
makes the copies, so that what is saved is what an accelerator's training would save.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, StateDictType, _optim_utils
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor

from fkernel.shapes import Tree


def on_a_cpu() -> None:
    """Copy where torch would copy from an accelerator to the CPU."""
    never = property(lambda self: False, lambda self, value: None)
    options: Any
    for options in (FullStateDictConfig, FullOptimStateDictConfig):
        options.offload_to_cpu = never  # then it copies
    options = StateDictOptions
    options.cpu_offload = never
    utils: Any = _optim_utils
    unflatten = utils._unflatten_orig_param_states

    def copied(info: Any, states: dict[str, dict[str, Any]], key: str, *more: Any) -> None:
        unflatten(info, states, key, *more)
        for entry in states.values():
            if type(entry.get(key)) is torch.Tensor:
                entry[key] = entry[key].clone()

    utils._unflatten_orig_param_states = copied


def weights(model: Any) -> Tree:
    """Gather all parameters."""
    if isinstance(model, FSDP):
        with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
            return {bare(name): leaf.detach().clone() for name, leaf in model.state_dict().items()}
    return {bare(name): whole(leaf) for name, leaf in model.named_parameters()}


def moments(model: Any, optimizer: Any, key: str) -> Tree:
    """Gather what the optimizer keeps of each parameter."""
    if isinstance(model, FSDP):
        state = FSDP.full_optim_state_dict(model, optimizer, rank0_only=False)["state"]
        return {bare(name): entry[key].clone() for name, entry in state.items() if key in entry}
    named = {bare(name): optimizer.state.get(leaf, {}) for name, leaf in model.named_parameters()}
    return {name: whole(entry[key]) for name, entry in named.items() if entry}


def gradients(model: Any, optimizer: Any) -> Tree:
    """Gather the gradients as the optimizer's moments are gathered: in the place of one, for as long as that takes."""
    kept = {leaf: entry["exp_avg"] for leaf, entry in optimizer.state.items()}
    for leaf, entry in optimizer.state.items():
        entry["exp_avg"] = leaf.grad.detach().clone()
    grads = moments(model, optimizer, "exp_avg")
    for leaf, entry in optimizer.state.items():
        entry["exp_avg"] = kept[leaf]
    return grads


def bare(name: str) -> str:
    """Take out what FSDP and activation checkpointing put into a parameter's name."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")


def whole(leaf: Any) -> torch.Tensor:
    """Gather a DTensor."""
    return (leaf.full_tensor() if isinstance(leaf, DTensor) else leaf).detach().clone()
