"""Where a checkpoint tells what its training did: configurations, the trainer's settings, modules and dtypes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.dropout import _DropoutNd

from fkernel.checkpoint.arguments import trainer_settings
from fkernel.checkpoint.conditions import (
    Condition,
    Dtypes,
    counted,
    find_conditions,
    frozen_condition,
    masters_condition,
    precision_conditions,
)
from fkernel.checkpoint.files import read_json
from fkernel.checkpoint.layout import Layout
from fkernel.checkpoint.model import ADAPTER
from fkernel.checkpoint.names import unwrapped
from fkernel.checkpoint.recognising import flat_entry, merged
from fkernel.checkpoint.weights import stored_dtypes
from fkernel.shapes import Tree

SCALES = ("qmap", "absmax")
"""Of bitsandbytes' codes: no moments."""


def conditions_of(
    model: Any, layout: Layout, weights: Mapping[str, Any], state_dict: Any, frozen: list[str], rounded: Tree
) -> tuple[Condition, ...]:
    """List the conditions of a loaded checkpoint; see `fkernel.checkpoint.conditions`.

    Args:
        model: the loaded model, its untrained parameters marked.
        layout: where things are.
        weights: the state dict that the model was filled with, or {} where the weights are safetensors.
        state_dict: the optimizer's, or None.
        frozen: parameters that were marked because the optimizer does not have them.
        rounded: the weights that the policy ran with, where the model has the optimizer's float32 masters.

    Returns:
        Nothing for a model that nothing says was trained: without optimizer, trainer's state and adapter.
    """
    adapted = (layout.model / ADAPTER).is_file()
    if state_dict is None and layout.trainer_state is None and not adapted:
        return ()
    config, adapter = _config(model), _adapter(model, layout) if adapted else {}
    near = [place.parent for place in (layout.trainer_state, layout.optimizer) if place is not None]
    settings = trainer_settings(*near, layout.model if layout.model.is_dir() else layout.model.parent)
    found = find_conditions(config, adapter, settings, {} if adapted else dict(_dropping(model)))
    if state_dict is not None:
        stored = dtypes_of_weights(layout, weights)
        base = _base_dtypes(adapter) if adapted else {}
        trained = stored if adapted else _of(stored, model)
        if rounded:
            trained = {**trained, **dict.fromkeys(rounded, "float32")}
            found += (masters_condition(model, rounded),)
        found += precision_conditions(counted(iter(trained.values())), _moments(state_dict), base)
    if frozen:
        total = len(frozen) + sum(leaf.requires_grad for _, leaf in model.named_parameters())
        found += (frozen_condition(frozen, total),)
    return found


def dtypes_of_weights(layout: Layout, weights: Mapping[str, Any]) -> Mapping[str, str]:
    """Tell in which dtypes weights are stored: {name: dtype}, under their stored names.

    Args:
        layout: where things are.
        weights: the state dict that the model was filled with, or {} where the weights are safetensors.
    """
    stored = {name: str(leaf.dtype).removeprefix("torch.") for name, leaf in weights.items() if _is_number(leaf)}
    return stored or stored_dtypes(layout.model)


def trained_dtypes(model: torch.nn.Module, layout: Layout, weights: Mapping[str, Any]) -> dict[str, torch.dtype]:
    """Tell in which dtype each trained parameter is stored, where its name is found; an adapter's keys drop its name.

    Args:
        model: the loaded model, its untrained parameters marked.
        layout: where things are.
        weights: as in `dtypes_of_weights`.
    """
    stored = dtypes_of_weights(layout, weights)
    names = [name for name, leaf in model.named_parameters() if leaf.requires_grad]
    known = {unwrapped(name, names): kind for name, kind in stored.items()}
    dtypes = {name: known.get(name, known.get(name.replace(f".{layout.adapter or 'default'}.", "."))) for name in names}
    return {name: getattr(torch, kind) for name, kind in dtypes.items() if kind is not None}


def _config(model: Any) -> Mapping[str, Any]:
    config: Any = getattr(model, "config", None)
    if isinstance(config, Mapping):
        return config
    return config.to_dict() if hasattr(config, "to_dict") else {}


def _adapter(model: Any, layout: Layout) -> Mapping[str, Any]:
    """Read the adapter's configuration, with the base that was in fact loaded."""
    config = read_json(layout.model / ADAPTER, "a PEFT adapter's configuration")
    loaded = getattr(getattr(model, "config", None), "_name_or_path", None)
    return {**config, "base_model_name_or_path": loaded or config.get("base_model_name_or_path")}


def _base_dtypes(adapter: Mapping[str, Any]) -> Dtypes:
    place = Path(str(adapter.get("base_model_name_or_path")))
    return counted(iter(stored_dtypes(place).values())) if place.is_dir() else {}


def _dropping(model: Any) -> Iterator[tuple[str, float]]:
    for name, module in model.named_modules():
        rate = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0.0)
        if isinstance(rate, float) and rate > 0:
            yield name or type(module).__name__, rate


def _of(stored: Mapping[str, str], model: torch.nn.Module) -> Mapping[str, str]:
    """Keep the trained parameters' dtypes; all of them, where the names are others."""
    trained = {name for name, leaf in model.named_parameters() if leaf.requires_grad}
    return {name: kind for name, kind in stored.items() if unwrapped(name, trained) in trained} or stored


def _moments(state_dict: Any) -> Dtypes:
    entries = [flat_entry(entry) for entry in merged(state_dict)["state"].values()]
    leaves = [
        leaf for entry in entries for key, leaf in entry.items() if _is_number(leaf) and not key.startswith(SCALES)
    ]
    return counted(leaf.dtype for leaf in leaves if leaf.ndim > 0)


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
