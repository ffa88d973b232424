"""Uncertainty of contributions: bootstrap intervals over prompts of U, and permutation tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from pydantic import Field

from fkernel import tree
from fkernel.analysis import (
    group_sums,
    influence_interval,
    permutation_rms,
    permutations,
    rank_interval,
    resamplings,
    significance,
)
from fkernel.engine import Gradients, KernelBlock, own_part
from fkernel.func.handles import ProductSpec
from fkernel.precond import Diagonal
from fkernel.rollout import GeneratedBatch
from fkernel.shapes import Tensor, Tree
from fkernel.study.analyses.analysis import Accumulator, Analysis
from fkernel.study.analyses.context import RequestContext
from fkernel.study.analyses.exchange import exchangeable
from fkernel.study.config.step import PreconditionerPlan, StepPlan
from fkernel.study.config.values import Strict
from fkernel.study.diagnostics import top_contributors
from fkernel.study.optimizer_step import clipped, preconditioner_of
from fkernel.study.outcome import AnalysisResult
from fkernel.study.rows import Policy
from fkernel.study.workspace import KernelWorkspace


class UncertaintyPlan(Strict):
    """Resampled prompts and permuted advantages.

    Attributes:
        draws: how many of each.
        coverage: of the intervals.
        seed: of the draws.
    """

    draws: int = Field(1000, ge=20)
    coverage: float = Field(0.9, gt=0, lt=1)
    seed: int = Field(0, description="of the draws and of the permutations")


class UncertaintyAccumulator(Accumulator):
    """Intervals by prompt, and permutation p-values of contributors and prompts.

    Both use a P that is invariant to permutations of advantages within prompts: the step's own, where that is frozen or
    the identity; else one with the mean of g² over all permutations (`permutation_rms`), as a second kernel of the same
    pass. Intervals have their width from that kernel, and their center from the influence under the step's own P.
    """

    def __init__(self, context: RequestContext, config: UncertaintyPlan) -> None:
        """Draw resamplings and permutations once for all rows."""
        batch = context.workspace.batch
        self.context, self.config, n = context, config, len(context.batch)
        self.exchanged = exchangeable(context.workspace, context.advantages)
        self.scale = context.workspace.clip * self.exchanged.weights
        self.prompts = resamplings(batch.groups, config.draws, config.seed)
        self.shuffled = permutations(batch.groups, config.draws, config.seed, self.exchanged.permuted)
        if self.exchanged.reason is not None:  # no permutation, p = 1
            self.shuffled = self.shuffled._replace(orders=torch.arange(len(batch)).expand(config.draws, -1))
        self.names = _names_by_place(batch, self.prompts.place)
        k = min(max(1, context.capture.top_k), len(batch))
        self.arrays = {name: torch.zeros(n, dtype=torch.float64) for name in ("low", "high", "error", "p")}
        self.arrays |= {name: torch.zeros(n, k, dtype=torch.float64) for name in ("rank_low", "rank_high", "top_p")}
        self.arrays["prompt_p"] = torch.zeros(n, len(self.names), dtype=torch.float64)
        self.arrays["prompt_contributions"] = torch.zeros(n, len(self.names), dtype=torch.float64)
        if context.capture.kernel:
            self.arrays["sequence_p"] = torch.zeros(n, len(batch), dtype=torch.float32)
        form = context.workspace.spec["preconditioner"]["form"]
        self.permuted = form == "post-step"
        self.facts: dict[str, Any] = {"draws": config.draws, "coverage": config.coverage, "prompts": self.names}
        self.facts |= {} if self.exchanged.reason is None else {"untested": self.exchanged.reason}
        self.facts["preconditioner"] = "permutation mean" if self.permuted else form

    def ask(self, walk: ProductSpec) -> ProductSpec:
        """Add the kernel under the permutation-invariant P."""
        if not self.permuted:
            return walk
        P = permuted_preconditioner(self.context.workspace, self.context.policy)
        return walk._replace(kernels={**walk.kernels, "permuted": P.d})

    def add(self, block: KernelBlock) -> None:
        """Add a block of rows; an interval needs two prompts."""
        dtype = self.context.dtype
        C = (block.kernel().to(dtype) * self.context.weights.to(dtype)).double()
        arrays, k = self.arrays, self.arrays["top_p"].shape[1]
        K = block.kernel("permuted" if self.permuted else "").to(dtype)
        p_values = significance(K, self.scale, self.exchanged.advantages, self.shuffled)
        arrays["p"][block.at], arrays["prompt_p"][block.at] = p_values.influence, p_values.prompts
        arrays["prompt_contributions"][block.at] = group_sums(C, self.prompts.place, self.prompts.prompts)
        columns, _ = top_contributors(C, k)
        arrays["top_p"][block.at] = p_values.sequences.gather(1, columns)
        if "sequence_p" in arrays:
            arrays["sequence_p"][block.at] = p_values.sequences.float()
        self.facts |= {"informative": p_values.informative.tolist(), "least": p_values.least.tolist()}
        if self.exchanged.reason is not None:
            self.facts |= {"informative": [False] * len(self.names), "least": [1.0] * len(p_values.least)}
        if self.prompts.prompts < 2:
            return
        interval = influence_interval(K * self.context.weights.to(K), self.prompts, self.config.coverage)
        apart = C.sum(1) - interval.estimate
        arrays["low"][block.at], arrays["high"][block.at] = interval.low + apart, interval.high + apart
        arrays["error"][block.at] = interval.error
        _, ranks = rank_interval(C, self.prompts, k, self.config.coverage)
        arrays["rank_low"][block.at], arrays["rank_high"][block.at] = ranks.low, ranks.high

    def result(self) -> AnalysisResult:
        """P-values, and intervals where there are two prompts or more."""
        kept = dict(self.arrays)
        if self.prompts.prompts < 2:
            for name in ("low", "high", "error", "rank_low", "rank_high"):
                del kept[name]
        return AnalysisResult({name: value.numpy() for name, value in kept.items()}, self.facts)


_PERMUTED: WeakKeyDictionary[KernelWorkspace, Diagonal] = WeakKeyDictionary()


def permuted_preconditioner(workspace: KernelWorkspace, policy: Policy) -> Diagonal:
    """The step's P with the mean of g² over all permutations of advantages in place of g².

    The clipping factor is of the mean square, too. Computed once for all requests, from U's gradients.
    """
    if workspace not in _PERMUTED:
        like = next(iter(policy.params.values()))
        loss, batch = workspace.loss, workspace.batch
        given = exchangeable(workspace)
        weights = given.weights.to(like.device, torch.promote_types(like.dtype, torch.float32))
        rms: Tree = {}
        J = workspace.gradients
        parts = 1 if J.walked or not J.whole else 8  # those come for all parameters
        for names in _shares(policy.params, parts):  # elementwise, in shares: five vectors of a share are small
            J = _part_of(workspace, names)
            beside = [] if loss is None else [*loss.beside_columns.values()]
            penalty = tree.add(*({name: v[name] for name in names} for v in beside)) if beside else None
            rms |= permutation_rms(
                J.weighted_sum, J.squared_sum, weights, given.advantages, batch.groups, penalty, given.permuted
            )
        rms = {name: rms[name] for name in policy.params}
        plan, step = (workspace.spec[name] for name in ("preconditioner", "step"))
        g, _, _ = clipped(StepPlan(**step), policy.params, rms, policy.unused)
        del rms
        _PERMUTED[workspace] = preconditioner_of(PreconditionerPlan(**plan), own_part(policy.params), policy.state, g)
    return _PERMUTED[workspace]


def _shares(params: Tree, parts: int) -> Iterator[list[str]]:
    """Group successive parameters into shares of about 1/parts of all elements, or of one parameter."""
    most, share, held = max(1, tree.size(params) // parts), list[str](), 0
    for name, leaf in params.items():
        if share and held + leaf.numel() > most:
            yield share
            share, held = [], 0
        share.append(name)
        held += leaf.numel()
    yield share


def _part_of(workspace: KernelWorkspace, names: Sequence[str]) -> Gradients:
    """U's gradients of some parameters; only these are read from disk."""
    U = workspace.gradients
    if U.walked or not U.whole:
        return U
    if workspace.directory is not None:
        return Gradients(U.side, U.cuts, lambda i: U.read(i, names))
    return Gradients(U.side, U.cuts, lambda i: {name: U.read(i)[name] for name in names})


def _names_by_place(batch: GeneratedBatch, place: Tensor) -> list[str]:
    """global_prompt_ids in the order of their group numbers."""
    names = dict(zip(place.tolist(), (record.provenance.global_prompt_id for record in batch), strict=True))
    return [names[g] for g in sorted(names)]


UNCERTAINTY = Analysis(
    ("low", "high", "error", "p", "rank_low", "rank_high", "top_p", "sequence_p", "prompt_p", "prompt_contributions"),
    accumulator=UncertaintyAccumulator,
)
