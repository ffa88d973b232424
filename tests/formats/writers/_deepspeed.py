"""What DeepSpeed's engine knows of a training around a step, brought together by DeepSpeed's own functions."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from tests.formats.policy import loss_of, rows
from tests.formats.truth import Truth


def package(part: str = "") -> Any:
    """DeepSpeed, which this module has its name of."""
    return import_module(f"deepspeed{part}")


def scheduled(optimizer: Any) -> Any:
    """A schedule whose every step has another learning rate."""
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=8)


class Twin:
    """The same training in one process, by torch alone: what a layout without DeepSpeed's own gathering is held to."""

    def __init__(self, model: Any, optimizer_of: Callable[[Any], Any]) -> None:
        self.model = model
        self.optimizer = optimizer_of(model)
        self.schedule = scheduled(self.optimizer)

    def step(self, number: int) -> None:
        """Take one step on all ranks' rows."""
        ranks = torch.distributed.get_world_size()
        self.optimizer.zero_grad()
        for rank in range(ranks):
            (loss_of(self.model, rows(number)[rank::ranks]) / ranks).backward()
        self.optimizer.step()
        self.schedule.step()


class Seen:
    """What DeepSpeed's engine, or its twin, knows of the trained parameters, around the third step."""

    def __init__(self, engine: Any, twin: Twin | None = None) -> None:
        self.engine, self.twin = engine, twin
        self.params = {name: leaf for name, leaf in engine.module.named_parameters() if leaf.requires_grad}
        self.twins = {} if twin is None else dict(twin.model.named_parameters())
        self.parts: dict[str, dict[str, Any]] = {}
        self.lr, self.steps = 0.0, 0

    def before(self) -> None:
        """Look at the checkpoint's θ and moments."""
        self.lr, self.steps = self.engine.get_lr()[0], 2
        if hasattr(self.engine.optimizer, "fp16_groups") and not self.engine.zero_optimization():
            self.steps = max(
                int(entry["step"]) for entry in self.engine.optimizer.state.values()
            )  # an empty one before
        if getattr(self.engine.optimizer, "_hp_optimizer_states_linked", False):  # after group 0's first step, for it
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        for tree in ("theta", "exp_avg", "exp_avg_sq"):
            self.parts[tree] = {name: self._part(name, tree) for name in self.params}
        if not self.engine.bfloat16_enabled() and not self.engine.fp16_enabled():
            self.parts["rounded"] = {}
            return
        kept = torch.bfloat16 if self.engine.bfloat16_enabled() else torch.float16
        self.parts["rounded"] = {name: self._ran_with(leaf).to(kept) for name, leaf in self.params.items()}

    def gradients(self) -> None:
        """Look at what the optimizer is given."""
        if self.twin is None:
            scale = float(getattr(self.engine.optimizer, "loss_scale", None) or 1.0)
            grads = {name: package(".utils").safe_get_full_grad(leaf) for name, leaf in self.params.items()}
            self.parts["grads"] = {name: leaf.detach().float().clone() / scale for name, leaf in grads.items()}

    def truth(self) -> Truth:
        """Look at θ after the step, and put everything together."""
        self.parts["after"] = {name: self._part(name, "theta") for name in self.params}
        if self.twin is not None:
            self.parts["grads"] = {name: leaf.grad for name, leaf in self.twins.items()}
        versions = {"deepspeed": package().__version__, "torch": torch.__version__}
        return Truth(**self.parts, meta={"step": self.steps, "lr": self.lr, "versions": versions})

    def _ran_with(self, leaf: Any) -> torch.Tensor:
        """The whole of what the policy computes with."""
        with package().zero.GatheredParameters([leaf], enabled=hasattr(leaf, "ds_id")):
            return leaf.detach().clone()

    def _part(self, name: str, tree: str) -> torch.Tensor:
        """θ or a moment of one parameter."""
        leaf = self.params[name]
        if self.twin is not None:
            found = leaf if tree == "theta" else self.twin.optimizer.state[self.twins[name]][tree]
        elif self.engine.zero_optimization():
            whole = package(".utils")
            found = whole.safe_get_full_fp32_param(leaf) if tree == "theta" else None
            found = whole.safe_get_full_optimizer_state(leaf, tree) if found is None else found
        else:
            found = self._without_zero(leaf, tree)
        return found.detach().clone()

    def _without_zero(self, leaf: Any, tree: str) -> Any:
        """The same without ZeRO: in the optimizer itself, or beside its float32 copy of the parameter."""
        outer = self.engine.optimizer
        if not hasattr(outer, "fp16_groups"):
            return leaf if tree == "theta" else outer.state[leaf][tree]
        for number, group in enumerate(outer.fp16_groups):
            for place, own in enumerate(group):
                if own is not leaf:
                    continue
                if hasattr(outer, "fp32_groups"):
                    master = outer.fp32_groups[number][place]
                    return master if tree == "theta" else outer.optimizer.state[master][tree]
                flat = outer.fp32_groups_flat[number]
                flat = flat if tree == "theta" else outer.optimizer.state[flat][tree]
                start = sum(other.numel() for other in group[:place])
                return flat[start : start + leaf.numel()].view_as(leaf)
        raise LookupError("The parameter is of no group.")
