"""Values of f at several places along a step, of θ in shards: each layer is gathered once for all of them.

for layer 1 … L, head:   θ[layer], δ[layer] gathered
    for s:                  h_s = layer(h_s; θ + s δ)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fkernel.distributed import ShardedTree
from fkernel.func.inputs.source import moved_together
from fkernel.func.layers.cut import Cut
from fkernel.func.layers.walk import Walk
from fkernel.shapes import Tensor, Tree


def values_along(cut: Cut, params: ShardedTree, direction: Tree, scales: Sequence[float], batch: Any) -> Tensor:
    """Compute f at θ + s δ for several s.

    Args:
        cut: the model of f.
        params: θ.
        direction: δ, this rank's shards.
        scales: the s.
        batch: n sequences, the same on every rank.

    Returns:
        [scales n] float64; infinite or NaN where f is, far along the step.
    """
    sources, let_go = moved_together(params, direction, scales)
    walks = [Walk(cut, source, batch, every=len(cut.layers) + 1, begin=False) for source in sources]
    for _ in zip(*(walk.forward for walk in walks), strict=True):
        let_go()
    return torch.stack([walk.values for walk in walks])
