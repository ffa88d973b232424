"""What vectors of parameter space do to sequences along a step's path, one number each; nothing of pairs.

    ⟨ḡ_e, v⟩ = Σ_j q_j ⟨∇S_e(θ + s_jΔθ), v⟩        nodes of `fkernel.engine.path`

A step is a sum of vectors v, and so is what it does: Σ_v ⟨ḡ_e, v⟩ = ⟨ḡ_e, Δθ⟩ = S_e(θ + Δθ) − S_e(θ), up to the path's
error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fkernel.boundary import public
from fkernel.engine.batching import SortedBatch, check_side
from fkernel.engine.path import Path, check_path
from fkernel.engine.planning import Strategy, usual_microbatch
from fkernel.engine.problem import Problem, blocks
from fkernel.engine.recycling import reuse_memory
from fkernel.engine.walked import ALONE, walking_alone
from fkernel.func.handles import ProductSpec, RowSpec
from fkernel.func.inputs import Function
from fkernel.shapes import Tensor, Tree


@public
def effects_along(
    f: Function,
    params: Tree,
    E: Any,
    step: Tree,
    vectors: Mapping[str, Tree],
    *,
    path: Path = "midpoint",
) -> dict[str, Tensor]:
    """Compute what vectors do to every sequence along a step: ⟨ḡ_e, v⟩, one backward pass of E a node.

    Args:
        f: S, (params, batch) -> [n], as `fkernel.func.true_derivative` certifies it.
        params: θ before the step.
        E: the sequences.
        step: Δθ, {name: [*shape]}.
        vectors: {what: {name: [*shape]}}; those that add up to Δθ split its effect.
        path: where E's gradients are evaluated, as in `explain_step`.

    Returns:
        {what: [n_E]} float64, on the CPU.

    Raises:
        BatchError, TreeError, ModelError, NonFiniteError: as `explain_step`.

    Example:
        >>> f = lambda params, x: x @ params["w"]
        >>> Δθ = {"w": torch.tensor([1.0, 2.0])}
        >>> effects_along(f, {"w": torch.zeros(2)}, torch.eye(2), Δθ, {"whole": Δθ})
        {'whole': tensor([1., 2.], dtype=torch.float64)}
    """
    check_path(path)
    check_side("E", f, params, E)
    side = SortedBatch("E", E, f)
    walk = walking_alone(f, params, side, None)
    tokens = usual_microbatch(None, E) * side.tokens[0]
    how = Strategy("sequences", "E", tokens, None, tokens) if walk is None else ALONE._replace(every=walk.every)
    spec = ProductSpec(x=RowSpec(dict(vectors)))
    values = {what: torch.empty(len(side), dtype=torch.float64, device="cpu") for what in vectors}
    with reuse_memory():
        for block in blocks(Problem(params, side, None, spec, path, step), how):
            for what, column in values.items():
                column[block.at] = block.rows(what)
    return values
