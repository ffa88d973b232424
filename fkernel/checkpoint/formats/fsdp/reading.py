"""From the ranks' files to whole weights and one optimizer state, one file open at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fkernel.checkpoint.files import first_line
from fkernel.checkpoint.formats.fsdp.names import named_stretches, named_tensors, named_units
from fkernel.checkpoint.formats.fsdp.parts import Part, ShardedTensor, copies, joined, opened, part_of
from fkernel.checkpoint.formats.fsdp.places import HUGGINGFACE, fsdp_version, is_verl, rank_files
from fkernel.checkpoint.formats.fsdp.states import checked, own, stretches, whole_tensors, whole_units
from fkernel.checkpoint.formats.saved import Saved
from fkernel.checkpoint.layout import Layout
from fkernel.checkpoint.names import unwrapped
from fkernel.errors import CheckpointError, ModelError, OptimizerStateError, listing
from fkernel.shapes import Tree

WHAT = "one rank's part of a model's state dict"
LORA = "lora_"


def read(layout: Layout, model: Any, optimizer: bool) -> Saved:
    """Read verl's or accelerate's rank files.

    Args:
        layout: of `find`.
        model: the model that was trained: names, shapes, and with adapters which parameters are frozen. Where the files
            hold adapters only, the base model's weights are this one's.
        optimizer: False to leave the optimizer's state unread.

    Returns:
        The weights in the dtype in which they are stored: float32, as a rule, where they are what the optimizer steps,
        also where the training computes in bfloat16.

    Raises:
        CheckpointError: a file is missing, damaged, of another rank, step or training.
        OptimizerStateError: whose state is whose cannot be told.
        ModelError: the files hold another model; adapters, and the model has none; adapters without their base model.
    """
    verl = is_verl(layout.model)
    paths = rank_files(layout.model, "model" if verl else "pytorch_model_fsdp")
    weights, ranks = _weights(paths, _owners(model))
    _check_model(weights, model, layout.model)
    if verl:
        _check_exported(weights, layout.model / HUGGINGFACE)
    state = None
    if optimizer and layout.optimizer is not None:
        files = rank_files(layout.optimizer, "optim" if verl else "optimizer")
        if len(files) != len(paths):
            raise CheckpointError(
                f"{layout.model} holds the weights of {len(paths)} ranks and the optimizer's state of {len(files)}: "
                f"they are of two trainings."
            )
        state = _optimizer({r: files[r] for r in ranks}, model, fsdp_version(layout.model) if verl else None)
        if verl:
            _check_schedule(layout.model, state)
    return Saved(_with_base(weights, model, layout.model), state)


def _owners(model: torch.nn.Module) -> dict[str, str]:
    """Tell which weights are others' too: {tied weight: the first name that the model has for it}."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    owners = {name: first.setdefault(id(leaf), name) for name, leaf in named}
    return {name: owner for name, owner in owners.items() if name != owner}


def _weights(paths: list[Path], owners: Mapping[str, str]) -> tuple[Tree, list[int]]:
    """Bring the weights together, tied ones once; they tell which ranks hold one copy."""
    first = opened(paths[0], WHAT)
    ranks = copies([leaf for leaf in first.values() if isinstance(leaf, torch.Tensor)], len(paths))
    foreign = [rank for rank in ranks if rank >= len(paths)]
    if foreign:
        raise CheckpointError(
            f"{paths[0]} is of a training with rank {foreign[0]}; {len(paths)} ranks' files are here."
        )
    names = {*first}
    keys = {name: owners[name] if owners.get(name) in names else name for name in names}
    del first

    def parts() -> Iterator[tuple[Any, Part, Path]]:
        for rank in ranks:
            found = opened(paths[rank], WHAT)
            if {*found} != names:
                raise CheckpointError(
                    f"{paths[rank]} and {paths[ranks[0]]} differ in {listing(sorted(names ^ {*found}))}: one of them "
                    f"is damaged, or of another training."
                )
            for name, leaf in found.items():
                part = part_of(leaf, rank, name, paths[rank])
                if part is not None:
                    yield keys[name], part, paths[rank]

    weights = joined(parts())
    lacking = {*keys.values()} - {*weights}
    if lacking:
        raise CheckpointError(f"No rank's file in {paths[0].parent} holds {listing(sorted(lacking))}.")
    return weights, ranks


