"""The step as it was executed: the optimizer's own class, on tensors of its own dtypes, one parameter at a time.

    Δθ_executed = θ' − θ, both as they are stored

Beside the exact step this says what arithmetic did: in pure bfloat16 at a learning rate of 1e-6 two weights in a
hundred move at all. Where the optimizer keeps float32 masters it steps those, and θ' is their rounding.

    torch, transformers    the class itself, with the group's own foreach, fused and capturable; CUDA's kernels may
                           differ from the CPU's in the last digit of a moment
    bitsandbytes           its CPU kernels: codes are decoded, stepped in float32, coded again; decay comes off before
                           the step is added, with CUDA's kernels after it, (θ+Δ)(1−lrλ), which is Δ·lrλ apart
    torchao                its class, not compiled

Stochastic rounding is another draw each time and is refused.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from fkernel import tree
from fkernel.boundary import public
from fkernel.errors import OptimizerStateError
from fkernel.precond.adaptive import Grads
from fkernel.precond.base import OptimizerState
from fkernel.precond.state import check_tree
from fkernel.precond.stored import StoredState, stored_state
from fkernel.precond.updates import OPTIMIZERS
from fkernel.shapes import Tensor, Tree

OWN = ("foreach", "fused", "capturable", "initial_accumulator_value")
"""What a group says of how torch computes, beside the settings of the rule."""


class ExecutedStep(NamedTuple):
    """What an optimizer really did.

    Attributes:
        delta: Δθ = θ' − θ of what is stored, {name: [*shape]}, float64 where the parameters are, else float32.
        moved: the share of weights whose stored value changed.
        entries: {name: what the optimizer keeps of it now}, in its own dtypes.
        masters: {name: its float32 master weights now}, of the parameters that have any.
    """

    delta: Tree
    moved: float
    entries: dict[str, dict[str, Any]]
    masters: Tree


@public
def executed_step(params: Tree, grads: Grads, state: StoredState | OptimizerState) -> ExecutedStep:
    """Take one step with the optimizer's own class, on copies.

    Args:
        params: θ in the dtypes that it was trained in, {name: [*shape]}.
        grads: g = c ∇L as the optimizer was given it; cast to the dtype of what is stepped; None where there is none.
        state: as it is stored (`fkernel.checkpoint.load(…).stored`), or in real numbers, whose own tensors are then
            taken for what the optimizer keeps.

    Returns:
        ExecutedStep(delta, moved, entries, masters); in float64, delta is `optimizer_step(…).total` to rounding.

    Raises:
        OptimizerStateError: rounding is stochastic, the optimizer's package is not installed, masters do not round to
            the weights, or the optimizer refuses.
        TreeError: params, grads and state do not name the same parameters.
        NonFiniteError: a gradient is NaN or infinite.

    Example:
        >>> from fkernel.precond import adamw_init
        >>> params = {"w": torch.ones(4, dtype=torch.bfloat16)}
        >>> executed_step(params, {"w": torch.ones(4)}, adamw_init(params, lr=1e-4)).moved  # 1e-4 is lost beside 1
        0.0
    """
    check_tree(params, "params")
    check_tree(grads, "grads")
    stored = state if isinstance(state, StoredState) else stored_state(state)
    tree.check_names(params, stored.names, "params", "the optimizer state")
    tree.check_names(grads, params, "grads", "params")
    tree.check_finite(params, "params")
    tree.check_finite({name: g for name, g in grads.items() if g is not None}, "grads")
    check_masters(stored.masters, params)
    delta: Tree = {}
    entries: dict[str, dict[str, Any]] = {}
    masters: Tree = {}
    for name, theta in params.items():
        before, g = stored.masters.get(name, theta), grads[name]
        after, entries[name] = (before, dict(stored.entries[name])) if g is None else _stepped(before, g, stored, name)
        if name in stored.masters:
            masters[name] = after
        wide = torch.float64 if theta.dtype == torch.float64 else torch.float32
        delta[name] = (after.to(theta.dtype).double() - theta.detach().double()).to(wide)
    moved = sum(int((leaf != 0).sum()) for leaf in delta.values())
    return ExecutedStep(delta, moved / max(1, tree.size(delta)), entries, masters)


@public
def check_masters(masters: Tree, params: Tree) -> None:
    """Raise OptimizerStateError unless master weights are those that the weights are rounded from.

    Args:
        masters: float32 master weights of some parameters.
        params: the weights, in whatever dtype.

    Example:
        >>> check_masters({"w": torch.tensor([1.001])}, {"w": torch.tensor([1.0], dtype=torch.bfloat16)})
    """
    for name, master in masters.items():
        theta = params[name].detach().float()
        rounding = 2.0**-8  # bfloat16's, the coarsest
        # NaN is not within anything
        apart = ~((master - theta).abs() <= rounding * master.abs() + torch.finfo(torch.float32).tiny)
        if bool(apart.any()):
            raise OptimizerStateError(
                f"The optimizer's master weights of {name!r} are not those that the weights are rounded from: "
                f"{int(apart.sum())} of {apart.numel()} are further apart than rounding, by up to "
                f"{float((master - theta).abs().max()):.3g}. Weights and optimizer are of different steps; load both "
                f"of one checkpoint."
            )


def _stepped(theta: Tensor, g: Tensor, stored: StoredState, name: str) -> tuple[Tensor, dict[str, Any]]:
    """θ' and what the optimizer then keeps."""
    parameter = torch.nn.Parameter(theta.detach().clone())
    parameter.grad = g.detach().to(parameter.dtype).clone()
    optimizer = _optimizer(parameter, stored, name)
    if entry := _copied(stored.entries[name]):
        if stored.writers[name].startswith("torch."):
            entry |= {key: _number(entry[key]) for key in ("step", "mu_product") if key in entry}
        optimizer.state[parameter] = entry
    try:
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise OptimizerStateError(
            f"{stored.writers[name]} could not step {name!r}: {error}. Give parameters and state in the dtypes that "
            f"they were trained in: fkernel.checkpoint's loaded.trained_dtypes and loaded.stored."
        ) from error
    return parameter.detach(), dict(optimizer.state[parameter])


