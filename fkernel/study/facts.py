"""Numbers of the explained step, for the results."""

from __future__ import annotations

from typing import Any

from fkernel.precond import OptimizerState
from fkernel.study.rows import Policy
from fkernel.study.workspace import KernelWorkspace


def settings_of(state: OptimizerState, name: str) -> list[float]:
    """The different values of a setting, over all parameters; [] where the optimizer has none of that name."""
    values = {getattr(state.of(parameter), name, None) for parameter in state.names}
    return sorted(float(value) for value in values if value is not None)


def facts_of_step(workspace: KernelWorkspace, policy: Policy, step: int | None) -> dict[str, Any]:
    """Clipping, temperature, parameter count, rates, sampling diagnostics of U and its loss, JSON.

    Args:
        workspace: U.
        policy: the checkpoint.
        step: optimizer steps taken before; None where unknown.
    """
    state = policy.state
    facts: dict[str, Any] = {"clip": workspace.clip, "grad_norm": workspace.grad_norm}
    facts |= {"step": step, "temperature": workspace.spec["temperature"]}
    facts |= {"parameters": sum(leaf.numel() for leaf in policy.params.values())}
    if state is not None:
        facts |= {"optimizer": type(state).__name__.removesuffix("State"), "lr": settings_of(state, "lr")}
        facts["weight_decay"] = settings_of(state, "weight_decay")
    facts["sampling"] = workspace.batch.diagnostics
    if workspace.loss is not None:
        facts["loss"] = workspace.loss.facts
    return facts
