"""A plan whose θ, optimizer's state and step are in shards over the ranks: what goes with them, and how they are read.

    numerics: {processes: 8, shards: true}

Each rank reads its rows of the checkpoint (`checkpoint.load_shards`), and no rank holds all of θ: passes gather a layer
at a time, and U's gradients are computed for every request. What needs a whole model on a rank is refused before
anything is read, by the key in the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fkernel import checkpoint
from fkernel.checkpoint import Checkpoint, Provenance, find_layout, in_slices, read_json
from fkernel.distributed import Group, ShardedTree, agree, from_first, group_of
from fkernel.errors import FKernelError, PlanError, listing
from fkernel.io import fingerprint, fingerprint_of_leaves
from fkernel.precond import AdamWState, OptimizerState
from fkernel.rollout import GeneratedBatch
from fkernel.study.analyses.registry import AnalysesPlan, RequestAnalyses
from fkernel.study.config.base import CheckpointPlan
from fkernel.study.config.plan import FisherKernelPlan

ANALYSES = {"ledger", "parts", "uncertainty", "covariates", "structure"}
"""Analyses whose vectors may be shards."""
DRAWN = {"evaluation", "prompt_ids", "custom_prompts"}
READ = "a batch that was sampled before: {kind: from_file}, a recorded or a dumped one, or a payload"
KEYS = ("base", "order", "decoupled", "trust_remote_code")


def does_not_go_in_shards(plan: FisherKernelPlan) -> list[str]:
    """Say what of a plan with `numerics.shards` needs a whole model on a rank: a line each, with what to do instead.

    Args:
        plan: as `as_recorded` returns it; nothing is said of one without shards.
    """
    if not plan.numerics.shards:
        return []
    return [
        f"{line} (numerics.shards)." for line in (*_checkpoints(plan), *_batches(plan), *_step(plan), *_asked(plan))
    ]


def _checkpoints(plan: FisherKernelPlan) -> Iterator[str]:
    yield from _unsliced("checkpoint", plan.checkpoint, plan.checkpoint.optimizer)
    if plan.step.after is not None:
        yield from _unsliced("step.after", plan.step.after, False)


def _unsliced(place: str, one: CheckpointPlan, optimizer: bool) -> Iterator[str]:
    """What of a checkpoint cannot be read in slices."""
    for key in KEYS:
        if getattr(one, key) != type(one).model_fields[key].default:
            yield f"{place}.{key}: a checkpoint in shards is read as it was written; leave it out"
    if one.path is None or one.path.startswith("hub:"):
        yield f"{place}: {one.place} is read whole by each rank; name a directory that a run saved (path)"
        return
    try:
        layout = find_layout(one.path)
    except FKernelError:
        return  # which is said of every plan
    if not in_slices(layout):
        yield (
            f"{place}.path: {one.path} is of the layout {layout.kind!r}, which is read whole by each rank; save it "
            f"with torch.distributed.checkpoint, or as safetensors"
        )
    elif optimizer and layout.optimizer is not None and not layout.optimizer.is_dir():
        yield (
            f"{place}.path: {layout.optimizer} is one file, which each rank would read whole; save the optimizer's "
            f"state with torch.distributed.checkpoint"
        )


def _batches(plan: FisherKernelPlan) -> Iterator[str]:
    if plan.update.kind == "update":
        yield f"update: sampling needs the whole policy on a rank; give {READ}"
    for i, request in enumerate(plan.requests):
        if request.kind in DRAWN or (request.kind == "update" and not request.is_own):
            yield f"requests.{i}: sampling needs the whole policy on a rank; give {READ}"
    for place, source in {"update": plan.update, **{f"requests.{i}": r for i, r in enumerate(plan.requests)}}.items():
        if getattr(source, "callback", None) is not None:
            yield f"{place}.callback: a function would have to make the same batch on every rank; give {READ}"


def _step(plan: FisherKernelPlan) -> Iterator[str]:
    if plan.parameters is not None:
        yield "parameters: all that were trained are in shards; leave it out"
    if plan.step.autocast is not None:
        yield "step.autocast: a step in shards is taken in real numbers; leave it out (step: {autocast: null})"
    for place, loss in (("step.loss", plan.step.loss), ("update.loss", getattr(plan.update, "loss", None))):
        for key in () if loss is None else loss.checkpoints:
            yield f"{place}.{key}: another policy would be loaded whole; give token weights (step.loss: token_weights)"


def _asked(plan: FisherKernelPlan) -> Iterator[str]:
    captures = {"capture": plan.capture, **{f"requests.{i}.capture": r.capture for i, r in enumerate(plan.requests)}}
    for place, capture in captures.items():
        if capture is not None and capture.curvature:
            yield f"{place}.curvature: second derivatives need the whole model on a rank; leave it out"
    every: dict[str, RequestAnalyses | None] = {"analyses": plan.analyses}
    every |= {f"requests.{i}.analyses": request.analyses for i, request in enumerate(plan.requests)}
    for place, analyses in every.items():
        if analyses is None:
            continue
        for name in type(analyses).model_fields:
            if name not in ANALYSES and getattr(analyses, name):
                yield f"{place}.{name}: it needs the whole model on a rank; leave it out, or ask a plan without shards"
        if isinstance(analyses, AnalysesPlan) and analyses.structure is not None and analyses.structure.alignment:
            yield f"{place}.structure.alignment: it needs the whole model on a rank; leave it out"


def check_has_forecast(plan: FisherKernelPlan) -> None:
    """Raise PlanError for a plan in shards, whose forecast would be of one process; it says how to estimate it."""
    if plan.numerics.shards:
        model, ranks = plan.checkpoint.model or plan.checkpoint.path, plan.numerics.processes or 8
        raise PlanError(
            f"numerics.shards: a plan's forecast is of one process. What each rank takes for a request is said by "
            f"`fkernel estimate {model} --processes {ranks} --sharded --n-u N --n-e N --tokens N`, with the sequences "
            f"of U and of the request, and their tokens."
        )


def check_has_ranks(plan: FisherKernelPlan, mesh: Any) -> None:
    """Raise PlanError where a plan is in shards, and there are no ranks to have them."""
    if plan.numerics.shards and (mesh is None or mesh.size() == 1):
        raise PlanError(
            "numerics.shards: several ranks are needed to have a shard each; say numerics: {processes: 8, shards: "
            "true} or --processes 8, or start it with torchrun."
        )


def drawn_by(
    group: Group | None, plan: FisherKernelPlan, what: str, draw: Callable[[], GeneratedBatch]
) -> GeneratedBatch:
    """Draw or read a batch: on rank 0 alone, or, in shards, on all ranks, which score it together."""
    if group is None:
        return draw()
    if not plan.numerics.shards:
        return from_first(group, f"drawing {what}", draw)
    batch = draw()
    agree(group, what, fingerprint(batch.sequences))
    return batch


def loaded_by(plan: FisherKernelPlan, mesh: Any) -> Checkpoint:
    """Load a plan's checkpoint onto its device: whole, or in shards over the mesh."""
    dtype, device = getattr(torch, plan.numerics.dtype), plan.numerics.device
    if plan.numerics.shards:
        return load_in_shards(plan.checkpoint, mesh, dtype, device)
    loaded = plan.checkpoint.load(dtype)
    loaded.model.to(device)
    return loaded


