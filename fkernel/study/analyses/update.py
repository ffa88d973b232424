"""Analyses of U itself: what P rests on, and what U is made of. One that fails is left out, as a request's are."""

from __future__ import annotations

import torch

from fkernel.analysis import alignment, clusters, health, kernel_pca
from fkernel.engine import kernel
from fkernel.errors import PlanError
from fkernel.shapes import Tree
from fkernel.study.analyses.failures import tried
from fkernel.study.analyses.plan import StructurePlan
from fkernel.study.outcome import Finding
from fkernel.study.rows import Grant, Policy, tile_of
from fkernel.study.workspace import KernelWorkspace, tokens_of

WHOSE = "the update batch's"


def health_of(workspace: KernelWorkspace, policy: Policy) -> Finding:
    """Tell what P rests on; a warning says so where it is next to nothing."""
    found, lost = tried("health", WHOSE, lambda: _health(workspace, policy), workspace.batch.ids)
    return lost or found


def _health(workspace: KernelWorkspace, policy: Policy) -> Finding:
    if policy.state is None or workspace.P.d is None:
        return Finding({}, {"left_out": "it needs an optimizer's second moment, and a preconditioner made of it"})
    found = health(policy.state, workspace.P.d, workspace.gradients.squared_sum())
    shares = {name: None if share is None else share._asdict() for name, share in found._asdict().items()
              if name in ("unseen", "below_eps", "smallest")}  # fmt: skip
    facts = {"coordinates": found.coordinates, "dominated": found.dominated, "by_parameter": found.by_parameter}
    return Finding({}, facts | shares)


def structure_of(
    asked: StructurePlan, workspace: KernelWorkspace, policy: Policy, grant: Grant, after: Tree | None, seed: int
) -> Finding:
    """Find principal components, clusters and exemplars of U; and how far its kernel turns in the step.

    Raises:
        PlanError: there are fewer sequences than components or clusters, or there is no step to align with.
    """

    def make() -> Finding:
        return _structure(asked, workspace, policy, grant, after, seed)

    found, lost = tried("structure", WHOSE, make, workspace.batch.ids)
    return lost or found


def _structure(
    asked: StructurePlan, workspace: KernelWorkspace, policy: Policy, grant: Grant, after: Tree | None, seed: int
) -> Finding:
    K, n = workspace.self_kernel(tile_of(grant.memory, workspace, policy)), len(workspace.batch)
    components, k = (asked.components or min(3, n), asked.clusters or min(8, n))
    for what, wanted in (("components", components), ("clusters", k)):
        if wanted > n:
            raise PlanError(f"analyses.structure.{what} is {wanted}, and U has {n} sequences.")
    pca, groups = kernel_pca(K, components), clusters(K, k, seed)
    ids = workspace.batch.ids
    facts = {
        "ids": ids,
        "shares": pca.shares.tolist(),
        "exemplars": [ids[i] for i in groups.exemplars.tolist()],
        "sizes": torch.bincount(groups.labels, minlength=k).tolist(),
        "within": groups.within,
    }
    if asked.alignment:
        if after is None:
            raise PlanError("analyses.structure.alignment needs a step: an optimizer's state, or step.after.")
        U = tokens_of(workspace.batch, policy.params)
        f, columns = policy.columns_for(U, workspace.loss)
        later = kernel(f, after, columns, columns, workspace.P, memory=grant.memory, microbatch=grant.microbatch)
        facts["alignment"] = alignment(K, later.cpu())
    return Finding({"scores": pca.scores.numpy(), "labels": groups.labels.numpy()}, facts)
