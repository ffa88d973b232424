"""Analyses that take rows of K, or the gradients of E, as they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from fkernel import tree
from fkernel.analysis import (
    by_part,
    group_sums,
    influence_interval,
    missed,
    permutation_rms,
    permutations,
    rank_interval,
    resamplings,
    shares,
    significance,
    summed,
)
from fkernel.analysis.ledger import floor_from
from fkernel.engine.contraction import Block
from fkernel.engine.gradients import Gradients
from fkernel.func.contract import Asked
from fkernel.func.groups import by_kind, by_layer
from fkernel.precond import Diagonal
from fkernel.rollout.batch import GeneratedBatch
from fkernel.shapes import Tensor, Tree
from fkernel.study.analyses.plan import UncertaintyPlan
from fkernel.study.analyses.situation import Situation
from fkernel.study.diagnostics import top_contributors
from fkernel.study.outcome import Finding
from fkernel.study.plan import PreconditionerPlan, StepPlan
from fkernel.study.response import clipped, preconditioner_of
from fkernel.study.rows import Policy
from fkernel.study.workspace import KernelWorkspace


class Taker:
    """An analysis that asks something of the walk, and takes a block at a time."""

    def ask(self, of: Asked) -> Asked:
        """Add what it asks of E's and U's gradients."""
        return of

    def add(self, block: Block) -> None:
        """Take some rows."""
        raise NotImplementedError


class FloorTaker(Taker):
    """The rounding in every realised change: Σ_α (θ_α ∂_α S_e)² is one more sum of squares."""

    def __init__(self, at: Situation) -> None:
        """Begin with nothing."""
        self.at, self.floor = at, torch.zeros(len(at.batch), dtype=torch.float64)

    def ask(self, of: Asked) -> Asked:
        """Ask for Σ_α θ_α² g_eα²."""
        squares = {**of.x.squares, "floor": {name: leaf.square() for name, leaf in self.at.policy.params.items()}}
        return of._replace(x=of.x._replace(squares=squares))

    def add(self, block: Block) -> None:
        """Take some rows."""
        self.floor[block.at] = floor_from(block.rows("floor"), self.at.before[block.at].cpu(), self.at.dtype)


class PartsTaker(Taker):
    """K·A, contributions and norms by layer and by kind of parameter."""

    def __init__(self, at: Situation) -> None:
        """Begin with nothing."""
        self.at, self.names = at, [*at.policy.params]
        self.sums: dict[str, dict[str, Tensor]] = {"kind": {}, "layer": {}}
        self.norms: dict[str, dict[str, Tensor]] = {"kind": {}, "layer": {}}
        self.contributions: dict[str, dict[str, Tensor]] = {"kind": {}, "layer": {}}

    def ask(self, of: Asked) -> Asked:
        """Ask for every sum part by part."""
        return of._replace(key=by_part)

    def add(self, block: Block) -> None:
        """Take some rows."""
        at, n = self.at, len(self.at.batch)
        for view, key in (("kind", by_kind), ("layer", by_layer)):
            for group, K in summed(block.parts(), self.names, key).items():
                C = (K.to(at.dtype) * at.weights.to(at.dtype)).double()
                _into(self.sums[view], group, n)[block.at] = C.sum(1)
                if at.capture.kernel:
                    _into(self.contributions[view], group, n, C.shape[1])[block.at] = C
            for group, plain in summed(block.row_parts("squared_norms"), self.names, key).items():
                _into(self.norms[view], group, n)[block.at] = plain

    def finding(self) -> Finding:
        """What was found: arrays lead with the group."""
        arrays: dict[str, Any] = {}
        facts: dict[str, Any] = {}
        for view in ("kind", "layer"):
            facts[f"{view}s"] = [*self.sums[view]]
            facts[f"{view}_shares"] = shares(self.sums[view])
            facts[f"{view}_norm_shares"] = shares(self.norms[view])
            stored = (("batch", self.sums), ("squared_norms", self.norms), ("contributions", self.contributions))
            for name, table in stored:
                if table[view]:
                    arrays[f"{view}_{name}"] = torch.stack([*table[view].values()]).numpy()
        gone = missed(self.sums["kind"])
        facts["missed"] = None if gone != gone else gone
        return Finding(arrays, facts)


class UncertaintyTaker(Taker):
    """Intervals by prompt, and which contributors and prompts are told apart from chance.

    Both are of K under a P that does not depend on how advantages fell within prompts: the step's own, where that is
    frozen or the identity; else one with the mean of g² over all permutations (`permutation_rms`), a second kernel of
    the same walk. An interval's width is of that, its middle the influence under the step's own.
    """

    def __init__(self, at: Situation, asked: UncertaintyPlan) -> None:
        """Draw once for all rows."""
        batch = at.workspace.batch
        self.at, self.asked, n = at, asked, len(at.batch)
        self.advantages = at.workspace.advantages_with(at.advantages)
        ones = torch.ones_like(self.advantages)
        self.scale = at.workspace.clip * batch.with_values("advantage", ones).loss_weights
        self.prompts = resamplings(batch.groups, asked.draws, asked.seed)
        self.shuffled = permutations(batch.groups, asked.draws, asked.seed, judged(batch))
        if at.workspace.keeps_signs:  # the loss was evaluated for these signs: nothing may be permuted, and p is 1
            self.shuffled = self.shuffled._replace(orders=torch.arange(len(batch)).expand(asked.draws, -1))
        self.names = _names_by_place(batch, self.prompts.place)
        k = min(max(1, at.capture.top_k), len(batch))
        self.arrays = {name: torch.zeros(n, dtype=torch.float64) for name in ("low", "high", "error", "p")}
        self.arrays |= {name: torch.zeros(n, k, dtype=torch.float64) for name in ("rank_low", "rank_high", "top_p")}
        self.arrays["prompt_p"] = torch.zeros(n, len(self.names), dtype=torch.float64)
        self.arrays["prompt_contributions"] = torch.zeros(n, len(self.names), dtype=torch.float64)
        form = at.workspace.asked["preconditioner"]["form"]
        self.permuted = form == "post-step"
        self.facts: dict[str, Any] = {"draws": asked.draws, "coverage": asked.coverage, "prompts": self.names}
        self.facts["preconditioner"] = "permutation mean" if self.permuted else form

    def ask(self, of: Asked) -> Asked:
        """Ask for the kernel under a P that advantages do not enter as they fell, too."""
        if not self.permuted:
            return of
        P = permuted_preconditioner(self.at.workspace, self.at.policy)
        return of._replace(kernels={**of.kernels, "permuted": P.d})

    def add(self, block: Block) -> None:
        """Take some rows; an interval needs two prompts."""
        rows, dtype = block, self.at.dtype
        C = (block.kernel().to(dtype) * self.at.weights.to(dtype)).double()
        arrays, k = self.arrays, self.arrays["top_p"].shape[1]
        K = block.kernel("permuted" if self.permuted else "").to(dtype)
        found = significance(K, self.scale, self.advantages, self.shuffled)
        arrays["p"][rows.at], arrays["prompt_p"][rows.at] = found.influence, found.prompts
        arrays["prompt_contributions"][rows.at] = group_sums(C, self.prompts.place, self.prompts.prompts)
        columns, _ = top_contributors(C, k)
        arrays["top_p"][rows.at] = found.sequences.gather(1, columns)
        self.facts |= {"informative": found.informative.tolist(), "least": found.least.tolist()}
        if self.at.workspace.keeps_signs:
            self.facts |= {"informative": [False] * len(self.names), "least": [1.0] * len(found.least)}
        if self.prompts.prompts < 2:
            return
        sure = influence_interval(K * self.at.weights.to(K), self.prompts, self.asked.coverage)
        apart = C.sum(1) - sure.estimate
        arrays["low"][rows.at], arrays["high"][rows.at] = sure.low + apart, sure.high + apart
        arrays["error"][rows.at] = sure.error
        _, ranks = rank_interval(C, self.prompts, k, self.asked.coverage)
        arrays["rank_low"][rows.at], arrays["rank_high"][rows.at] = ranks.low, ranks.high

    def finding(self) -> Finding:
        """What was found."""
        kept = dict(self.arrays)
        if self.prompts.prompts < 2:
            for name in ("low", "high", "error", "rank_low", "rank_high"):
                del kept[name]
        return Finding({name: value.numpy() for name, value in kept.items()}, self.facts)


_PERMUTED: WeakKeyDictionary[KernelWorkspace, Diagonal] = WeakKeyDictionary()


def permuted_preconditioner(workspace: KernelWorkspace, policy: Policy) -> Diagonal:
    """Make P as the step's own is made, with the mean of g² over all permutations of advantages in place of g².

    The clipping factor is that of the mean square, too. It is made once for all requests, of gradients that are held.
    """
    if workspace not in _PERMUTED:
        like = next(iter(policy.params.values()))
        loss, batch = workspace.loss, workspace.batch
        weights = batch.with_values("advantage", torch.ones_like(batch.advantages)).loss_weights
        weights = weights.to(like.device, torch.promote_types(like.dtype, torch.float32))
        rms: Tree = {}
        for names in _shares(policy.params):  # it is elementwise, and five vectors at once: of a share they are small
            J = _part_of(workspace, names)
            penalty = loss and loss.penalty and {name: loss.penalty[name] for name in names}
            rms |= permutation_rms(
                J.weighted_sum, J.squared_sum, weights, batch.advantages, batch.groups, penalty, judged(batch)
            )
        rms = {name: rms[name] for name in policy.params}
        plan, step = (workspace.asked[name] for name in ("preconditioner", "step"))
        _, g = clipped(StepPlan(**step), rms, policy.unused)
        del rms
        _PERMUTED[workspace] = preconditioner_of(PreconditionerPlan(**plan), policy.params, policy.state, g)
    return _PERMUTED[workspace]


def _shares(params: Tree, parts: int = 8) -> Iterator[list[str]]:
    """Group successive parameters into shares of about one part in so many, or of one parameter."""
    most, share, held = max(1, tree.size(params) // parts), list[str](), 0
    for name, leaf in params.items():
        if share and held + leaf.numel() > most:
            yield share
            share, held = [], 0
        share.append(name)
        held += leaf.numel()
    yield share


def _part_of(workspace: KernelWorkspace, names: Sequence[str]) -> Gradients:
    """U's gradients of some parameters; what is on disk is read of these alone."""
    U = workspace.gradients
    if workspace.directory is not None:
        return Gradients(U.side, U.cuts, lambda i: U.read(i, names))
    return Gradients(U.side, U.cuts, lambda i: {name: U.read(i)[name] for name in names})


def judged(batch: GeneratedBatch) -> Tensor | None:
    """Tell which sequences have a reward that might have been another's of their prompt, [n] bool; None for all.

    One whose reward abstained has the advantage 0 whatever the others' rewards are.
    """
    found = torch.tensor([not record.abstained or record.reward is not None for record in batch])
    return None if bool(found.all()) else found


def _names_by_place(batch: GeneratedBatch, place: Tensor) -> list[str]:
    """Prompts in the order in which they are numbered."""
    found = dict(zip(place.tolist(), (record.provenance.global_prompt_id for record in batch), strict=True))
    return [found[g] for g in sorted(found)]


def _into(table: dict[str, Tensor], group: str, *shape: int) -> Tensor:
    if group not in table:
        table[group] = torch.zeros(*shape, dtype=torch.float64)
    return table[group]
