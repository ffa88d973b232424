"""What a workspace answers by itself, without the model: no gradient is computed here."""

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
    """Compute K_UU, or the part of some sequences, with its spectrum.

    Args:
        workspace: U.
        ids: patterns on ids; None for all.
        full: whether the matrix is kept.
        how: U meets itself; None for all of it at once.

    Raises:
        RolloutError: a pattern names no sequence.
    """
    ids = workspace.batch.ids if ids is None else selected(workspace.batch.ids, ids, "U")
    at = torch.tensor([workspace.index[name] for name in ids])
    with reuse_memory():
        K = workspace.self_kernel(how)[at][:, at]
        norms = workspace.norms
    prompts = [workspace.batch.records[i].provenance.global_prompt_id for i in at.tolist()]
    same = torch.tensor([[a == b for b in prompts] for a in prompts])
    others = ~torch.eye(len(ids), dtype=torch.bool)
    cosine, tally = cosines(K, norms.weighted[at], norms.weighted[at]), BlockTally()
    tally.add(K[others], cosine[others], same[others])
    found = spectrum(K)
    return SelfKernel(
        tuple(ids),
        found.eigenvalues.numpy(),
        found.effective_rank,
        found.participation,
        norms.plain[at].numpy(),
        norms.weighted[at].numpy(),
        *tally.blocks,
        kernel=K.numpy() if full else None,
    )


def entry_of(workspace: KernelWorkspace, one: GradientCache, other: GradientCache) -> Entry:
    """Make the kernel's entry of two gradients; a contribution too, where the second one is U's."""
    K = workspace.kernel_between(one, other)
    scale = one.preconditioned_norm * other.preconditioned_norm
    weight = workspace.weights[workspace.index[other.sequence_id]] if other.sequence_id in workspace.index else None
    nats = None if weight is None else float(weight) * K
    return Entry(one.sequence_id, other.sequence_id, K, K / scale if scale else 0.0, nats)


def influence_of(
    workspace: KernelWorkspace, ids: tuple[str, ...] | None = None, advantages: Any = None
) -> dict[str, float]:
    """Compute Σ_j C(t, j) for sequences t of U, as {id: nats}, from gradients that the workspace holds.

    Raises:
        RolloutError: an id or a rule is not known.
        PlanError: the gradients that it holds are not ∇S, or advantages change their signs; see `KernelWorkspace`.
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
