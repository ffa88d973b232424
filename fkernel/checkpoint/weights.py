"""A state dict into a model of the caller's: every parameter is filled, or it is an error."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fkernel.checkpoint.files import first_line
from fkernel.checkpoint.names import unwrapped
from fkernel.checkpoint.quiet import libraries_quiet
from fkernel.errors import CheckpointError, ModelError, listing

INDEX = "model.safetensors.index.json"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"}
"""{how safetensors names a dtype: how torch does}."""


@libraries_quiet()
def architecture(model: str | Path | torch.nn.Module, trust_remote_code: bool = False) -> Any:
    """Make a model whose weights do not matter: a copy of the caller's, or what a directory's config.json describes.

    Raises:
        ModelError: the directory holds no configuration of a causal language model.
    """
    if isinstance(model, torch.nn.Module):
        made: Any = copy.deepcopy(model)
        if isinstance(made, PreTrainedModel):
            made.set_attn_implementation("eager")  # the only attention that vmap and forward mode both take
        return made
    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=trust_remote_code)
        return AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise ModelError(f"model={str(model)!r} describes no causal language model: {first_line(error)}") from error


def read_safetensors(directory: Path) -> dict[str, Any]:
    """Read model.safetensors, or all the shards that its index names.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    try:
        index = directory / INDEX
        files = {*json.loads(index.read_text())["weight_map"].values()} if index.is_file() else {"model.safetensors"}
        return {name: leaf for file in sorted(files) for name, leaf in load_file(directory / file).items()}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"The weights in {directory} cannot be read: {first_line(error)}") from error


def stored_dtypes(directory: Path) -> dict[str, str]:
    """Read how the numbers of a directory's safetensors are stored: {parameter: dtype}; no weights are read."""
    dtypes: dict[str, str] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"The weights in {directory} cannot be read: {first_line(error)}") from error
        dtypes |= {name: DTYPES[kind] for name, kind in kinds.items() if kind in DTYPES}
    return dtypes


def filled(model: Any, weights: Mapping[str, Any], dtype: torch.dtype, source: Path) -> Any:
    """Put weights into a model.

    Names may carry what DDP, torch.compile or FSDP wrapped around the model. A weight that is tied to another need be
    there once.

    Raises:
        ModelError: parameters are missing, foreign, or of other shapes.
    """
    own = model.state_dict()
    renamed = {unwrapped(name, own): leaf for name, leaf in weights.items()}
    for name, leaf in renamed.items():
        if name in own and own[name].shape != leaf.shape:
            raise ModelError(
                f"{source} has {name!r} of shape {list(leaf.shape)}, the model's is {list(own[name].shape)}: is it a "
                f"checkpoint of another model?"
            )
    keys = model.to(dtype).load_state_dict(renamed, strict=False)
    place = {name: leaf.data_ptr() for name, leaf in model.state_dict().items()}
    there = {place[name] for name in renamed if name in place}
    missing = [name for name in keys.missing_keys if place[name] not in there]
    if missing or keys.unexpected_keys:
        what, names = ("lacks", missing) if missing else ("has foreign", keys.unexpected_keys)
        raise ModelError(f"{source} {what} {len(names)} of the model's parameters: {listing(names)}.")
    return model.eval()
