"""How the step that was executed departs from the exact one, and the step really taken from both.

    Δθ_after − 0 = Δθ + (Δθ_executed − Δθ) + (Δθ_after − Δθ_executed)
                        arithmetic           unexplained

The path of E's gradients ends where the step really ended, as far as that is known.
"""

from __future__ import annotations

from typing import NamedTuple

from fkernel import tree
from fkernel.shapes import Tree

ARITHMETIC, UNEXPLAINED = "arithmetic", "unexplained"


class Departures(NamedTuple):
    """What a step has beyond the exact one.

    Attributes:
        vectors: {"arithmetic": …, "unexplained": …}, those that are known, {name: [*shape]} each.
        end: Δθ of the path: really taken, executed, or exact.
    """

    vectors: dict[str, Tree]
    end: Tree


def departures(params: Tree, exact: Tree, executed: Tree | None = None, after: Tree | None = None) -> Departures:
    """Tell a step really taken apart.

    Args:
        params: θ.
        exact: Δθ in real numbers.
        executed: Δθ as the training's own precision has it; None where that is the study's.
        after: θ after the step, where it was really taken.

    Example:
        >>> import torch
        >>> θ, exact = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
        >>> departures(θ, exact, {"w": torch.tensor([0.75])}, {"w": torch.tensor([0.5])}).vectors
        {'arithmetic': {'w': tensor([-0.2500])}, 'unexplained': {'w': tensor([-0.2500])}}
    """
    vectors, end = dict[str, Tree](), exact
    if executed is not None:
        vectors[ARITHMETIC], end = tree.axpy(-1.0, exact, executed), executed
    if after is not None:
        taken = tree.axpy(-1.0, params, {name: after[name] for name in params})
        vectors[UNEXPLAINED], end = tree.axpy(-1.0, end, taken), taken
    return Departures(vectors, end)
