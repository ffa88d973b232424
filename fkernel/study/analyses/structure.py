"""Principal components and clusters of K_UU, and its alignment with K_UU after the step."""

from __future__ import annotations

import torch
from pydantic import Field

from fkernel.analysis import alignment, clusters, kernel_pca
from fkernel.engine import kernel
from fkernel.errors import PlanError
from fkernel.study.analyses.analysis import Analysis
from fkernel.study.analyses.context import UpdateContext
from fkernel.study.config.values import Strict
from fkernel.study.outcome import AnalysisResult
from fkernel.study.rows import self_strategy
from fkernel.study.workspace import tokens_of


class StructurePlan(Strict):
    """Principal components and clusters of K_UU, and its alignment with K_UU after the step."""

    components: int | None = Field(None, ge=1, description="three, or as many as there are sequences")
    clusters: int | None = Field(None, ge=1, description="eight, or as many as there are sequences")
    alignment: bool = Field(False, description="with K_UU after the step; one more gradient per sequence of U")


def compute(context: UpdateContext, config: StructurePlan) -> AnalysisResult:
    """Compute principal components, clusters and exemplars of U, and the kernel alignment across the step.

    Raises:
        PlanError: fewer sequences than components or clusters, or no step for the alignment.
    """
    workspace, policy, grant = context.workspace, context.policy, context.grant
    K, n = workspace.self_kernel(self_strategy(grant.memory, workspace, policy)), len(workspace.batch)
    components, k = (config.components or min(3, n), config.clusters or min(8, n))
    for what, wanted in (("components", components), ("clusters", k)):
        if wanted > n:
            raise PlanError(f"analyses.structure.{what} is {wanted}, and U has {n} sequences.")
    pca, groups = kernel_pca(K, components), clusters(K, k, context.seed)
    ids = workspace.batch.ids
    facts = {
        "ids": ids,
        "shares": pca.shares.tolist(),
        "exemplars": [ids[i] for i in groups.exemplars.tolist()],
        "sizes": torch.bincount(groups.labels, minlength=k).tolist(),
        "within": groups.within,
    }
    if config.alignment:
        after = context.after
        if after is None:
            raise PlanError("analyses.structure.alignment needs a step: an optimizer's state, or step.after.")
        U = tokens_of(workspace.batch, policy.params)
        f, columns = policy.columns_for(U, workspace.loss)
        later = kernel(f, after, columns, columns, workspace.P, memory=grant.memory, microbatch=grant.microbatch)
        facts["alignment"] = alignment(K, later.cpu())
    return AnalysisResult({"scores": pca.scores.numpy(), "labels": groups.labels.numpy()}, facts)


STRUCTURE = Analysis(("scores", "labels"), compute=compute)