def _optimizer(files: Mapping[int, Path], model: torch.nn.Module, version: int | None) -> dict[str, Any]:
    """Bring the optimizer's state together in the form in which it is."""
    path = next(iter(files.values()))
    groups, sharded = _form(path, version)
    numbers = [number for group in groups for number in group["params"]]
    if all(isinstance(number, str) for number in numbers):
        return {"state": whole_tensors(files, groups), "param_groups": groups}
    if sharded:
        return named_tensors(groups, whole_tensors(files, groups), model, path)
    leaves = [leaf for _, leaf in model.named_parameters()]
    if len(numbers) in (len(leaves), sum(leaf.requires_grad for leaf in leaves)):
        return named_stretches(groups, *stretches(files, groups), model, path)
    return named_units(groups, whole_units(files, groups), len(files), model, path)


def _form(path: Path, version: int | None) -> tuple[list[dict[str, Any]], bool]:
    """Read the parameter groups, and whether moments are tensors that say where they belong."""
    found = checked(path)
    moments = [v for entry in found["state"].values() for v in entry.values() if isinstance(v, torch.Tensor) and v.ndim]
    from torch.distributed.tensor import DTensor

    sharded = any(isinstance(leaf, DTensor | ShardedTensor) for leaf in moments)
    if version is not None and moments and sharded != (version == 2):
        raise CheckpointError(
            f"{path} holds {'DTensors, as FSDP2 keeps them' if sharded else 'flat tensors, as FSDP1 keeps them'}; "
            f"fsdp_config.json beside it says FSDP{version}: they are of two trainings."
        )
    return [own(group) for group in found["param_groups"]], sharded


def _check_schedule(directory: Path, state: Mapping[str, Any]) -> None:
    """Hold the learning rates of verl's scheduler, which every rank saves, against the optimizer's."""
    names = [path.name for path in directory.iterdir()]
    if not any(name.startswith("extra_state_") for name in names):
        return
    own = [float(group["lr"]) for group in state["param_groups"]]
    for path in rank_files(directory, "extra_state"):
        scheduler = opened(path, "a rank's scheduler and random state").get("lr_scheduler")
        last = scheduler.get("_last_lr") if isinstance(scheduler, Mapping) else None
        if not isinstance(last, list) or len(last) != len(own):
            continue
        if not all(abs(float(a) - b) <= 1e-6 * abs(b) for a, b in zip(last, own, strict=True)):
            raise OptimizerStateError(
                f"The optimizer's learning rates are {own}, its scheduler at {path} has set {last}: the two are not of "
                f"the same step."
            )


def _check_model(weights: Tree, model: torch.nn.Module, directory: Path) -> None:
    """Raise where the files hold another model than the one that they are to be loaded into."""
    adapters = [name for name in weights if LORA in name]
    if adapters and not any(LORA in name for name, _ in model.named_parameters()):
        raise ModelError(
            f"{directory} holds a model with LoRA adapters ({listing(adapters[:1])}), and the model that it is to be "
            f"loaded into has none. Give model=, the PeftModel as the training made it: "
            f"get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=…, lora_alpha=…, …))."
        )
    own = model.state_dict()
    for name, leaf in weights.items():
        known = own.get(unwrapped(name, own))
        if known is None or known.shape != leaf.shape:
            says = "has none of that name" if known is None else f"has {list(known.shape)}"
            raise ModelError(
                f"{directory} holds {name!r} of shape {list(leaf.shape)}, the model {says}: is it a checkpoint of "
                f"another model?"
            )


def _check_exported(weights: Tree, directory: Path) -> None:
    """Hold the weights against those that verl exported beside them (hf_model), in the dtype that these have.

    Nothing in a model's rank file tells its step: this finds one of another step, where the export is there.
    """
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name in weights]  # noqa: SIM118
                leaves = ((name, file.get_tensor(name)) for name in names)
                apart = [name for name, leaf in leaves if not torch.equal(weights[name].to(leaf.dtype), leaf)]
        except (OSError, SafetensorError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {first_line(error)}. Copy it again, or remove it."
            ) from error
        if apart:
            raise CheckpointError(
                f"The ranks' files in {directory.parent} hold other weights than {path}, which was exported with them: "
                f"{listing(apart)}. One of them is of another step; remove the export if it is not this step's."
            )


def _with_base(weights: Tree, model: Any, directory: Path) -> Tree:
    """Add the base model's weights where only its adapters were saved (verl's save_lora_only)."""
    if not weights or not all(LORA in name for name in weights):
        return weights
    base = {name: leaf for name, leaf in model.named_parameters() if LORA not in name}
    emptied = [name for name, leaf in base.items() if leaf.numel() > 1 and 0 in leaf.stride()]
    if emptied:
        raise ModelError(
            f"{directory} holds LoRA adapters only (save_lora_only), and not the weights of the model that they "
            f"change. Say where that is: base='directory', or base='hub:org/name'."
        )
    return weights | {name: leaf.detach() for name, leaf in base.items()}
