"""A state dict into a model of the caller's: every parameter is filled, or it is an error."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from fkernel.checkpoint.files import first_line
from fkernel.checkpoint.names import unwrapped
from fkernel.checkpoint.quiet import libraries_quiet
from fkernel.errors import CheckpointError, ModelError, listing
from fkernel.io import inside, parse_json

INDEX = "model.safetensors.index.json"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"}
"""{how safetensors names a dtype: how torch does}."""


@libraries_quiet()
def architecture(model: str | Path | torch.nn.Module, trust_remote_code: bool = False) -> Any:
    """Make a model of names and shapes: a copy of the caller's, or what a directory's config.json describes.

    Its weights take no memory until `filled` puts some in their place: each is one number, seen in the weight's shape.

    Raises:
        ModelError: the directory holds no configuration of a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

    if isinstance(model, torch.nn.Module):
        made: Any = copy.deepcopy(model)
        if isinstance(made, PreTrainedModel):
            made.set_attn_implementation("eager")  # the only attention that vmap and forward mode both take
        return _emptied(made)
    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=trust_remote_code)
        made = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise ModelError(f"model={str(model)!r} describes no causal language model: {first_line(error)}") from error
    return _emptied(made)


def _emptied(model: Any) -> Any:
    """Give the weights' memory back and keep their shapes; ties stay, as they are of the parameter, not of its data."""
    for leaf in model.parameters():
        if type(leaf) is torch.nn.Parameter:
            leaf.data = leaf.new_zeros(()).expand(leaf.shape)
    return model


def read_safetensors(directory: Path) -> dict[str, Any]:
    """Read model.safetensors, or all the shards that its index names.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    try:
        index = directory / INDEX
        files = shards_of(directory) if index.is_file() else [directory / "model.safetensors"]
        return {name: leaf for file in files for name, leaf in load_file(file).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"The weights in {directory} cannot be read: {first_line(error)}") from error


def shards_of(directory: Path) -> list[Path]:
    """List the files that a directory's index names, all of them in it.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: there is no index, it is none, or names others.
    """
    named = parse_json((directory / INDEX).read_bytes())["weight_map"].values()
    return [inside(directory, name) for name in sorted({*named})]


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
    """Put weights into a model: the tensors themselves where they have its dtype, so that they take no memory twice.

    Names may carry what DDP, torch.compile or FSDP wrapped around the model. A weight that is tied to another need be
    there once.

    Raises:
        ModelError: parameters are missing, foreign, of other shapes, or tied in the model and two in the file.
    """
    own = model.state_dict()
    renamed = {unwrapped(name, own): leaf for name, leaf in weights.items()}
    for name, leaf in renamed.items():
        if name in own and own[name].shape != leaf.shape:
            raise ModelError(
                f"{source} has {name!r} of shape {list(leaf.shape)}, the model's is {list(own[name].shape)}: is it a "
                f"checkpoint of another model?"
            )
    _check_ties(model, renamed, source)
    for name, leaf in model.named_parameters(remove_duplicate=False):
        if name in renamed:
            leaf.data = renamed[name].to(leaf.device, dtype)
    for leaf in model.parameters():
        if 0 in leaf.stride() and leaf.numel() > 1:  # its name is none of these; a hook of the model's may know it
            leaf.data = torch.empty_like(leaf, memory_format=torch.contiguous_format)
    # Fills the buffers, runs the model's own hooks, and finds each parameter equal to itself.
    keys = model.to(dtype).load_state_dict(renamed, strict=False)
    place = {name: id(leaf) for name, leaf in model.state_dict(keep_vars=True).items()}
    there = {place[name] for name in renamed if name in place}
    missing = [name for name in keys.missing_keys if place[name] not in there]
    if missing or keys.unexpected_keys:
        what, names = ("lacks", missing) if missing else ("has foreign", keys.unexpected_keys)
        raise ModelError(f"{source} {what} {len(names)} of the model's parameters: {listing(names)}.")
    return model.eval()


def _check_ties(model: torch.nn.Module, weights: Mapping[str, Any], source: Path) -> None:
    """Hold weights against each other that are one parameter of the model."""
    first: dict[int, str] = {}
    for name, leaf in model.named_parameters(remove_duplicate=False):
        if name not in weights:
            continue
        other = first.setdefault(id(leaf), name)
        one, two = weights[other], weights[name]
        if one.data_ptr() != two.data_ptr() and not torch.equal(one, two):
            raise ModelError(
                f"{source} has two different weights {other!r} and {name!r}, which are tied in the model: is it the "
                f"model that was trained (tie_word_embeddings)?"
            )
