"""Correlation of changes with length, entropy, reward and log-probability; partial ones given length."""

from __future__ import annotations

import torch

from fkernel.analysis import correlations
from fkernel.rollout import GeneratedBatch
from fkernel.shapes import Tensor
from fkernel.study.analyses.analysis import Analysis
from fkernel.study.analyses.context import RequestContext
from fkernel.study.analyses.failures import AnalysisUnavailable
from fkernel.study.outcome import AnalysisResult


def compute(context: RequestContext, config: bool = True) -> AnalysisResult:
    """Correlate U's effect on E, and its size, with covariates of E's sequences."""
    if len(context.batch) < 3:
        raise AnalysisUnavailable("it needs three sequences or more")
    numbers, batch = numbers_of(context.batch), context.effects["batch"].double().cpu()
    changes = {"influence": batch, "size": batch.abs()}
    if "realised" in context.effects:
        changes["realised"] = context.effects["realised"].double().cpu()
    table = {
        change: {name: correlation._asdict() for name, correlation in correlations(values, numbers).items()}
        for change, values in changes.items()
    }
    return AnalysisResult({}, {"correlations": table, "given": "length"})


def numbers_of(batch: GeneratedBatch) -> dict[str, Tensor]:
    """[n] length, entropy, log-probability, and the reward where every sequence has one."""
    numbers = {
        "length": [float(len(record.response_ids)) for record in batch],
        "entropy": [sum(record.entropies) / len(record.entropies) for record in batch],
        "logprob": [record.logprob for record in batch],
    }
    if all(record.reward is not None for record in batch):
        numbers["reward"] = [float(record.reward or 0.0) for record in batch]
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in numbers.items()}


COVARIATES = Analysis((), compute=compute)
