"""The model's states of a DeepSpeed checkpoint: names and shapes in the optimizer's order, and what is told beside.

module                       the weights as the policy ran with them; empty tensors under ZeRO-3
param_shapes                 [{name: shape}], one a group (a sub-group under ZeRO-3), in the order of the flat tensor
shared_params                {tied name: the name under which it is kept}
global_steps, skipped_steps  steps begun, and those that fp16's overflows left out: the optimizer took the difference
ds_config, lr_scheduler      as the training had them
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fkernel.checkpoint.files import check_saved_as, first_line, read_tensors
from fkernel.checkpoint.names import unwrapped
from fkernel.errors import CheckpointError, FKernelError, listing

Shapes = list[dict[str, torch.Size]]
STATES = "the model's states of a DeepSpeed checkpoint"


class ModelStates(NamedTuple):
    """What one file of model states tells.

    Attributes:
        path: the file.
        found: all that it holds.
        module: {the model's own name: tensor}.
        shapes: of every group or sub-group, by the model's own names, in the order of the flat tensors.
        config: DeepSpeed's configuration.
        step: steps that the optimizer has taken.
    """

    path: Path
    found: Mapping[str, Any]
    module: Mapping[str, Any]
    shapes: Shapes
    config: Mapping[str, Any]
    step: int

    def check_config(self, saved: Mapping[str, Any], path: Path) -> None:
        """Raise CheckpointError where another file's configuration is of another training."""
        config = saved.get("ds_config")
        config = config if isinstance(config, Mapping) else self.config
        for key in SECTIONS:
            if config.get(key) != self.config.get(key):
                raise CheckpointError(
                    f"{path} was trained with {key}={config.get(key)}, {self.path.name} beside it with "
                    f"{self.config.get(key)}: they are of different trainings. Copy all files of one."
                )

    def zero(self) -> Mapping[str, Any]:
        """Give the settings of ZeRO."""
        settings = self.config.get("zero_optimization")
        return settings if isinstance(settings, Mapping) else {}


RAN_IN = (torch.float32, torch.bfloat16, torch.float16)
SECTIONS = ("zero_optimization", "optimizer", "bf16", "fp16")
"""Of DeepSpeed's configuration: the same in every file of one training."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in whatever goes wrong while what it holds is looked at."""
    try:
        yield
    except FKernelError:
        raise
    except Exception as error:  # a changed file may hold anything anywhere
        raise CheckpointError(
            f"{path} does not hold what DeepSpeed writes: {type(error).__name__}, {first_line(error)}. Copy it again "
            f"from where it was saved."
        ) from error


def read_file(path: Path, what: str, *keys: str, mmap: bool = True) -> Mapping[str, Any]:
    """Map a file of torch.save that is a dictionary with certain keys, and was saved under its own name.

    What is kept of it must be copied, or the file read: `mmap=False`.

    Raises:
        CheckpointError: it is missing, damaged, another rank's, or another thing.
    """
    found = read_tensors(path, what, mmap=mmap)
    check_saved_as(path)
    return check_keys(found, path, *keys)


def check_keys(found: Any, path: Path, *keys: str) -> Mapping[str, Any]:
    """Raise CheckpointError unless something is a dictionary that has certain keys."""
    missing = [key for key in keys if key not in found] if isinstance(found, Mapping) else [*keys]
    if not isinstance(found, Mapping) or missing:
        has = listing([str(key) for key in found]) if isinstance(found, Mapping) else type(found).__name__
        raise CheckpointError(f"{path} has no {listing(missing)} where DeepSpeed writes it; it has {has}.")
    return found


def read_states(path: Path, model: torch.nn.Module, mmap: bool = False) -> ModelStates:
    """Read a file of model states and hold its names and shapes against the model.

    Args:
        path: the file.
        model: the architecture.
        mmap: whether nothing of it is kept.

    Raises:
        CheckpointError: it is damaged, lacks a key, or is about another model.
    """
    found = read_file(path, STATES, "module", "param_shapes", "global_steps", "ds_config", mmap=mmap)
    known = dict(model.named_parameters(remove_duplicate=False))
    if not isinstance(found["module"], Mapping):
        raise CheckpointError(f"{path} holds no weights: 'module' is a {type(found['module']).__name__}.")
    everything = {**known, **dict(model.named_buffers())}
    module = {unwrapped(name, everything): leaf for name, leaf in found["module"].items()}
    _check_weights(module, everything, path)
    _check_tied(found.get("shared_params") or {}, known, path)
    steps = [found["global_steps"], found.get("skipped_steps", 0)]
    if any(type(step) is not int or step < 0 for step in steps) or steps[1] > steps[0]:
        raise CheckpointError(f"{path} tells global_steps={steps[0]!r}, skipped_steps={steps[1]!r}; expected numbers.")
    config = found["ds_config"] if isinstance(found["ds_config"], Mapping) else {}
    shapes = own_shapes(found["param_shapes"], known, path)
    return ModelStates(path, found, module, shapes, config, steps[0] - steps[1])


def own_shapes(listed: Any, known: Mapping[str, torch.Tensor], path: Path) -> Shapes:
    """Bring recorded shapes under the model's own names.

    Args:
        listed: [{name: shape}]; None where nothing is cut into partitions.
        known: the model's parameters.
        path: the file, for messages.

    Raises:
        CheckpointError: a name is not the model's, appears twice, or has another shape.
    """
    groups: Shapes = []
    seen: dict[int, str] = {}
    for group in listed or []:
        own: dict[str, torch.Size] = {}
        for written, shape in group.items():
            name = unwrapped(written, known)
            if name not in known:
                raise CheckpointError(
                    f"{path} is about a parameter {written!r}, which the model does not have: is it a checkpoint of "
                    f"another model?"
                )
            if tuple(shape) != tuple(known[name].shape):
                raise CheckpointError(
                    f"{path} has {written!r} of shape {list(shape)}, the model's is {list(known[name].shape)}: is it "
                    f"a checkpoint of another model?"
                )
            if id(known[name]) in seen:
                raise CheckpointError(
                    f"{path} keeps {seen[id(known[name])]!r} and {written!r} apart, and the model ties them into one."
                )
            seen[id(known[name])] = written
            own[name] = torch.Size(shape)
        groups.append(own)
    return groups


def _check_weights(module: Mapping[str, Any], everything: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise where what should be the model's weights is no tensor, or in a dtype that DeepSpeed does not train in."""
    for name, leaf in module.items():
        if name not in everything:
            continue  # the model says that it is foreign
        kind = str(leaf.dtype) if isinstance(leaf, torch.Tensor) else type(leaf).__name__
        floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        if not isinstance(leaf, torch.Tensor) or (floating and leaf.dtype not in RAN_IN):
            raise CheckpointError(f"{path} has {name!r} as {kind}; expected a tensor in float32, bfloat16 or float16.")


def _check_tied(shared: Any, known: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise where the training tied two parameters and the model does not."""
    for alias, owner in shared.items():
        pair = [known.get(unwrapped(name, known)) for name in (alias, owner)]
        if pair[0] is None or pair[1] is None:
            absent = alias if pair[0] is None else owner
            raise CheckpointError(f"{path} is about a parameter {absent!r}, which the model does not have.")
        if pair[0] is not pair[1] and pair[0].numel():
            raise CheckpointError(
                f"{path} ties {alias!r} to {owner!r}, and the model has two: give a model with "
                f"tie_word_embeddings=True."
            )
