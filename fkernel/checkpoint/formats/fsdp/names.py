"""Whose state is number i? The numbers of an optimizer that FSDP sharded, and the parameters that they stand for.

    tensors      FSDP2: a number a parameter, whole shapes
    stretches    FSDP1, use_orig_params=True: a number a parameter; a rank that holds nothing of it keeps nothing
    units        FSDP1, use_orig_params=False: a number a flat parameter (`units`)

The first two are in a known order of the model's parameters (`fkernel.checkpoint.order.ORDERS`), which must fit every
size and be the only one that does. What the optimizer keeps nothing of never had a gradient: it was frozen, and is left
out, unless nothing was stepped yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fkernel.checkpoint.formats.fsdp.states import Entries, Pieces
from fkernel.checkpoint.formats.fsdp.units import cut, find_units
from fkernel.checkpoint.names import unwrapped
from fkernel.checkpoint.order import ORDERS
from fkernel.errors import CheckpointError, OptimizerStateError, listing

Groups = Sequence[Mapping[str, Any]]


def named_tensors(groups: Groups, entries: Entries, model: torch.nn.Module, path: Path) -> dict[str, Any]:
    """Name whole tensors: torch's state_dict with names for numbers.

    Args:
        groups: the parameter groups, with numbers.
        entries: what the optimizer keeps of each number.
        model: the model that was trained.
        path: a rank's file, for messages.

    Raises:
        OptimizerStateError: no known order of the parameters fits the shapes, or more than one.
    """
    shapes = {n: next((tuple(v.shape) for v in e.values() if _is_moment(v)), None) for n, e in entries.items()}
    own = {name: tuple(leaf.shape) for name, leaf in model.named_parameters()}
    names = _names(groups, shapes, own, model, path)
    return _state_dict(groups, {names[n]: entry for n, entry in entries.items()}, {n: [names[n]] for n in names})


def named_stretches(
    groups: Groups, entries: Entries, pieces: Pieces, model: torch.nn.Module, path: Path
) -> dict[str, Any]:
    """Bring the stretches of each parameter together, name them and give them their shapes.

    Arguments as in `named_tensors`, and `pieces`, which are used up.

    Raises:
        OptimizerStateError: no known order of the parameters fits the sizes, or more than one.
    """
    sizes = {n: next(sum(map(len, row)) for row in of.values()) for n, of in pieces.items() if of}
    own = {name: leaf.numel() for name, leaf in model.named_parameters()}
    names = _names(groups, sizes, own, model, path)
    shape = {name: leaf.shape for name, leaf in model.named_parameters()}
    state: dict[str, dict[str, Any]] = {}
    for number, entry in entries.items():
        name, of = names[number], pieces.pop(number, {})
        short = [key for key, row in of.items() if sum(map(len, row)) != own[name]]
        if short:
            raise CheckpointError(f"The ranks' files in {path.parent} do not hold all numbers of {short[0]} of {name}.")
        state[name] = entry | {key: torch.cat(row).view(shape[name]) for key, row in of.items()}
    return _state_dict(groups, state, {n: [names[n]] for n in names})


def named_units(
    groups: Groups, entries: Entries, pieces: Pieces, ranks: int, model: torch.nn.Module, path: Path
) -> dict[str, Any]:
    """Bring each flat parameter together, and cut it into its parameters.

    Arguments as in `named_stretches`, and the number of ranks.

    Raises:
        CheckpointError: the ranks' stretches differ in length, one is missing, or no known way to wrap the model fits.
    """
    numbers = [number for group in groups for number in group["params"]]
    lengths: dict[Any, int] = {}
    for number, of in pieces.items():
        for key, row in of.items():
            lengths.setdefault(number, len(row[0]))
            if len(row) != ranks or any(len(piece) != lengths[number] for piece in row):
                raise CheckpointError(
                    f"The {ranks} ranks' files in {path.parent} hold {[len(piece) for piece in row]} numbers of {key} "
                    f"of flat parameter {number}; expected the same of each rank. A file is damaged, or of another "
                    f"training."
                )
    units = dict(zip(numbers, find_units([lengths.get(n) for n in numbers], ranks, model, path), strict=True))
    state: dict[str, dict[str, Any]] = {}
    for number, entry in entries.items():
        for name in units[number]:
            state[name] = dict(entry)
        for key in [*pieces.get(number, {})]:
            whole = torch.cat(pieces[number].pop(key))
            for name, leaf in cut(whole, units[number], f"{key} of flat parameter {number}", path.parent).items():
                state[name][key] = leaf
    return _state_dict(groups, state, {number: [*unit] for number, unit in units.items()})


def _is_moment(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _names(
    groups: Groups, sizes: Mapping[Any, Any], own: Mapping[str, Any], model: torch.nn.Module, path: Path
) -> dict[Any, str]:
    """Find the one known order of the model's parameters that fits: {number: name}."""
    places = [[*group["params"]] for group in groups]
    if all(isinstance(group.get("param_names"), list | tuple) for group in groups):
        orders = {"recorded": [[unwrapped(str(n), own) for n in group["param_names"]] for group in groups]}
    else:
        orders = {name: order(model) for name, order in ORDERS.items()}
    found: list[list[list[str]]] = []
    reasons: list[str] = []
    for order, named in orders.items():
        reason = _misfit(places, named, sizes, own)
        if not reason and named not in found:
            found.append(named)
        reasons += [f"{order}: {reason}"] if reason else []
    if len(found) != 1:
        raise OptimizerStateError(
            f"{path} has parameter groups of {[len(row) for row in places]}, and "
            f"{'more than one' if found else 'no'} known order of this model's parameters fits the sizes of all ranks' "
            f"moments ({'; '.join(reasons)}). Is it the model that was trained? Otherwise save the optimizer with "
            f"names: torch.optim.AdamW(model.named_parameters()), or torch.distributed.checkpoint."
        )
    return {n: name for row, names in zip(places, found[0], strict=True) for n, name in zip(row, names, strict=True)}


def _misfit(places: list[list[Any]], named: list[list[str]], sizes: Mapping[Any, Any], own: Mapping[str, Any]) -> str:
    """Say why an order does not fit, or nothing where it does."""
    if [len(row) for row in places] != [len(row) for row in named]:
        return f"it has groups of {[len(row) for row in named]}"
    for row, names in zip(places, named, strict=True):
        for number, name in zip(row, names, strict=True):
            if name not in own:
                return f"the model has no {name!r}"
            if sizes.get(number) not in (None, own[name]):
                return f"{name!r} is {_shown(own[name])}, number {number} is {_shown(sizes[number])}"
    return ""


def _shown(size: Any) -> str:
    return str([*size]) if isinstance(size, tuple) else f"{size} numbers"


def _state_dict(groups: Groups, state: dict[str, Any], named: Mapping[Any, list[str]]) -> dict[str, Any]:
    """Put names in the place of numbers; parameters without a state, where others have one, are left out."""
    kept = [
        {
            **{key: value for key, value in group.items() if key != "param_names"},
            "params": [n for number in group["params"] for n in named[number] if n in state or not state],
        }
        for group in groups
    ]
    twice = [name for name in state if sum(name in group["params"] for group in kept) != 1]
    if twice:
        raise OptimizerStateError(f"The optimizer's parameter groups hold {listing(twice)} more than once, or not.")
    return {"state": state, "param_groups": kept}
