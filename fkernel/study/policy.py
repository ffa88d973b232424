"""A plan's checkpoint as the engine's inputs, and the spec of its workspace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any

import torch

from fkernel import func
from fkernel.checkpoint import Checkpoint
from fkernel.distributed import ShardedTree
from fkernel.engine import own_part
from fkernel.errors import PlanError, listing
from fkernel.io import fingerprint, hash_json
from fkernel.precond import MixedState, OptimizerState, fresh_state
from fkernel.rollout import GeneratedBatch, content_of_batch
from fkernel.shapes import Tree
from fkernel.study.config.base import CheckpointPlan
from fkernel.study.config.plan import FisherKernelPlan
from fkernel.study.in_shards import after_in_shards, check_is_adamw
from fkernel.study.losses import as_it_came, spec_of_loss
from fkernel.study.optimizer_step import restricted
from fkernel.study.rows import Policy, Unselected
from fkernel.study.sources import code_of, describing_files, dotted_names, prompts_files, version


def policy_of(plan: FisherKernelPlan, loaded: Checkpoint, temperature: float) -> Policy:
    """S, θ and the optimizer's state of the selected parameters.

    Raises:
        PlanError: a pattern matches no parameter, or one that the optimizer did not train.
    """
    apply, params = func.make_functional(loaded.model, chosen_parameters(plan, loaded.model))
    state = loaded.optimizer
    first = plan.step.optimizer
    if loaded.params is not None:
        params = loaded.params.selected(params)
    if first is not None and state is not None:
        raise PlanError(
            "step.optimizer is of a run's first step, and the checkpoint has an optimizer state; leave it out."
        )
    if first is not None:
        state = fresh_state(first.kind, own_part(params), **first.settings)
        if loaded.params is not None:
            check_is_adamw(state)
    if state is not None and set(state.names) != set(params):
        missing = sorted(set(params) - set(state.names))
        if missing:
            raise PlanError(f"parameters: the optimizer did not train {listing(missing)}; leave them out.")
    if state is not None:
        state = restricted(state, own_part(params))
    # E's change follows the true derivative; U's gradients are those that training computed.
    true, trained = replace(apply, padding_idx=None), func.with_masked_padding_grad(apply)
    S, columns = (func.sequence_logprob(each, temperature) for each in (true, trained))
    rest, row = cache(partial(unselected_of, plan, loaded, params)), apply.padding_idx
    return Policy(S, params, state, None, true, temperature, loaded.tokenizer, trained, columns, row, rest)


def after_of(plan: FisherKernelPlan, loaded: Checkpoint, params: Tree, mesh: Any = None) -> Tree | None:
    """Load the selected parameters of `step.after`; None without one.

    Where θ is the optimizer's masters, so is θ'.

    Raises:
        PlanError: it is of another model.
    """
    if plan.step.after is None:
        return None
    if isinstance(params, ShardedTree):
        return after_in_shards(plan.step.after, mesh, params, masters=bool(loaded.rounded))
    return _later(plan, params, masters=bool(loaded.rounded))


def unselected_of(plan: FisherKernelPlan, loaded: Checkpoint, params: Tree) -> Unselected:
    """The unselected parameters that differ between the checkpoint and `step.after`.

    Args:
        plan: the plan.
        loaded: its checkpoint.
        params: the selected parameters.

    Raises:
        PlanError: step.after is of another model.
    """
    if plan.step.after is None or plan.parameters is None:
        return Unselected({}, {})
    rest = {name: leaf.detach() for name, leaf in loaded.model.named_parameters() if name not in params}
    if not rest:
        return Unselected({}, {})
    after = _later(plan, rest, masters=bool(loaded.rounded))
    moved = [name for name, leaf in rest.items() if not torch.equal(leaf, after[name].to(leaf))]
    return Unselected(*({name: whole[name] for name in moved} for whole in (rest, after)))


def _later(plan: FisherKernelPlan, params: Tree, masters: bool) -> Tree:
    """Load some parameters of `step.after`."""
    assert plan.step.after is not None
    _, later = plan.step.after.load_policy(params, "step.after", masters=masters)
    return {name: later[name] for name in params}


def chosen_parameters(plan: FisherKernelPlan, model: Any) -> list[str] | None:
    """The trained parameters that match a plan's patterns; None for all.

    Raises:
        PlanError: a pattern matches none.
    """
    if plan.parameters is None:
        return None
    trained = [name for name, leaf in model.named_parameters() if leaf.requires_grad]
    for pattern in plan.parameters:
        if not any(fnmatchcase(name, pattern) for name in trained):
            raise PlanError(
                f"parameters: {pattern!r} names none of the {len(trained)} trained ones; {listing(trained)}."
            )
    return [name for name in trained if any(fnmatchcase(name, pattern) for pattern in plan.parameters)]


def spec_of(plan: FisherKernelPlan, loaded: Checkpoint, made: GeneratedBatch | None) -> dict[str, Any]:
    """Everything that determines the contents of a workspace, JSON.

    Args:
        plan: the plan.
        loaded: its checkpoint.
        made: U, where it is given rather than drawn.

    Raises:
        PlanError: U was sampled by another policy than `step.loss.old`.
    """
    loss = plan.step.loss
    scores = loss is not None and loss.foreign  # a ratio's denominator may be of U's records
    names = chosen_parameters(plan, loaded.model)
    names = names or [name for name, leaf in loaded.model.named_parameters() if leaf.requires_grad]
    return {
        "checkpoint": loaded.provenance.fingerprint,
        "parameters": {"patterns": plan.parameters, "count": len(names), "sha256": hash_json(names)},
        "optimizer": None if loaded.optimizer is None else _fingerprint(loaded.optimizer),
        **({} if plan.step.optimizer is None else {"first_step": plan.step.optimizer.model_dump(mode="json")}),
        "files": files_of(plan),
        "update": _drawn(plan) if made is None else {"batch": content_of_batch(as_it_came(loss, made), scores)},
        "temperature": temperature_of(plan, made),
        "dtype": plan.numerics.dtype,
        "preconditioner": plan.preconditioner.model_dump(mode="json"),
        "step": {
            "max_norm": plan.step.max_norm,
            "clip": plan.step.clip,
            **plan.step.model_dump(mode="json", include={"parts", "rule"}, exclude_none=True),
        },
        **spec_of_loss(loss, getattr(torch, plan.numerics.dtype), made),
    }


def temperature_of(plan: FisherKernelPlan, made: GeneratedBatch | None) -> float:
    """The temperature of S: the plan's, by default the one that U is sampled at."""
    sampling = plan.sampling.temperature if made is None or made.sampling is None else made.sampling.temperature
    return plan.numerics.temperature or sampling


