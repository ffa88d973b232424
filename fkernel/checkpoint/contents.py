"""What a saved dictionary holds: the weights and the optimizer's state, under whichever names people save them.

The weights are under model, model_state_dict or state_dict, or are at the top by their own names (torchtitan, NeMo-RL
v2). The optimizer's state is under optimizer, optim, optimizer_states or the like, or in one such inside of another
(NeMo-RL v1: optim.optim); a list of one (Lightning) is that one. Both may be in an "app" (PyTorch's tutorial of
distributed checkpoints, prime-rl). The state may be flattened, as `flatten_optimizer_state_dict` has it:

    state.<name>.exp_avg, param_groups.<name>.lr

A float32 master that lies in a parameter's state is its "master_param", whatever its trainer calls it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fkernel.errors import CheckpointError, listing

WEIGHTS = ("model", "model_state_dict", "state_dict")
OPTIMIZER = ("optimizer", "optimizers", "optim", "optimizer_state_dict", "optimizer_states", "optimizer_state")
AROUND = ("app", "state", "checkpoint")
MASTERS = ("prime_rl_master_weight",)
"""What trainers call the float32 master in a parameter's state."""
BESIDE = (
    *("scheduler", "schedulers", "lr_scheduler", "lr_schedulers", "train_state", "dataloader", "progress"),
    *("step", "epoch", "global_step", "args", "config", "rng_state", "extra_state"),
)
"""What else may lie beside weights that have no name of their own."""


def weights_in(found: Any, source: Any) -> Mapping[str, Any]:
    """Find the model's state dict.

    Args:
        found: what a file or directory holds.
        source: which, for the message.

    Raises:
        CheckpointError: there is none; it says what is there and what was expected.

    Example:
        >>> weights_in({"app": {"model": {"w": torch.ones(1)}}}, "a file")
        {'w': tensor([1.])}
    """
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{source} holds a {type(found).__name__}; expected a dictionary of state dicts.")
    named = next((found[key] for key in WEIGHTS if isinstance(found.get(key), Mapping)), None)
    if named is not None:
        return named
    bare = {name: leaf for name, leaf in found.items() if isinstance(leaf, torch.Tensor) and not _is_flat(name)}
    rest = [name for name in found if name not in bare and not _is_flat(name)]
    if bare and all(name in (*OPTIMIZER, *BESIDE) for name in rest):
        return bare
    for key in AROUND:
        if isinstance(found.get(key), Mapping):
            return weights_in(found[key], f"{source}, under {key!r},")
    raise CheckpointError(f"{source} holds {sorted(map(str, found))[:8]}; expected the weights under 'model'.")


def optimizer_in(found: Any, source: Any) -> Any:
    """Find the optimizer's state_dict, with `state` and `param_groups`; None where there is nothing like one.

    Args:
        found: what a file or directory holds.
        source: which, for messages.

    Raises:
        CheckpointError: there are several, or something that looks like one and is not understood.

    Example:
        >>> flat = {"state.w.step": 3, "param_groups.w.lr": 0.1}
        >>> optimizer_in({"model": {}, "optim": flat}, "a file")
        {'state': {'w': {'step': 3}}, 'param_groups': [{'lr': 0.1, 'params': ['w']}]}
    """
    if isinstance(found, list | tuple):
        if len(found) != 1:
            raise CheckpointError(
                f"{source} holds the states of {len(found)} optimizers; expected one. Save the one whose step is to be "
                f"explained by itself."
            )
        return optimizer_in(found[0], source)
    if not isinstance(found, Mapping):
        return None
    if {"state", "param_groups"} <= set(found):
        return _with_masters(found, source)
    if any(_is_flat(key) for key in found):
        strange = [key for key in found if not _is_flat(key) and not _may_lie_beside(key, found[key])]
        if strange:
            raise CheckpointError(
                f"{source} holds {listing(list(map(str, strange)))} beside state.<name>.… and param_groups.<name>.…, "
                f"and is neither: it is damaged, or an optimizer's that is saved in another way."
            )
        return _with_masters(_unflattened(found), source)
    for key in OPTIMIZER:
        if found.get(key) is not None:
            state = optimizer_in(found[key], f"{source}, under {key!r},")
            if state is None:
                inside = found[key]
                keys = sorted(map(str, inside))[:6] if isinstance(inside, Mapping) else type(inside).__name__
                raise CheckpointError(
                    f"{source} holds under {key!r} no state_dict of an optimizer: {keys}. Expected 'state' and "
                    f"'param_groups', or state.<name>.exp_avg and param_groups.<name>.lr. Say optimizer=False to go "
                    f"on without it."
                )
            return state
    for key in AROUND:
        if isinstance(found.get(key), Mapping):
            return optimizer_in(found[key], f"{source}, under {key!r},")
    strange = [str(key) for key, value in found.items() if "optim" in str(key).lower() and isinstance(value, Mapping)]
    if strange:
        raise CheckpointError(
            f"{source} holds {listing(strange)}, which looks like an optimizer's state; expected it under 'optimizer'. "
            f"Say optimizer=False to go on without it."
        )
    return None


def _is_flat(key: Any) -> bool:
    return isinstance(key, str) and key.startswith(("state.", "param_groups.")) and key.count(".") >= 2


def _may_lie_beside(key: Any, value: Any) -> bool:
    """Whether something may lie where a flattened state does: a weight, or what a trainer keeps."""
    return isinstance(value, torch.Tensor) or key in (*WEIGHTS, *BESIDE)


def _unflattened(found: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `flatten_optimizer_state_dict`: the last part of a name is what it is, between is whose."""
    state = _by_parameter((key, value) for key, value in found.items() if key.startswith("state."))
    groups = _by_parameter((key, value) for key, value in found.items() if key.startswith("param_groups."))
    return {"state": state, "param_groups": [{**group, "params": [name]} for name, group in groups.items()]}


def _with_masters(state_dict: Mapping[str, Any], source: Any) -> Mapping[str, Any]:
    """Call masters by one name, and check that every state is of a parameter that a group has."""
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, Mapping) or not all(isinstance(entry, Mapping) for entry in state.values()):
        return state_dict  # which `recognise` refuses
    if isinstance(groups, list | tuple) and all(isinstance(group, Mapping) and "params" in group for group in groups):
        known = [name for group in groups for name in group["params"]]
        if not all(isinstance(name, int | str | tuple) for name in known):
            return state_dict  # which `recognise` refuses, too
        strange = [name for name in state if name not in {*known}]
        if strange:
            raise CheckpointError(
                f"{source} holds the optimizer's state of {listing(list(map(str, strange)))}, which none of its "
                f"parameter groups has: the groups are of another optimizer, or some are missing."
            )
    if not any(key in entry for entry in state.values() for key in MASTERS):
        return state_dict
    renamed = {
        name: {"master_param" if key in MASTERS else key: value for key, value in entry.items()}
        for name, entry in state.items()
    }
    return {**state_dict, "state": renamed}


def _by_parameter(items: Iterable[tuple[str, Any]]) -> dict[str, dict[str, Any]]:
    by_name: dict[str, dict[str, Any]] = {}
    for key, value in items:
        name, _, field = key.partition(".")[2].rpartition(".")
        by_name.setdefault(name, {})[field] = value
    return by_name
