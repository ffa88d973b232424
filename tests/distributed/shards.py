"""Cases of the tests on several processes whose θ is in shards: how a rank has it, and what is computed of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

import fkernel as fk
from fkernel.distributed import group_of, shard_tree
from fkernel.engine.over_ranks import whole_tree
from tests.distributed.cases import CASES, answers, diagonal, inputs, state_of

FAR = 100.0
"""How many steps far the realised change is: of one step it is a difference of 1e-4 nats, and its rounding 1e-12."""


def weightless(name: str) -> Any:
    """The S of a case, whose model has no weights."""
    with fk.func.without_weights():
        return inputs(name)[0]


def dealt(mesh: Any, name: str) -> dict[str, torch.Tensor]:
    """θ of a case as a rank has it: an FSDP2 model's parameters for "gpt2", else shards, of frozen ones too."""
    S, params, *_ = inputs(name)
    if name == "gpt2":
        from torch.distributed.fsdp import fully_shard

        model: Any = replace(CASES[name]).model
        for layer in (*model.transformer.h, model):
            fully_shard(layer, mesh=mesh)
        return dict(model.named_parameters())
    every = {leaf: value.detach() for leaf, value in S.apply.original.named_parameters()}
    shards = shard_tree(group_of(mesh), every)
    return {leaf: value.requires_grad_(leaf in params) for leaf, value in shards.items()}


def moved(mesh: Any, θ: dict[str, torch.Tensor], delta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """θ + FAR Δθ, as the ranks have θ."""
    if mesh is None:
        return fk.tree.axpy(FAR, delta, θ)
    local = {name: getattr(leaf, "to_local", lambda leaf=leaf: leaf)().detach() for name, leaf in θ.items()}
    after = fk.tree.axpy(FAR, shard_tree(group_of(mesh), delta), {name: local[name] for name in delta})
    return local | {name: leaf.requires_grad_() for name, leaf in after.items()}


def in_shards(mesh: Any, name: str) -> dict[str, torch.Tensor]:
    """What the engine computes of one case where θ is in shards over the mesh; whole without one."""
    S, params, E, U, case = inputs(name)
    θ, D, total = params, diagonal(params), dict[str, torch.Tensor]()
    if mesh is not None:
        S, θ, D = weightless(name), dealt(mesh, name), shard_tree(group_of(mesh), D)
    P, I = fk.precond.diagonal(D), fk.precond.identity()
    found = {
        "K": fk.kernel(S, θ, E, U, P, mesh=mesh),
        "K_UU": fk.kernel(S, θ, U, U, I, mesh=mesh),
        "influence": fk.influence(S, θ, E, U, P, case.weights, mesh=mesh),
    }
    few = torch.linspace(-1, 2, len(case.E), dtype=torch.float64)
    paths: list[tuple[Any, Any, Any, Any, float | None]] = [
        ("gauss2", U, E, few, None),
        ("midpoint", E, U, case.weights, 1e-2),
    ]
    for path, rows, columns, weights, max_norm in paths:
        given = (rows, columns, weights, state_of(params))
        effect, step = fk.explain_step(S, θ, *given, path=path, max_norm=max_norm, mesh=mesh)
        found |= {f"{path} {key}": torch.as_tensor(value) for key, value in effect._asdict().items() if key != "path"}
        total = step.total if mesh is None else whole_tree(step.total, group_of(mesh), params)
        found |= {f"{path} step {key}": leaf for key, leaf in total.items()}
    found["realised"] = fk.realised_change(S, θ, moved(mesh, θ, total), E, mesh=mesh)
    return {f"in shards: {key}": value for key, value in found.items()}


def everything(mesh: Any, name: str) -> dict[str, torch.Tensor]:
    """All answers of one case, of θ whole and in shards."""
    return answers(mesh, name) | in_shards(mesh, name)
