"""Questions that a workspace's stored gradients answer without the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fkernel.engine import reuse_memory
from fkernel.engine.planning import Strategy
from fkernel.errors import PlanError
from fkernel.shapes import Tensor
from fkernel.study.diagnostics import BlockTally, cosines, spectrum
from fkernel.study.gradients import GradientCache
from fkernel.study.outcome import Entry, SelfKernel
from fkernel.study.workspace import KernelWorkspace, selected


def self_kernel_of(
    workspace: KernelWorkspace, ids: Sequence[str] | None = None, full: bool = False, how: Strategy | None = None
) -> SelfKernel:
    """Compute K_UU, or a principal submatrix, and its spectrum.

    Args:
        workspace: U.
        ids: patterns on ids; None for all.
        full: whether the result has the matrix.
        how: the tiles of K_UU; None for one.

    Raises:
        RolloutError: a pattern names no sequence.
    """
    ids = workspace.batch.ids if ids is None else selected(workspace.batch.ids, ids, "U")
    rows = torch.tensor([workspace.index[name] for name in ids])
    with reuse_memory():
        K = workspace.self_kernel(how)[rows][:, rows]
        norms = workspace.norms
    prompts = [workspace.batch.records[i].provenance.global_prompt_id for i in rows.tolist()]
    same = torch.tensor([[a == b for b in prompts] for a in prompts])
    others = ~torch.eye(len(ids), dtype=torch.bool)
    cosine, tally = cosines(K, norms.weighted[rows], norms.weighted[rows]), BlockTally()
    tally.add(K[others], cosine[others], same[others])
    eigenvalues, effective_rank, participation = spectrum(K)
    return SelfKernel(
        tuple(ids),
        eigenvalues.numpy(),
        effective_rank,
        participation,
        norms.plain[rows].numpy(),
        norms.weighted[rows].numpy(),
        *tally.blocks,
        kernel=K.numpy() if full else None,
    )


def entry_of(workspace: KernelWorkspace, one: GradientCache, other: GradientCache) -> Entry:
    """The kernel's entry of two gradients; with a contribution where the second is of U."""
    K = workspace.kernel_between(one, other)
    scale = one.preconditioned_norm * other.preconditioned_norm
    weight = workspace.weights[workspace.index[other.sequence_id]] if other.sequence_id in workspace.index else None
    nats = None if weight is None else float(weight) * K
    return Entry(one.sequence_id, other.sequence_id, K, K / scale if scale else 0.0, nats)


def influence_of(
    workspace: KernelWorkspace, ids: tuple[str, ...] | None = None, advantages: Any = None
) -> dict[str, float]:
    """Compute Σ_j C(t, j) for sequences t of U, as {id: nats}, from stored gradients.

    Raises:
        RolloutError: an unknown id or rule.
        PlanError: the stored gradients are not ∇S, or advantages change their signs; see `KernelWorkspace`.
    """
    if workspace.loss is not None and workspace.loss.ratio is not None:
        raise PlanError(
            f"The workspace's gradients of U are Σ_t ρ_t ∇log π(u_t) of the loss {workspace.loss.facts['kind']}, and "
            f"not ∇S: they do not say how log π of U's own sequences moves. Ask a plan for it: requests: "
            f"[{{kind: update}}]."
        )
    wanted = workspace.batch.ids if ids is None else selected(workspace.batch.ids, ids, "U")
    weights: Tensor = workspace.weights_with(advantages)
    nats = workspace.gradients.along(workspace.P(workspace.gradients.weighted_sum(weights))).tolist()
    return {name: nats[workspace.index[name]] for name in wanted}