def _optimizer(parameter: Tensor, stored: StoredState, name: str) -> torch.optim.Optimizer:
    """Make the optimizer's own class for one parameter, with its group's settings."""
    writer, group = stored.writers[name], stored.groups[name]
    for key, value in group.items():
        if "stochastic" in key and value:
            raise OptimizerStateError(
                f"{writer} rounds stochastically ({key}={value}): each step is another draw, and what was executed "
                f"cannot be repeated. The exact step is still there."
            )
    package, _, kind = writer.rpartition(".")
    try:
        make = getattr(importlib.import_module(package), kind)
    except ImportError as error:
        raise OptimizerStateError(
            f"The optimizer is {writer}, and {package.partition('.')[0]} is not installed here ({error})."
        ) from error
    optimizer = OPTIMIZERS[stored.kinds[name]]
    keys = {key for key, _ in optimizer.settings.values()} | {*OWN}
    own = {key: value for key, value in group.items() if key in keys}
    given = {"lr": own["lr"]} if own.get("lr") is not None else {}
    if kind == "Adafactor" and package == "transformers":
        given = {key: own[key] for key in ("lr", "relative_step", "warmup_init") if key in own}
    return make([{"params": [parameter], **own}], **given)


def _copied(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, torch.Tensor) else value for key, value in entry.items()}


def _copy(value: Any) -> Tensor:
    """Copy a tensor; one that wraps others (torchao's moments, which have no clone) is made anew of copies of them."""
    if type(value) is torch.Tensor or not hasattr(value, "__tensor_flatten__"):
        return value.detach().clone()
    inner, about = value.__tensor_flatten__()
    copies = {name: getattr(value, name).clone() for name in inner}
    return type(value).__tensor_unflatten__(copies, about, value.shape, value.stride())


def _number(value: Any) -> Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(float(value))
