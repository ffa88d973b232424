"""Safetensors that each rank wrote of its own part, `shard-00001-model-00001-of-00001.safetensors` and so on.

PyTorch's writer for Hugging Face's format, told to save sharded, notes in each header where its parts begin:

    "DCP_SHARDING_INFO": {"model.norm.weight": {"saved_offsets": [4]}, …}

and not how large the whole is: the model knows it, and every number of each parameter must be in one file and no
other. Safetensors have no sums: that a number in a file changed later, nothing tells.

Source: torch 2.13, `torch.distributed.checkpoint.hf_storage` (HuggingFaceStorageWriter, save_distributed=True); the
same of nemo_automodel 0.7.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fkernel.checkpoint.chunks import Box, covers
from fkernel.checkpoint.files import first_line
from fkernel.errors import CheckpointError, listing
from fkernel.io import parse_json
from fkernel.shapes import Tree

PATTERN = "shard-*.safetensors"
SHARDING = "DCP_SHARDING_INFO"


def read_shards(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> Tree:
    """Bring the parts of every parameter together, one file at a time.

    Args:
        directory: where the shards lie.
        shapes: {name: shape} of the model's parameters and buffers.

    Returns:
        {name: tensor}, of what the files hold, in the dtypes in which they hold it.

    Raises:
        CheckpointError: a file is damaged, holds something that the model has not, or the files together do not hold
            each number of a parameter once.
    """
    whole: Tree = {}
    boxes: dict[str, list[Box]] = {}
    files = sorted(directory.glob(PATTERN))
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                info = parse_json((file.metadata() or {}).get(SHARDING, "{}"))
                for name in file.keys():  # noqa: SIM118
                    box = _copied(file.get_tensor(name), name, info, whole, shapes, path)
                    boxes.setdefault(name, []).append(box)
        except CheckpointError:
            raise
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged, or no shard of safetensors: {first_line(error)}") from error
    lacking = [name for name, parts in boxes.items() if not covers(shapes[name], parts)]
    if lacking:
        raise CheckpointError(
            f"The {len(files)} files {PATTERN} in {directory} do not hold each number of {listing(lacking)} once: one "
            f"of them is missing, or of another checkpoint."
        )
    return whole


def _copied(
    part: torch.Tensor, name: str, info: Any, whole: Tree, shapes: Mapping[str, tuple[int, ...]], path: Path
) -> Box:
    """Copy a part into its place; where it is returns."""
    start = tuple(int(begin) for begin in info[name]["saved_offsets"])
    shape = shapes.get(name)
    if shape is None:
        raise CheckpointError(f"{path} holds {name!r}, which the model does not have: is it of another model?")
    ends = [begin + extent for begin, extent in zip(start, part.shape, strict=True)]
    if len(shape) != len(start) or any(end > length for end, length in zip(ends, shape, strict=True)):
        raise CheckpointError(
            f"{path} holds {list(part.shape)} of {name!r} from {list(start)} on, and the model's is {list(shape)}: is "
            f"it of another model?"
        )
    if name not in whole:
        whole[name] = torch.empty(shape, dtype=part.dtype)
    if whole[name].dtype != part.dtype:
        raise CheckpointError(f"{path} holds {name!r} in {part.dtype}, another file in {whole[name].dtype}.")
    whole[name][tuple(slice(begin, end) for begin, end in zip(start, ends, strict=True))] = part
    return start, tuple(part.shape)
