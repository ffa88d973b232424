"""θ, P and an optimizer's state as the ranks of a mesh hold them: whole on each, or in shards.

What is given in shards is recognised: `DTensor`s, as FSDP2's modules have them, or leaves that have the shape of this
rank's shard of the model's parameter (`fkernel.distributed.shard_tree`). θ in shards is a `ShardedTree`; everything of
its size is then in shards too, and a rank gathers one layer at a time.
"""

from __future__ import annotations

from dataclasses import fields, replace

from fkernel.boundary import public
from fkernel.distributed import Group, ShardedTree, agree, is_distributed, local_tree, shard_tree
from fkernel.engine.over_ranks import described
from fkernel.engine.step_on_shards import shared_of
from fkernel.errors import BatchError, ModelError, TreeError
from fkernel.func.inputs import Function
from fkernel.precond import AdamWState, Diagonal, OptimizerState, Preconditioner
from fkernel.shapes import Tree


def agreed_params(f: Function, params: Tree, group: Group | None, what: str = "params") -> Tree:
    """Return θ as the ranks hold it, after they agree on it: as it is, or in shards.

    Names in their order, shapes and dtypes must be equal on all ranks; so must the values of what each has whole.

    Args:
        f: (params, batch) -> [n]; its model says how large each parameter is.
        params: θ, as the caller gave it. Where some leaves require grad and others do not, those that do not are
            constants of the model, if θ is in shards.
        group: the ranks; None for this process alone.
        what: what a message about ranks that disagree calls θ.

    Raises:
        ProcessError: the ranks have different things.
        TreeError: a leaf is neither whole nor this rank's shard, or is a `DTensor` and there is no mesh.
        ModelError: f has no model that could be computed layer by layer.
    """
    if not isinstance(params, dict):
        return params  # which `check_params` refuses
    if group is None:
        if distributed := [name for name, leaf in params.items() if is_distributed(leaf)]:
            raise TreeError(f"params[{distributed[0]!r}] is a DTensor; say over which ranks: mesh=.")
        return params
    θ = _held(f, params, group)
    agree(group, what, _described(params, θ) if isinstance(θ, ShardedTree) else described(params))
    return θ


def agreed_tree(x: Tree | None, params: Tree, group: Group | None, what: str) -> Tree | None:
    """Return a vector of θ's space as θ is held, after the ranks agree on it; None stays None."""
    if group is None or not isinstance(params, ShardedTree) or x is None:
        if group is not None:
            agree(group, what, described(x))
        return x
    known = {name: leaf for name, leaf in x.items() if name in params.shapes}
    agree(group, what, f"{[*x]}; {_described(known, params)}")
    return {**x, **local_tree(group, known, params.shapes, what)}


def own_preconditioner(P: Preconditioner, params: Tree, group: Group | None) -> Preconditioner:
    """Return P of what this rank holds, after the ranks agree on it.

    Raises:
        BatchError: θ is in shards and P no diagonal.
    """
    if isinstance(params, ShardedTree) and not isinstance(P, Diagonal):
        raise BatchError(
            f"params are in shards, and P ({type(P).__name__}) is no diagonal: it needs whole gradients. Give a "
            f"precond.Diagonal, or whole params."
        )
    d = agreed_tree(P.d if isinstance(P, Diagonal) else None, params, group, "the preconditioner")
    return Diagonal(d) if isinstance(P, Diagonal) and isinstance(params, ShardedTree) else P


@public
def own_part(params: Tree) -> Tree:
    """Return what this rank has of θ: its shards, or all of it where θ is whole.

    Example:
        >>> import torch
        >>> own_part({"w": torch.ones(1)})
        {'w': tensor([1.])}
    """
    return params.own if isinstance(params, ShardedTree) else params


def shards_of(x: Tree, group: Group) -> Tree:
    """Return this rank's shards of θ, or of a vector that is whole."""
    return x.own if isinstance(x, ShardedTree) else shard_tree(group, x)


def agreed_state(
    state: OptimizerState, params: Tree, group: Group | None, what: str = "the optimizer's state"
) -> OptimizerState:
    """Return an optimizer's state of what this rank holds, after the ranks agree on it.

    Its shards where θ or the state is in shards; moments then may be shards, `DTensor`s or whole.

    Raises:
        BatchError: θ is in shards and the optimizer is not AdamW.
    """
    if group is None:
        return state
    own = _own_state(state, params, group)
    agree(group, what, described(shared_of(own, params)))
    return own


def _own_state(state: OptimizerState, params: Tree, group: Group) -> OptimizerState:
    if not isinstance(state, AdamWState):
        if isinstance(params, ShardedTree):
            raise BatchError(
                f"params are in shards, and the optimizer's state is of {type(state).__name__}; AdamW's alone is "
                f"computed on shards. Give whole params."
            )
        return state
    trees = {each.name: getattr(state, each.name) for each in fields(state) if each.name.startswith("exp_avg")}
    in_shards = isinstance(params, ShardedTree) or any(map(is_distributed, trees["exp_avg"].values()))
    if not in_shards:
        return state
    shapes = {name: leaf.shape for name, leaf in params.items()}
    own = {
        what: {**x, **local_tree(group, {name: x[name] for name in x if name in shapes}, shapes, f"state.{what}")}
        for what, x in trees.items()
    }
    return replace(state, **own)


def _held(f: Function, params: Tree, group: Group) -> Tree:
    module = getattr(getattr(f, "apply", None), "module", None)
    known = {} if module is None else dict(module.named_parameters())
    distributed = [name for name, leaf in params.items() if is_distributed(leaf)]
    shapes = {name: tuple(leaf.shape) for name, leaf in params.items()}
    for name in params:
        if name in known and name in distributed and shapes[name] != tuple(known[name].shape):
            raise TreeError(
                f"params[{name!r}] has shape {list(shapes[name])}, the model's is {list(known[name].shape)}: is it of "
                f"another model?"
            )
    wholes = {name: tuple(known[name].shape) if name in known else shape for name, shape in shapes.items()}
    without = any(leaf.is_meta for leaf in known.values())
    if not distributed and not without and wholes == shapes:
        return params
    if module is None:
        raise ModelError(
            f"params[{distributed[0]!r}] is a DTensor, and f has no model that make_functional made, so that it cannot "
            f"be computed layer by layer. Give whole params: leaf.full_tensor()."
        )
    trained = {name for name, leaf in params.items() if leaf.requires_grad}
    constants = [name for name in params if trained and name not in trained]
    return ShardedTree(group, local_tree(group, params, wholes, "params"), wholes, constants)


def _described(given: Tree, params: ShardedTree) -> str:
    """Describe a tree in shards: what must be equal on all ranks."""
    alike = {}
    for name, leaf in given.items():
        shape = params.shapes[name]
        whole = tuple(leaf.shape) == shape and not is_distributed(leaf) and (shape or (1,))[0] > 1
        alike[name] = leaf if whole and params.group.size > 1 else f"{list(shape)} {leaf.dtype}"
    return described(alike) + (f"; constants {[name for name in given if name not in params]}")
