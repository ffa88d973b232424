"""What was found about one request: arrays by sequence id, in nats."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fkernel.engine import Calibration, calibrate
from fkernel.errors import ResultsError, listing
from fkernel.rollout import SequenceRecord
from fkernel.study.diagnostics import cosines

EFFECTS = ("penalty", "momentum", "decay", "curvature", "realised", "unselected")

SKIPPED = "left_out"
"""Where the facts of an analysis that was skipped say why; files have this word."""


@dataclass(frozen=True)
class SequenceInfo:
    """A sequence as people know it.

    Attributes:
        id: display id, such as U-004-03.
        prompt: the prompt's text.
        response: the response's text.
        logprob: S at temperature 1, nats, of the policy that wrote the record: the one before the step, or an older one
            where the step's loss has U of an older one.
        reward: None where none was given.
        advantage: A_u; None where there is none.
        weight: w_u, the loss weight; None where there is none.
        prompt_id: its prompt's global_prompt_id.
        content_hash: of its tokens.
    """

    id: str
    prompt: str
    response: str
    logprob: float
    reward: float | None = None
    advantage: float | None = None
    weight: float | None = None
    prompt_id: str = ""
    content_hash: str = ""


def info_of(record: SequenceRecord) -> SequenceInfo:
    """Keep what results show of a record."""
    return SequenceInfo(
        record.sequence_id,
        record.prompt,
        record.response,
        record.logprob,
        record.reward,
        record.advantage,
        record.weight,
        record.provenance.global_prompt_id,
        record.content_hash,
    )


@dataclass(frozen=True)
class Entry:
    """One entry of the kernel.

    Attributes:
        row: an id of E (or of U).
        column: an id of U.
        kernel: ⟨∇S_row, P ∇S_column⟩.
        cosine: the same over both norms.
        contribution: what column did to row, nats; None where column has no weight.
    """

    row: str
    column: str
    kernel: float
    cosine: float
    contribution: float | None = None


@dataclass(frozen=True, eq=False)
class AnalysisResult:
    """What an analysis found.

    Attributes:
        arrays: by name; `docs/results.md` has their shapes.
        facts: JSON. Of an analysis that was skipped they have nothing but why, as `left_out`, and there are no arrays.
    """

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def skipped(self) -> str | None:
        """Why it could not be made: what it lacked, or how it failed; None where it was made."""
        return self.facts.get(SKIPPED)

    def __getitem__(self, name: str) -> np.ndarray:
        """Give an array.

        Raises:
            ResultsError: there is none of that name.
        """
        if name not in self.arrays:
            why = self.skipped or f"it has {', '.join(self.arrays) or 'none'}"
            raise ResultsError(f"This analysis has no {name!r}: {why}.")
        return self.arrays[name]


@dataclass(frozen=True, eq=False)
class RequestResult:
    """What one optimizer step did to every sequence of a batch, and which sequence of U did it.

    In nats where P is calibrated; a bare P gives `batch` and `contributions` in units of its own, and then no
    prediction is made.

    Attributes:
        name: the request's.
        kind: the request's.
        evaluation: the rows, n_E sequences.
        update: the columns, n_U sequences.
        batch: [n_E] Σ_u C_eu, what the update batch did.
        penalty: [n_E] what the loss's KL term did; None where there is none.
        momentum: [n_E] nats; None where there is no optimizer state or P is bare, as the next three.
        decay: [n_E] nats.
        curvature: [n_E] nats, ½ ΔθᵀH_eΔθ at the checkpoint; no part of the prediction along a path, which has it; None
            unless it was asked for.
        realised: [n_E] nats, S of the whole model after the step minus S before; None also where it was not asked for,
            or where other advantages than the step's were.
        unselected: [n_E] nats, the part of `realised` that parameters did which the plan does not select, after the
            selected ones had moved; None where there are none, or `step.after` is not given. No prediction is about it.
        squared_norms: [n_E] ‖∇S_e‖²; None where only the influence was asked for, as all that follows.
        diagonal: [n_E] K_ee.
        update_diagonal: [n_U] K_uu.
        top: [n_E k] columns of the largest |C_eu|, largest first.
        top_contributions: [n_E k] their C_eu.
        kernel: [n_E n_U] K, of E's gradients at the nodes of `path`; None unless it was kept, as the next.
        contributions: [n_E n_U] C.
        selected: entries that were asked for by id.
        facts: JSON: same-prompt and cross-prompt blocks, sampling diagnostics, advantages that were overridden.
        analyses: {name: AnalysisResult} of what the plan's `analyses` asked for.
    """

    name: str
    kind: str
    evaluation: tuple[SequenceInfo, ...]
    update: tuple[SequenceInfo, ...]
    batch: np.ndarray
    penalty: np.ndarray | None = None
    momentum: np.ndarray | None = None
    decay: np.ndarray | None = None
    curvature: np.ndarray | None = None
    realised: np.ndarray | None = None
    unselected: np.ndarray | None = None
    squared_norms: np.ndarray | None = None
    diagonal: np.ndarray | None = None
    update_diagonal: np.ndarray | None = None
    top: np.ndarray | None = None
    top_contributions: np.ndarray | None = None
    kernel: np.ndarray | None = None
    contributions: np.ndarray | None = None
    selected: tuple[Entry, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    analyses: dict[str, AnalysisResult] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Where E's gradients were taken: "midpoint", "gauss2", or "start", the checkpoint."""
        return str(self.facts.get("path", "start"))

    @property
    def predicted(self) -> np.ndarray:
        """[n_E] nats: batch + penalty, where there is one, + momentum + decay; or the batch's part alone.

        Along a path this is the change of S up to O(|Δθ|³); with the path "start", the first order.
        """
        if self.momentum is None or self.decay is None:
            return self.batch
        return (self.batch if self.penalty is None else self.batch + self.penalty) + self.momentum + self.decay

    @property
    def calibration(self) -> dict[str, Calibration]:
        """The predictions held against what the step did: {"batch": K·A alone, "predicted": with momentum and decay}.

        Where `facts["realised_on"]` is not "step.after", the step was executed here from the same reading of the
        optimizer's state: the two then agree whether or not it was read rightly.

        Empty without a realised change, or where fewer than two sequences moved differently.
        """
        if self.realised is None:
            return {}
        predictions = {"batch": self.batch, "predicted": self.predicted if self.momentum is not None else None}
        realised = torch.from_numpy(self.realised)
        found = {}
        for name, prediction in predictions.items():
            if prediction is not None and len(prediction) > 1 and prediction.std() * self.realised.std() > 0:
                found[name] = calibrate(torch.from_numpy(prediction), realised)
        return found

    @property
    def cosines(self) -> np.ndarray:
        """[n_E n_U] K_eu / √(K_ee K_uu).

        Raises:
            ResultsError: the kernel was not kept.
        """
        K, rows, columns = (torch.from_numpy(self.kept(name)) for name in ("kernel", "diagonal", "update_diagonal"))
        return cosines(K, rows, columns).numpy()

    def kept(self, name: str) -> np.ndarray:
        """Give an array that a plan may leave out.

        Raises:
            ResultsError: this one did.
        """
        found = getattr(self, name)
        if found is None:
            raise ResultsError(
                f"The request {self.name!r} kept no {name}; ask for capture: {{kernel: true}} in its plan."
            )
        return found

    def analysis(self, name: str) -> AnalysisResult:
        """Give what an analysis found, such as "ledger" or "counterfactuals.rloo".

        Raises:
            ResultsError: it was not asked for.
        """
        return asked_for(self.analyses, name, f"The request {self.name!r}")

    def row(self, sequence_id: str) -> int:
        """Find the row of a sequence of E.

        Raises:
            ResultsError: there is none of that id.
        """
        return _place(self.evaluation, sequence_id, f"The request {self.name!r}")

    def column(self, sequence_id: str) -> int:
        """Find the column of a sequence of U.

        Raises:
            ResultsError: there is none of that id.
        """
        return _place(self.update, sequence_id, "The update batch")

    def top_contributors(self, row: int, k: int = 3) -> list[tuple[SequenceInfo, float]]:
        """Return the k update sequences that moved one evaluation sequence most, with their nats, largest first."""
        if self.top is None or self.top_contributions is None:
            return []
        pairs = zip(self.top[row, :k], self.top_contributions[row, :k], strict=True)
        return [(self.update[u], float(nats)) for u, nats in pairs]


