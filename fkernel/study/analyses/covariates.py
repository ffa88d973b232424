"""What changes go with: length, entropy, reward, log-probability; and what still does once length is taken out."""

from __future__ import annotations

import torch

from fkernel.analysis import correlations
from fkernel.rollout.batch import GeneratedBatch
from fkernel.shapes import Tensor
from fkernel.study.analyses.situation import Lacking, Situation
from fkernel.study.outcome import Finding


def covariates_of(at: Situation) -> Finding:
    """Correlate what U did to E, and its size, with plain numbers of E's sequences."""
    if len(at.batch) < 3:
        raise Lacking("it needs three sequences or more")
    numbers, batch = numbers_of(at.batch), at.found["batch"].double().cpu()
    about = {"influence": batch, "size": batch.abs()}
    if "realised" in at.found:
        about["realised"] = at.found["realised"].double().cpu()
    table = {
        what: {name: one._asdict() for name, one in correlations(values, numbers).items()}
        for what, values in about.items()
    }
    return Finding({}, {"correlations": table, "given": "length"})


def numbers_of(batch: GeneratedBatch) -> dict[str, Tensor]:
    """[n] length, entropy, log-probability, and the reward where every sequence has one."""
    found = {
        "length": [float(len(record.response_ids)) for record in batch],
        "entropy": [sum(record.entropies) / len(record.entropies) for record in batch],
        "logprob": [record.logprob for record in batch],
    }
    if all(record.reward is not None for record in batch):
        found["reward"] = [float(record.reward or 0.0) for record in batch]
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}
