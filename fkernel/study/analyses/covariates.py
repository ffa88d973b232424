"""What changes go with: length, entropy, reward, log-probability; and what still does once length is taken out."""

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
    """Correlate what U did to E, and its size, with plain numbers of E's sequences."""
    if len(context.batch) < 3:
        raise AnalysisUnavailable("it needs three sequences or more")
    numbers, batch = numbers_of(context.batch), context.effects["batch"].double().cpu()
    about = {"influence": batch, "size": batch.abs()}
    if "realised" in context.effects:
        about["realised"] = context.effects["realised"].double().cpu()
    table = {
        what: {name: one._asdict() for name, one in correlations(values, numbers).items()}
        for what, values in about.items()
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