def files_of(plan: FisherKernelPlan) -> dict[str, dict[str, str]]:
    """Hashes of the describing files of the plan's checkpoint and of its loss's: {key in the plan: files}."""
    loss = plan.step.loss
    others = {} if loss is None else {f"step.loss.{place}": one for place, one in loss.checkpoints.items()}
    return {place: describing_files(one) for place, one in {"checkpoint": plan.checkpoint, **others}.items()}


def identity_of_checkpoint(one: CheckpointPlan, dtype: str) -> dict[str, Any]:
    """A checkpoint's content: the fingerprint of its parameters in some dtype, and its describing files."""
    loaded = one.load_weights(getattr(torch, dtype))
    return {"fingerprint": loaded.provenance.fingerprint, "files": describing_files(one)}


def _drawn(plan: FisherKernelPlan) -> dict[str, Any]:
    """What determines a sampled U: its configuration, the contents of files, the code of functions, the seed."""
    record = plan.model_dump(mode="json", include={"update", "sampling", "template", "prompts"})
    record["files"] = prompts_files(plan.prompts)
    record["code"] = code_of(dotted_names(record["update"]))
    if "math" in ([*named.values()] if isinstance(named := record["update"]["reward"], dict) else [named]):
        record["math-verify"] = version("math-verify")
    record["seed"] = plan.numerics.seed
    return record


def _fingerprint(state: OptimizerState) -> str:
    """Hash an optimizer's state: hyperparameters, step and moments."""
    if isinstance(state, MixedState):
        return hash_json([_fingerprint(part) for part in state.parts])
    content: list[Any] = [type(state).__name__]
    for field in fields(state):
        value = getattr(state, field.name)
        moments = isinstance(value, Mapping) and any(isinstance(leaf, torch.Tensor) for leaf in value.values())
        content.append(fingerprint(value) if moments else dict(value) if isinstance(value, Mapping) else value)
    return hash_json(content)
