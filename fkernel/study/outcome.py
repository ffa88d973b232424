"""Results of one request and of K_UU: arrays by sequence id, in nats."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from fkernel.engine import Calibration, calibrate
from fkernel.errors import ResultsError, listing
from fkernel.rollout import SequenceRecord
from fkernel.study.diagnostics import cosines, grouped
from fkernel.study.shown import request_html, request_text

EFFECTS = ("momentum", "decay", "arithmetic", "unexplained", "curvature", "realised", "unselected")

SKIPPED = "left_out"
"""Key of the reason in the facts of a skipped analysis, in files too."""


@dataclass(frozen=True)
class SequenceInfo:
    """A sequence as results show it.

    Attributes:
        id: display id, such as U-004-03.
        prompt: the prompt's text.
        response: the response's text.
        logprob: S at temperature 1, nats, under the policy that sampled it: the one before the step, or an older one
            where the step's loss allows that.
        reward: None where none was given.
        advantage: A_u; None where there is none.
        weight: w_u, the loss weight; None where there is none.
        prompt_id: its prompt's global_prompt_id.
        content_hash: of its tokens.
        times: how many sequences of the same tokens this one stands for, where they were added up.
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
    times: int = 1


def as_record(info: SequenceInfo) -> dict[str, Any]:
    """The sequence as files hold it: one sequence each."""
    return {name: value for name, value in asdict(info).items() if name != "times"}


