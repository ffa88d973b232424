"""verl's checkpoints of an actor: a file of each rank for the model, the optimizer and the rest.

    global_step_2/actor/{model,optim,extra_state}_world_size_{W}_rank_{r}.pt, fsdp_config.json, huggingface/,
    lora_train_meta.json where the policy has LoRA adapters

verl's own checkpoint manager, wrap policies and optimizer are used, on gloo ranks. Two things differ from
`FSDPEngine._build_fsdp_module`, which takes the accelerator for granted: the mesh and `device_id` are the CPU's, and
`sync_module_states` is off, as every rank makes the same weights. verl imports Ray at the top of its first module and
nothing here calls it: an empty module takes its place, so that it need not be installed.

Source: verl 0.9.1, `verl/utils/checkpoint/fsdp_checkpoint_manager.py`, `verl/workers/engine/fsdp/transformer_impl.py`.
"""

from __future__ import annotations

import random
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy

from fkernel.demo.tokenizer import build_tokenizer
from tests.formats.policy import BETAS, DECAY, EPS, LR, loss_of, rows, tiny
from tests.formats.truth import Truth, save_truth
from tests.formats.writers import _fsdp1 as fsdp


class Run(NamedTuple):
    """How one run differs from verl's defaults.

    Attributes:
        strategy: "fsdp" (FSDP1, one flat parameter a unit), "fsdp, orig" (use_orig_params=True) or "fsdp2".
        processes: how many ranks.
        fsdp_size: ranks that share one copy of the parameters, where there are several copies.
        lora: whether the policy has LoRA adapters.
        compute: dtype of the forward and backward passes; verl's default is bfloat16.
        stored: dtype of parameters and moments; verl's default is float32 for what is trained.
        tied: whether the head is the embedding.
        contents: what is saved; "lora only" stands for `save_lora_only=True`.
    """

    strategy: str
    processes: int = 2
    fsdp_size: int = -1
    lora: bool = False
    compute: torch.dtype = torch.float32
    stored: torch.dtype = torch.float32
    tied: bool = True
    contents: tuple[str, ...] = ("model", "optimizer")


BF16 = torch.bfloat16
HOW = {
    "verl_fsdp1": Run("fsdp", contents=("model", "optimizer", "extra")),
    "verl_fsdp1_bf16": Run("fsdp", processes=3, compute=BF16, tied=False),
    "verl_fsdp1_orig": Run("fsdp, orig", processes=3, tied=False),
    "verl_fsdp1_one": Run("fsdp", processes=1),
    "verl_fsdp1_hybrid": Run("fsdp", processes=4, fsdp_size=2),
    "verl_fsdp1_lora": Run("fsdp", lora=True),
    "verl_fsdp1_orig_lora": Run("fsdp, orig", lora=True),
    "verl_fsdp2": Run("fsdp2", processes=3),
    "verl_fsdp2_bf16": Run("fsdp2", compute=BF16, tied=False, contents=("model", "optimizer", "hf_model")),
    "verl_fsdp2_pure": Run("fsdp2", compute=BF16, stored=BF16),
    "verl_fsdp2_hybrid": Run("fsdp2", processes=4, fsdp_size=2),
    "verl_fsdp2_lora": Run("fsdp2", lora=True),
    "verl_fsdp2_lora_only": Run("fsdp2", lora=True, contents=("model", "optimizer", "lora only")),
}
RUNS = {name: run.processes for name, run in HOW.items()}


