"""prime-rl's trainer checkpoints: `step_N/trainer/`, one directory of torch.distributed.checkpoint.

The package is not on the package index, so this writes what its source writes, with the same calls of torch:

    app.model.*                                  get_state_dict(model, [optimizer]), sharded, DTensors
    app.optimizers.state.<name>.{step, exp_avg, exp_avg_sq}
    app.optimizers.param_groups                  nested, not flattened
    app.scheduler, app.progress                  scheduler.state_dict(); {"step", "total_tokens", "total_samples"}

With full optimizer offload the model is bfloat16, and AdamW steps float32 masters on the CPU, which are saved in the
state of each parameter under "prime_rl_master_weight".

Source: github.com/PrimeIntellect-ai/prime-rl at 559b447 (August 2026), `src/prime_rl/trainer/ckpt.py` (AppState,
CheckpointManager.save_to_path) and `src/prime_rl/trainer/optim/offload.py` (FullCPUOffloadOptimizer).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from tests.formats.policy import tiny
from tests.formats.truth import Truth, save_truth
from tests.formats.writers import _fsdp2 as fsdp2

RUNS = {"prime_fsdp2": 2, "prime_offload": 2}
SOURCE = {"prime-rl": "559b447"}
MASTER = "prime_rl_master_weight"


class AppState(Stateful):
    """What prime-rl saves under "app"."""

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler

    def state_dict(self) -> dict[str, Any]:
        weights, optimizers = get_state_dict(self.model, [self.optimizer])
        progress = {"step": 2, "total_tokens": 72, "total_samples": 8}
        scheduler = self.scheduler.state_dict()
        return {"model": weights, "optimizers": optimizers, "scheduler": scheduler, "progress": progress}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError


def constant(optimizer: torch.optim.Optimizer) -> Any:
    """Its default schedule."""
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def write(name: str, directory: Path) -> None:
    """Write a run."""
    {"prime_fsdp2": _fsdp2_run, "prime_offload": _offload_run}[name](directory)


def _save(directory: Path, state: AppState) -> None:
    path = directory / "checkpoint" / "step_2" / "trainer"
    if dist.get_rank() == 0:
        path.mkdir(parents=True)
    dist.barrier()
    save({"app": state}, checkpoint_id=path)


def _fsdp2_run(directory: Path) -> None:
    """Parameters in float32, computed with in bfloat16, as its default is."""
    model = fsdp2.policy(fsdp2.mesh(), tied=False, compute=torch.bfloat16)
    optimizer = fsdp2.adamw(model.parameters())
    scheduler = constant(optimizer)
    for number in (0, 1):
        fsdp2.backward(model, number)
        optimizer.step()
        scheduler.step()
    _save(directory, AppState(model, optimizer, scheduler))
    fsdp2.finish(directory, model, optimizer, SOURCE)


def _offload_run(directory: Path) -> None:
    """The model in bfloat16, its float32 masters and their moments in CPU memory."""
    mesh, master = fsdp2.mesh(), tiny(tied=False)
    model = fsdp2.shard(tiny(tied=False).bfloat16(), mesh)
    leaves = dict(model.named_parameters())
    masters = {
        name: torch.nn.Parameter(_local(leaf, mesh))
        for name, leaf in zip(leaves, master.state_dict().values(), strict=True)
    }
    optimizer = fsdp2.adamw(masters.values())
    scheduler = constant(optimizer)

    def step(number: int) -> None:
        fsdp2.backward(model, number)
        for name, leaf in leaves.items():
            masters[name].grad = leaf.grad.to_local().float()
        optimizer.step()
        for name, leaf in leaves.items():
            leaf.data.to_local().copy_(masters[name].detach())

    for number in (0, 1):
        step(number)
        scheduler.step()
    _save(directory, AppState(model, _under_model_parameters(optimizer, masters, leaves), scheduler))

    def whole(of: Any) -> dict[str, torch.Tensor]:
        return {name: fsdp2.full(_as(of(masters[name]), leaf)) for name, leaf in leaves.items()}

    theta, rounded = whole(lambda leaf: leaf.detach().clone()), fsdp2.gathered(leaves)
    exp_avg, exp_avg_sq = (
        whole(lambda leaf, key=key: optimizer.state[leaf][key].clone()) for key in ("exp_avg", "exp_avg_sq")
    )
    step(2)
    meta = {"step": 2, "lr": optimizer.param_groups[0]["lr"], "versions": {"torch": torch.__version__, **SOURCE}}
    truth = Truth(
        theta, exp_avg, exp_avg_sq, whole(lambda leaf: leaf.grad), whole(lambda leaf: leaf.detach()), rounded, meta
    )
    if dist.get_rank() == 0:
        save_truth(directory, truth)
    fsdp2.close()


def _local(leaf: torch.Tensor, mesh: Any) -> torch.Tensor:
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(leaf.detach().clone(), mesh, [Shard(0)]).to_local().clone()


def _as(local: torch.Tensor, leaf: Any) -> DTensor:
    """This rank's part of something that is laid out as a parameter is."""
    return DTensor(local, leaf._spec, requires_grad=False)  # pyright: ignore[reportCallIssue]


def _under_model_parameters(
    optimizer: torch.optim.Optimizer, masters: dict[str, Any], leaves: dict[str, Any]
) -> torch.optim.Optimizer:
    """The same optimizer about the model's own parameters, each state with its master, for get_state_dict."""
    shown = torch.optim.AdamW(leaves.values(), lr=1.0)
    shown.param_groups[0].update({key: value for key, value in optimizer.param_groups[0].items() if key != "params"})
    for name, leaf in leaves.items():
        state = optimizer.state[masters[name]]
        shown.state[leaf] = {
            "step": state["step"],
            "exp_avg": _as(state["exp_avg"], leaf),
            "exp_avg_sq": _as(state["exp_avg_sq"], leaf),
            MASTER: _as(masters[name].detach(), leaf),
        }
    return shown
