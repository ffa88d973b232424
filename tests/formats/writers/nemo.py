"""NeMo-RL's checkpoints of its DTensor workers, `step_N/`, on two gloo ranks under FSDP2.

    v1   policy/weights/         torch.distributed.checkpoint of {"model": …}
         policy/optimizer/       the same of {"optim": {"optim": {state, param_groups}, "sched": …}}
    v2   policy/weights/model/   shard-*-model-*-of-*.safetensors, or the same .distcp files ("torch_save")
         policy/optimizer/optim/ {"optim": flattened, "sched": …}: optim.state.<name>.exp_avg, …
    LoRA policy/weights/model/   adapter_model.safetensors, adapter_config.json, whole, in PEFT's names; the optimizer's
                                 state has the model's own
    both policy/tokenizer/, training_info.json

v2 is written by nemo_automodel's own Checkpointer, as NeMo-RL calls it. NeMo-RL itself is not on the package index: v1
is two calls of torch's `save`, and they are made here.

Source: github.com/NVIDIA-NeMo/RL at 7ea279a (August 2026), `nemo_rl/utils/native_checkpoint.py` (v1),
`nemo_rl/models/automodel/checkpoint.py` (v2), `nemo_rl/utils/checkpoint.py` (training_info.json); nemo_automodel 0.7.0.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import save

from tests.checkpoint.writers import TOKENIZER
from tests.formats.policy import tiny
from tests.formats.writers import _fsdp2 as fsdp2

RUNS = {"nemo_v1": 2, "nemo_v2": 2, "nemo_v2_dcp": 2, "nemo_v2_lora": 2}
FROZEN = ("model.layers.0.mlp.down_proj.weight", "model.norm.weight")
SOURCE = {"nemo-rl": "7ea279a"}


def write(name: str, directory: Path) -> None:
    """Write a run."""
    mesh = fsdp2.mesh()
    frozen = FROZEN if name == "nemo_v2" else ()
    if name == "nemo_v2_lora":
        model, peft = _adapted(mesh)
    else:
        model, peft = fsdp2.policy(mesh, tied=name != "nemo_v2", frozen=frozen, compute=torch.bfloat16), None
    optimizer = fsdp2.adamw(fsdp2.trained(model).values())
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=4)
    for number in (0, 1):
        fsdp2.backward(model, number)
        optimizer.step()
        scheduler.step()
    step = directory / "checkpoint" / "step_2"
    policy = step / "policy"
    if dist.get_rank() == 0:
        policy.mkdir(parents=True)
        (step / "training_info.json").write_text(json.dumps({"total_steps": 2, "consumed_samples": 8}))
    dist.barrier()
    if name == "nemo_v1":
        _save_v1(policy, model, optimizer, scheduler)
        versions = SOURCE
    else:
        _save_v2(policy, model, optimizer, scheduler, "torch_save" if name == "nemo_v2_dcp" else "safetensors", peft)
        versions = {**SOURCE, "nemo_automodel": version("nemo_automodel")}
    if dist.get_rank() == 0:
        TOKENIZER.save_pretrained(policy / "tokenizer")
    fsdp2.finish(directory, model, optimizer, versions, frozen=frozen)


def _save_v1(policy: Path, model: Any, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    options = StateDictOptions(cpu_offload=True)
    save({"model": get_model_state_dict(model, options=options)}, checkpoint_id=policy / "weights")
    state = {"optim": get_optimizer_state_dict(model, optimizer, options=options), "sched": scheduler.state_dict()}
    save({"optim": state}, checkpoint_id=policy / "optimizer")


def _adapted(mesh: Any) -> tuple[Any, Any]:
    """The policy with nemo_automodel's own LoRA on two of its projections."""
    from nemo_automodel.components._peft.lora import (  # pyright: ignore[reportMissingImports]
        PeftConfig,
        apply_lora_to_linear_modules,
    )

    model, peft = tiny(tied=False), PeftConfig(target_modules=["*q_proj", "*v_proj"], dim=4, alpha=8, dropout=0.0)
    apply_lora_to_linear_modules(model, peft)
    return fsdp2.shard(model, mesh, torch.bfloat16), peft


def _save_v2(policy: Path, model: Any, optimizer: torch.optim.Optimizer, scheduler: Any, form: str, peft: Any) -> None:
    from nemo_automodel.components.checkpoint.checkpointing import (  # pyright: ignore[reportMissingImports]
        Checkpointer,
        CheckpointingConfig,
    )

    config = CheckpointingConfig(
        checkpoint_dir=str(policy.parent),
        model_save_format=form,
        model_cache_dir="",
        model_repo_id="",
        save_consolidated=False,
        is_peft=peft is not None,
    )
    checkpointer = Checkpointer(config, dp_rank=dist.get_rank(), tp_rank=0, pp_rank=0, moe_mesh=None)
    checkpointer.save_model(model=model, weights_path=str(policy / "weights"), peft_config=peft, tokenizer=None)
    checkpointer.save_optimizer(
        optimizer=optimizer, model=model, weights_path=str(policy / "optimizer"), scheduler=scheduler
    )
