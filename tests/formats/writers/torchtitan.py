"""torchtitan's checkpoints, `step-N/`: one directory of torch.distributed.checkpoint, the weights at its top.

    <name>                                          the model's own parameters
    optimizer.state.<name>.{step, exp_avg, exp_avg_sq}, optimizer.param_groups.<name>.lr, …    flattened
    lr_scheduler.last_epoch, train_state.{step, ntokens_seen}

Its own CheckpointManager, OptimizersContainer and LRSchedulersContainer write it, about the tiny policy in the place
of a model of torchtitan's.

Source: torchtitan 0.3.0, `torchtitan/components/checkpointer/dcp.py` and `torchtitan/components/optimizer/utils.py`.
"""

from __future__ import annotations

import pickle
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.formats.policy import BETAS, DECAY, EPS, LR
from tests.formats.writers import _fsdp2 as fsdp2

RUNS = {"torchtitan_fsdp2": 2}


class TrainState:
    """What torchtitan's Trainer saves of itself."""

    def state_dict(self) -> dict[str, Any]:
        return {"step": 2, "ntokens_seen": 64}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError


class Loader:
    """What its ParallelAwareDataloader saves: one pickle a rank of the data-parallel mesh."""

    def state_dict(self) -> dict[str, Any]:
        return {f"dp_rank_{dist.get_rank()}": pickle.dumps({"_num_yielded": 2}), "world_size": dist.get_world_size()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError


def write(name: str, directory: Path) -> None:
    """Write a run."""
    from torchtitan.components.checkpointer.dcp import CheckpointManager  # pyright: ignore[reportMissingImports]
    from torchtitan.components.optimizer import (  # pyright: ignore[reportMissingImports]
        LRSchedulersContainer,
        OptimizersContainer,
        ParamGroupConfig,
    )

    model = fsdp2.policy(fsdp2.mesh(), tied=False, compute=torch.bfloat16)
    usual: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS}
    patterns = {r"(proj|embed_tokens|lm_head)\.weight$": DECAY, r".*": 0.0}
    config = OptimizersContainer.Config(
        param_groups=[
            ParamGroupConfig(pattern=pattern, optimizer_name="AdamW", optimizer_kwargs={**usual, "weight_decay": decay})
            for pattern, decay in patterns.items()
        ],
        implementation="for-loop",
    )
    optimizers = OptimizersContainer(config, model_parts=[model])
    schedulers = LRSchedulersContainer.Config(warmup_steps=4).build(optimizers=optimizers, training_steps=10)
    for number in (0, 1):
        fsdp2.backward(model, number)
        optimizers.step()
        schedulers.step()
    manager = CheckpointManager(
        CheckpointManager.Config(enable=True, interval=2),
        dataloader=Loader(),
        model_parts=[model],
        optimizers=optimizers,
        lr_schedulers=schedulers,
        states={"train_state": TrainState()},
        sd_adapter=None,
        base_folder=str(directory),
    )
    assert manager.save(2)
    inner = optimizers.optimizers[0]
    fsdp2.finish(directory, model, inner, {"torchtitan": version("torchtitan")}, step=optimizers.step)