def after_in_shards(one: CheckpointPlan, mesh: Any, params: ShardedTree, masters: bool) -> ShardedTree:
    """Load this rank's shards of θ after the step; of the optimizer's masters, where θ are.

    Raises:
        FKernelError: as `checkpoint.load_shards`.
        PlanError: it is of another model.
    """
    assert one.path is not None
    leaf = next(iter(params.values()))
    sharded = checkpoint.load_shards(one.path, mesh, model=one.model, optimizer=masters, dtype=leaf.dtype).params
    if foreign := [name for name, own in params.own.items() if name not in sharded or sharded[name].shape != own.shape]:
        raise PlanError(f"step.after: {one.path} has no {listing(foreign)} of that shape; is it the same model's?")
    return params.replaced({name: sharded[name].to(leaf.device) for name in params})


def load_in_shards(one: CheckpointPlan, mesh: Any, dtype: torch.dtype, device: str) -> Checkpoint:
    """Load this rank's shards of a plan's checkpoint; every rank of the mesh must call it.

    Args:
        one: the plan's.
        mesh: a `DeviceMesh` of one dimension.
        dtype: of θ.
        device: a torch device.

    Returns:
        The checkpoint, `params` in shards, with the fingerprint that `CheckpointPlan.load` gives.

    Raises:
        FKernelError: as `checkpoint.load_shards`.
        PlanError: the optimizer is another than AdamW.
    """
    assert one.path is not None
    names: Any = read_json(Path(one.names), "names") if isinstance(one.names, str) else one.names
    sharded = checkpoint.load_shards(one.path, mesh, model=one.model, names=names, optimizer=one.optimizer, dtype=dtype)
    check_is_adamw(sharded.optimizer)
    for part in sharded.model.modules():  # the model has no weights, but buffers: rotary frequencies
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))
    shapes = {name: tuple(leaf.shape) for name, leaf in sharded.model.named_parameters()}
    θ = ShardedTree(group_of(mesh), {name: leaf.to(device) for name, leaf in sharded.params.items()}, shapes)
    provenance = Provenance(sharded.path, sharded.layout, "", None if sharded.optimizer is None else sharded.path)
    loaded = Checkpoint(
        sharded.model,
        sharded.tokenizer,
        sharded.optimizer,
        sharded.step,
        provenance,
        sharded.conditions,
        sharded.stored,
        sharded.trained_dtypes,
        sharded.rounded,
        θ,
    )
    ran = loaded.as_it_ran().params
    known_by = fingerprint_of_leaves((f"[{name!r}]", leaf) for name, leaf in ran.each_gathered())
    return replace(loaded, provenance=replace(provenance, fingerprint=known_by))


def check_is_adamw(state: OptimizerState | None) -> None:
    """Raise PlanError for the state of another optimizer, whose step is not computed on shards."""
    if state is not None and not isinstance(state, AdamWState):
        kind = type(state).__name__.removesuffix("State")
        raise PlanError(f"numerics.shards: AdamW's step alone is computed on shards, and the optimizer is {kind}.")