def info_of(record: SequenceRecord) -> SequenceInfo:
    """The part of a record that results show."""
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
        contribution: C of the two, nats; None where column has no weight.
    """

    row: str
    column: str
    kernel: float
    cosine: float
    contribution: float | None = None


@dataclass(frozen=True, eq=False)
class AnalysisResult:
    """The result of an analysis.

    Attributes:
        arrays: by name; `docs/results.md` has their shapes.
        facts: JSON. A skipped analysis has no arrays, and only the reason as `left_out`.
    """

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def skipped(self) -> str | None:
        """Why it was skipped: what it lacked, or its error; None where it was computed."""
        return self.facts.get(SKIPPED)

    def __getitem__(self, name: str) -> np.ndarray:
        """An array by name.

        Raises:
            ResultsError: there is none of that name.
        """
        if name not in self.arrays:
            why = self.skipped or f"it has {', '.join(self.arrays) or 'none'}"
            raise ResultsError(f"This analysis has no {name!r}: {why}.")
        return self.arrays[name]


@dataclass(frozen=True, eq=False, repr=False)
class RequestResult:
    """What one optimizer step did to every sequence of a batch, by sequence of U.

    In nats where P is calibrated; under a bare P `batch` and `contributions` are not, and nothing is predicted.

    Attributes:
        name: the request's.
        kind: the request's.
        evaluation: the rows, n_E sequences.
        update: the columns, n_U sequences.
        batch: [n_E] the update batch's effect: Σ_u C_eu, and the parts of the loss that no column has.
        parts: {part: [n_E]} of the loss, such as advantage, kl, entropy: they add up to `batch`; {} where it has one.
        momentum: [n_E] nats; None where there is no optimizer state or P is bare, as the next three.
        decay: [n_E] nats.
        arithmetic: [n_E] nats, what the training's own precision did that real numbers would not; None where the step
            was not executed in it.
        unexplained: [n_E] nats, what the step really taken has beyond the one executed here; None without `step.after`.
        curvature: [n_E] nats, ½ ΔθᵀH_eΔθ at the checkpoint; not added to the prediction, whose path includes it; None
            unless captured.
        realised: [n_E] nats, S of the whole model after the step minus S before; None also where it is not captured, or
            the request has other advantages than the step's.
        unselected: [n_E] nats, the part of `realised` due to unselected parameters, after the selected ones moved; None
            where there are none, or without `step.after`. Not predicted.
        squared_norms: [n_E] ‖∇S_e‖²; None where only the influence was captured, as all that follows.
        diagonal: [n_E] K_ee.
        update_diagonal: [n_U] K_uu.
        top: [n_E k] columns of the largest |C_eu|, largest first.
        top_contributions: [n_E k] their C_eu.
        kernel: [n_E n_U] K, of E's gradients at the nodes of `path`; None unless captured, as the next.
        contributions: [n_E n_U] C.
        selected: entries captured by id.
        facts: JSON: same-prompt and cross-prompt blocks, sampling diagnostics, overridden advantages.
        analyses: {name: AnalysisResult}, as the plan's `analyses` asks.
    """

    name: str
    kind: str
    evaluation: tuple[SequenceInfo, ...]
    update: tuple[SequenceInfo, ...]
    batch: np.ndarray
    momentum: np.ndarray | None = None
    decay: np.ndarray | None = None
    arithmetic: np.ndarray | None = None
    unexplained: np.ndarray | None = None
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
    parts: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Where E's gradients were evaluated: "midpoint", "gauss2", or "start", the checkpoint."""
        return str(self.facts.get("path", "start"))

    @property
    def predicted(self) -> np.ndarray:
        """[n_E] nats: batch + momentum + decay + arithmetic, as far as they exist.

        The change of S up to O(|Δθ|³) along a path; first order with the path "start".
        """
        if self.momentum is None or self.decay is None:
            return self.batch
        exact = self.batch + self.momentum + self.decay
        return exact if self.arithmetic is None else exact + self.arithmetic

    @property
    def calibration(self) -> dict[str, Calibration]:
        """Predictions against realised changes: {"batch": K·A alone, "predicted": with momentum and decay}.

        Where `facts["realised_on"]` is not "step.after", θ' was computed from the same optimizer state: agreement does
        then not show that the state was read correctly.

        Empty without a realised change, or where fewer than two sequences moved differently.
        """
        if self.realised is None:
            return {}
        predictions = {"batch": self.batch, "predicted": self.predicted if self.momentum is not None else None}
        realised = torch.from_numpy(self.realised)
        calibrations = {}
        for name, prediction in predictions.items():
            if prediction is not None and len(prediction) > 1 and prediction.std() * self.realised.std() > 0:
                calibrations[name] = calibrate(torch.from_numpy(prediction), realised)
        return calibrations

    @property
    def cosines(self) -> np.ndarray:
        """[n_E n_U] K_eu / √(K_ee K_uu).

        Raises:
            ResultsError: the kernel was not captured.
        """
        K, rows, columns = (torch.from_numpy(self.kept(name)) for name in ("kernel", "diagonal", "update_diagonal"))
        return cosines(K, rows, columns).numpy()

    def kept(self, name: str) -> np.ndarray:
        """An array that is only there if captured.

        Raises:
            ResultsError: it was not.
        """
        array = getattr(self, name)
        if array is None:
            raise ResultsError(
                f"The request {self.name!r} kept no {name}; ask for capture: {{kernel: true}} in its plan."
            )
        return array

    def analysis(self, name: str) -> AnalysisResult:
        """The result of an analysis, such as "ledger" or "counterfactuals.rloo".

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

    def top_contributors(
        self, row: int, k: int = 3, group_identical: bool = False, which: Literal["both", "raised", "lowered"] = "both"
    ) -> list[tuple[SequenceInfo, float]]:
        """The k update sequences of largest |C| for one evaluation sequence, with their nats.

        Args:
            row: of the evaluation sequence.
            k: how many.
            group_identical: whether sequences of the same tokens are one, with their sum; its `times` counts them.
            which: those that raised the evaluation sequence, those that lowered it, or both. Sums and signs are over
                all of U where contributions were captured, else over the stored top contributors.
        """
        if self.top is None or self.top_contributions is None:
            return []
        places, values = self.top[row], self.top_contributions[row]
        if self.contributions is not None and (group_identical or which != "both"):
            values = self.contributions[row]
            places = np.argsort(-np.abs(values), kind="stable")
            values = values[places]
        infos = [self.update[u] for u in places]
        if group_identical:
            first, sums, times = grouped(values, [info.content_hash or info.id for info in infos])
            infos = [replace(infos[i], times=n) for i, n in zip(first, times, strict=True)]
            order = np.argsort(-np.abs(sums), kind="stable")
            infos, values = [infos[i] for i in order], np.array(sums)[order]
        sign = {"both": 0, "raised": 1, "lowered": -1}[which]
        pairs = [(info, float(v)) for info, v in zip(infos, values, strict=True) if not sign or sign * v > 0]
        return pairs[:k]

    def __repr__(self) -> str:
        """One screen: what moved most."""
        return request_text(self)

    def _repr_html_(self) -> str:
        """A table of what moved most, for notebooks."""
        return request_html(self, EFFECTS)


def asked_for(analyses: dict[str, AnalysisResult], name: str, whose: str) -> AnalysisResult:
    """Look up an analysis by name.

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
    """K_UU, its spectrum and norms.

    Attributes:
        ids: [n_U] of the rows and columns.
        eigenvalues: [n_U] of K_UU, largest first.
        effective_rank: exp of the eigenvalues' entropy.
        participation: (Σ λ)² / Σ λ².
        squared_norms: [n_U] ‖∇S_u‖².
        diagonal: [n_U] K_uu.
        same_prompt: (mean K, mean |cosine|, entries) of different sequences of one prompt.
        cross_prompt: the same of different prompts.
        kernel: [n_U n_U]; None unless captured.
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
