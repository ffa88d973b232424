"""Tokens of a request: which of them moved, and which tokens of U moved them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fkernel.analysis import token_change, token_kernel
from fkernel.errors import RolloutError
from fkernel.func.batch import take
from fkernel.study.analyses.plan import TokensPlan
from fkernel.study.analyses.situation import Situation
from fkernel.study.outcome import Finding
from fkernel.study.workspace import tokens_of


def tokens_found(at: Situation, asked: TokensPlan, strict: bool) -> Finding:
    """Predict the change of every token of E, and compute the token × token kernels that are asked for.

    Raises:
        RolloutError: a pair names a sequence that is not there.
    """
    p, m, read = at.policy, at.grant.microbatch, reader(at.policy.tokenizer)
    change = token_change(p.apply, p.params, at.E, at.step.total, p.temperature, microbatch=m)
    arrays = {
        "logprob": change.logprob.cpu().numpy(),
        "entropy": change.entropy.cpu().numpy(),
        "response": at.E.response_mask.bool().cpu().numpy(),
    }
    facts: dict[str, Any] = {"tokens": [read(record.response_ids) for record in at.batch], "pairs": []}
    place, U = {name: i for i, name in enumerate(at.batch.ids)}, tokens_of(at.workspace.batch, p.params)
    for row, column in asked.pairs:
        if row not in place:
            if strict:
                raise RolloutError(f"tokens: the pair [{row}, {column}] names a row that is none of this request's.")
            continue
        e, u = (take(x, torch.tensor([i])) for x, i in ((at.E, place[row]), (U, at.workspace.row(column))))
        K = token_kernel(p.f, p.params, e, u, at.workspace.P, microbatch=m)
        if at.workspace.loss is not None and at.workspace.loss.ratio is not None:
            K = K * at.workspace.loss.ratio[at.workspace.row(column)][u.response_mask[0].bool()].to(K)
        name = f"pair_{len(facts['pairs'])}"
        arrays[name] = (K * float(at.weights[at.workspace.index[column]])).cpu().numpy()
        columns = read(at.workspace.batch.by_id(column).response_ids)
        facts["pairs"].append({"row": row, "column": column, "array": name, "column_tokens": columns})
    return Finding(arrays, facts)


def reader(tokenizer: Any) -> Callable[[Any], list[str]]:
    """What reads token ids as texts, one each; their numbers where there is no tokenizer."""
    if tokenizer is None:
        return lambda ids: [str(int(i)) for i in ids]
    return lambda ids: [tokenizer.decode([int(i)]) for i in ids]