def asked_for(analyses: dict[str, AnalysisResult], name: str, whose: str) -> AnalysisResult:
    """Give one of some findings.

    Raises:
        ResultsError: it was not asked for.
    """
    if name not in analyses:
        has = f"has {', '.join(analyses)}" if analyses else "has none"
        raise ResultsError(f"{whose} {has} of the analyses, and no {name!r}; ask for it in the plan (analyses:).")
    return analyses[name]


def _place(sequences: tuple[SequenceInfo, ...], sequence_id: str, where: str) -> int:
    ids = [info.id for info in sequences]
    if sequence_id not in ids:
        raise ResultsError(f"{where} has no sequence {sequence_id!r}; it has {listing(ids)}.")
    return ids.index(sequence_id)


@dataclass(frozen=True, eq=False)
class SelfKernel:
    """U against itself.

    Attributes:
        ids: [n_U] of the rows and columns.
        eigenvalues: [n_U] of K_UU, largest first.
        effective_rank: exp of the eigenvalues' entropy.
        participation: (Σ λ)² / Σ λ².
        squared_norms: [n_U] ‖∇S_u‖².
        diagonal: [n_U] K_uu.
        same_prompt: (mean K, mean |cosine|, entries) of different sequences of one prompt.
        cross_prompt: the same of different prompts.
        kernel: [n_U n_U]; None unless it was asked for.
    """

    ids: tuple[str, ...]
    eigenvalues: np.ndarray
    effective_rank: float
    participation: float
    squared_norms: np.ndarray
    diagonal: np.ndarray
    same_prompt: tuple[float | None, float | None, int]
    cross_prompt: tuple[float | None, float | None, int]
    kernel: np.ndarray | None = None

    @property
    def norm_ratio(self) -> float | None:
        """The largest √K_uu over the smallest; None where a gradient is zero."""
        least = float(self.diagonal.min())
        return float(self.diagonal.max() / least) ** 0.5 if least > 0 else None
