"""AdamW's step where every rank has its shard of the optimizer's state: m, v, Δθ and D are never whole on a rank.

AdamW works coordinate by coordinate, so that it steps each shard by itself; the clipping norm alone is of all:

    ‖∇L‖² = Σ over ranks of ‖∇L[own shard]‖²,   c = min(1, max_norm / (‖∇L‖ + 1e−6))

A shard is `torch.chunk`'s of the leading dimension, as FSDP2 deals it (`fkernel.distributed.shard_tree`). θ is whole on
every rank, and so is Δθ for as long as the path's nodes are made of it.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fkernel import tree
from fkernel.boundary import public
from fkernel.distributed import Group, ShardedTree, all_sum
from fkernel.precond import AdamWState, AdamWStep, Diagonal, Grads, adamw_response, adamw_step, clip_gradient
from fkernel.shapes import Tree


def is_sharded(state: Any, params: Tree) -> bool:
    """Tell whether a state is of a shard of the parameters: AdamW's, with θ in shards or moments of other shapes."""
    if not isinstance(state, AdamWState):
        return False
    return isinstance(params, ShardedTree) or any(
        name in params and m.shape != params[name].shape for name, m in state.exp_avg.items()
    )


def shared_of(state: Any, params: Tree) -> Any:
    """What of a state all ranks have alike: everything, or of shards the settings and the steps."""
    whole = getattr(state, "__dict__", None)
    if whole is None or not is_sharded(state, params):
        return whole
    return {each.name: whole[each.name] for each in fields(state) if not each.name.startswith("exp_avg")}


def norm_over(shards: Tree, group: Group) -> float:
    """‖x‖ of a vector from its shards, on every rank."""
    (total,) = all_sum(group, [tree.dot(shards, shards)])
    return float(total.sqrt())


def clipped_shards(
    ascent: Tree, max_norm: float | None, group: Group, clip: float | None = None
) -> tuple[Tree, float, float]:
    """Make this rank's shard of the gradient that the optimizer is given, g = −c Jᵀ(w A): (g, c, ‖∇L‖)."""
    norm = norm_over(ascent, group)
    if clip is None:
        clip = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
    g, _, _ = clip_gradient(ascent, clip=clip)
    return g, clip, norm


@public
def clipped_over(
    params: Tree, ascent: Tree, max_norm: float | None = None, clip: float | None = None
) -> tuple[Tree, float, float]:
    """Make the gradient that the optimizer is given, of what this rank holds of it: (g = −c · ascent, c, ‖∇L‖).

    Args:
        params: θ, whole or in shards; in shards the norm is of all of them.
        ascent: −∇L, whole or this rank's shards.
        max_norm: the gradient-clipping threshold; None for none.
        clip: c itself, instead.

    Example:
        >>> import torch
        >>> clipped_over({"w": torch.zeros(2)}, {"w": torch.tensor([3.0, 4.0])}, max_norm=10.0)
        ({'w': tensor([-3., -4.])}, 1.0, 5.0)
    """
    if isinstance(params, ShardedTree):
        return clipped_shards(ascent, max_norm, params.group, clip)
    return clip_gradient(ascent, max_norm, clip=clip)


def adamw_on_shards(params: Tree, given: Grads, state: AdamWState) -> tuple[AdamWStep, Diagonal]:
    """Compute Δθ in its parts, and P_step, of this rank's shards.

    Args:
        params: θ of the shards.
        given: g of the shards; None for parameters that are skipped.
        state: of the shards.
    """
    P = adamw_response(state, given)
    assert isinstance(P, Diagonal)
    return adamw_step(params, given, state), P
