"""Analyses that take rows of K, or the gradients of E, as they come."""

from __future__ import annotations

from typing import Any

import torch

from fkernel.analysis import (
    by_part,
    group_sums,
    influence_interval,
    missed,
    norms_by,
    permutations,
    rank_interval,
    resamplings,
    shares,
    significance,
    summed,
)
from fkernel.analysis.ledger import floor_of
from fkernel.func.groups import by_kind, by_layer
from fkernel.rollout.batch import GeneratedBatch
from fkernel.shapes import Tensor
from fkernel.study.analyses.plan import UncertaintyPlan
from fkernel.study.analyses.situation import Situation
from fkernel.study.diagnostics import top_contributors
from fkernel.study.outcome import Finding
from fkernel.study.rows import Rows


class FloorTaker:
    """The rounding in every realised change."""

    def __init__(self, at: Situation) -> None:
        """Begin with nothing."""
        self.at, self.floor = at, torch.zeros(len(at.batch), dtype=torch.float64)

    def add(self, rows: Rows) -> None:
        """Take some rows."""
        value = self.at.before[rows.at]
        self.floor[rows.at] = floor_of(rows.handles(), value, self.at.policy.params).cpu()


class PartsTaker:
    """K·A, contributions and norms by layer and by kind of parameter."""

    def __init__(self, at: Situation) -> None:
        """Begin with nothing."""
        self.at, self.names = at, [*at.policy.params]
        self.sums: dict[str, dict[str, Tensor]] = {"kind": {}, "layer": {}}
        self.norms: dict[str, dict[str, Tensor]] = {"kind": {}, "layer": {}}
        self.contributions: dict[str, dict[str, Tensor]] = {"kind": {}, "layer": {}}

    def add(self, rows: Rows) -> None:
        """Take some rows; the kernel is contracted once more, part by part."""
        at, n, J = self.at, len(self.at.batch), rows.handles()
        parts = at.workspace.gradients.parts_against(J, at.workspace.P, by_part)
        norms = {part: both.plain.cpu() for part, both in norms_by(J, by_part).items()}
        for view, key in (("kind", by_kind), ("layer", by_layer)):
            for group, K in summed(parts, self.names, key).items():
                C = (K * at.weights.to(K)).double()
                _into(self.sums[view], group, n)[rows.at] = C.sum(1)
                if at.capture.kernel:
                    _into(self.contributions[view], group, n, C.shape[1])[rows.at] = C
            for group, plain in summed(norms, self.names, key).items():
                _into(self.norms[view], group, n)[rows.at] = plain

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


class UncertaintyTaker:
    """Intervals by prompt, and which contributors and prompts are told apart from chance."""

    def __init__(self, at: Situation, asked: UncertaintyPlan) -> None:
        """Draw once for all rows."""
        batch = at.workspace.batch
        self.at, self.asked, n = at, asked, len(at.batch)
        self.advantages = at.workspace.advantages_with(at.advantages)
        ones = torch.ones_like(self.advantages)
        self.scale = at.workspace.clip * batch.with_values("advantage", ones).loss_weights
        self.prompts = resamplings(batch.groups, asked.draws, asked.seed)
        self.shuffled = permutations(batch.groups, asked.draws, asked.seed)
        if at.workspace.keeps_signs:  # the loss was evaluated for these signs: nothing may be permuted, and p is 1
            self.shuffled = self.shuffled._replace(orders=torch.arange(len(batch)).expand(asked.draws, -1))
        self.names = _names_by_place(batch, self.prompts.place)
        k = min(max(1, at.capture.top_k), len(batch))
        self.arrays = {name: torch.zeros(n, dtype=torch.float64) for name in ("low", "high", "error", "p")}
        self.arrays |= {name: torch.zeros(n, k, dtype=torch.float64) for name in ("rank_low", "rank_high", "top_p")}
        self.arrays["prompt_p"] = torch.zeros(n, len(self.names), dtype=torch.float64)
        self.arrays["prompt_contributions"] = torch.zeros(n, len(self.names), dtype=torch.float64)
        self.facts: dict[str, Any] = {"draws": asked.draws, "coverage": asked.coverage, "prompts": self.names}

    def add(self, rows: Rows) -> None:
        """Take some rows; an interval needs two prompts."""
        C, arrays, k = (rows.K * self.at.weights.to(rows.K)).double(), self.arrays, self.arrays["top_p"].shape[1]
        found = significance(rows.K, self.scale, self.advantages, self.shuffled)
        arrays["p"][rows.at], arrays["prompt_p"][rows.at] = found.influence, found.prompts
        arrays["prompt_contributions"][rows.at] = group_sums(C, self.prompts.place, self.prompts.prompts)
        columns, _ = top_contributors(C, k)
        arrays["top_p"][rows.at] = found.sequences.gather(1, columns)
        self.facts |= {"informative": found.informative.tolist(), "least": found.least.tolist()}
        if self.at.workspace.keeps_signs:
            self.facts |= {"informative": [False] * len(self.names), "least": [1.0] * len(found.least)}
        if self.prompts.prompts < 2:
            return
        sure = influence_interval(C, self.prompts, self.asked.coverage)
        arrays["low"][rows.at], arrays["high"][rows.at], arrays["error"][rows.at] = sure.low, sure.high, sure.error
        _, ranks = rank_interval(C, self.prompts, k, self.asked.coverage)
        arrays["rank_low"][rows.at], arrays["rank_high"][rows.at] = ranks.low, ranks.high

    def finding(self) -> Finding:
        """What was found."""
        kept = dict(self.arrays)
        if self.prompts.prompts < 2:
            for name in ("low", "high", "error", "rank_low", "rank_high"):
                del kept[name]
        return Finding({name: value.numpy() for name, value in kept.items()}, self.facts)


def _names_by_place(batch: GeneratedBatch, place: Tensor) -> list[str]:
    """Prompts in the order in which they are numbered."""
    found = dict(zip(place.tolist(), (record.provenance.global_prompt_id for record in batch), strict=True))
    return [found[g] for g in sorted(found)]


def _into(table: dict[str, Tensor], group: str, *shape: int) -> Tensor:
    if group not in table:
        table[group] = torch.zeros(*shape, dtype=torch.float64)
    return table[group]