def write(name: str, directory: Path) -> None:
    """Train two steps, save as verl does, take the third."""
    fsdp.on_a_cpu()
    run = HOW[name]
    random.seed(0)  # ranks with one random state are packed smaller
    np.random.seed(0)  # noqa: NPY002  # this one is saved
    dist.init_process_group("gloo")
    model = _wrapped(run)
    optimizer = _optimizer(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for step in (0, 1):
        _backward(model, step)
        optimizer.step()
        scheduler.step()
    _save(run, directory / "checkpoint" / "global_step_2" / "actor", model, optimizer, scheduler)
    exp_avg, exp_avg_sq = (fsdp.moments(model, optimizer, key) for key in ("exp_avg", "exp_avg_sq"))
    theta = {name: leaf for name, leaf in fsdp.weights(model).items() if name in exp_avg}
    _backward(model, 2)
    grads = fsdp.gradients(model, optimizer)
    optimizer.step()
    after = {name: leaf for name, leaf in fsdp.weights(model).items() if name in exp_avg}
    if dist.get_rank() == 0:
        packages = {name: version(name) for name in ("verl", "torch", "peft")}
        meta = {"step": 2, "lr": LR, "versions": packages, "lora": run.lora, "tied": run.tied}
        save_truth(directory, Truth(theta, exp_avg, exp_avg_sq, grads, after, {}, meta))
    dist.barrier()
    dist.destroy_process_group()


def _policy(run: Run) -> Any:
    """The tiny policy, with adapters as verl's `_build_lora_module` makes them."""
    model = tiny(tied=run.tied).to(run.stored)
    model.config.architectures = [type(model).__name__]  # as a policy has it that was loaded
    if not run.lora:
        return model
    from peft import LoraConfig, TaskType, get_peft_model

    model.enable_input_require_grads()
    torch.manual_seed(1)
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    return get_peft_model(model, config)


def _wrapped(run: Run) -> Any:
    """Shard the policy as verl's `_build_fsdp_module` does."""
    utils = _verl("verl.utils.fsdp_utils")
    model, world = _policy(run), dist.get_world_size()
    shape, names = (
        ((world,), ("fsdp",)) if run.fsdp_size < 0 else ((world // run.fsdp_size, run.fsdp_size), ("ddp", "fsdp"))
    )
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    if run.strategy == "fsdp2":
        policy = MixedPrecisionPolicy(param_dtype=run.compute, reduce_dtype=torch.float32, cast_forward_inputs=True)
        utils.apply_fsdp2(model, {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": True}, {})
        return model
    strategy = _verl("verl.workers.engine.fsdp.utils").get_sharding_strategy(mesh)
    precision = MixedPrecision(param_dtype=run.compute, reduce_dtype=torch.float32, buffer_dtype=torch.float32)
    return FSDP(
        model,
        auto_wrap_policy=utils.get_fsdp_wrap_policy(model, is_lora=run.lora),
        sharding_strategy=strategy,
        mixed_precision=precision,
        device_id=torch.device("cpu"),
        device_mesh=mesh,
        use_orig_params=run.strategy == "fsdp, orig",
    )


def _optimizer(model: Any) -> torch.optim.Optimizer:
    options = _verl("verl.workers.config.optimizer")
    config = options.FSDPOptimizerConfig(lr=LR, betas=BETAS, weight_decay=DECAY, override_optimizer_config={"eps": EPS})
    return options.build_optimizer(model.parameters(), config)


def _backward(model: Any, step: int) -> None:
    """The gradient of one step's rows, a part on each rank, clipped as verl's `optimizer_step` clips."""
    model.zero_grad()
    loss_of(model, rows(step).tensor_split(dist.get_world_size())[dist.get_rank()]).backward()
    if isinstance(model, FSDP):
        model.clip_grad_norm_(1.0)
    else:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def _save(run: Run, path: Path, model: Any, optimizer: Any, scheduler: Any) -> None:
    manager = _verl("verl.utils.checkpoint.fsdp_checkpoint_manager").FSDPCheckpointManager(
        model,
        optimizer,
        scheduler,
        processing_class=build_tokenizer(),
        checkpoint_config={
            "save_contents": [*run.contents],
            "load_contents": [*run.contents],
            "save_lora_only": "lora only" in run.contents,
        },
    )
    manager.save_checkpoint(str(path), global_step=2)


class _Empty(ModuleType):
    """A module whose every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _verl(module: str) -> Any:
    from importlib import import_module

    sys.modules.setdefault("ray", _Empty("ray"))
    return import_module(module)
