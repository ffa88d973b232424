"""Tokens of a request: which of them moved, and which tokens of U moved them; E's side at the nodes of the step's path.

A row's changes add up to the prediction of its sequence, a pair's entries to its contribution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fkernel.analysis import TokenChange, apart, token_change
from fkernel.engine import Strategy
from fkernel.engine.problem import Problem, blocks
from fkernel.engine.sides import Ordered
from fkernel.errors import RolloutError
from fkernel.func import Sequences
from fkernel.func.batch import take
from fkernel.func.contract import Asked
from fkernel.shapes import Tensor
from fkernel.study.analyses.plan import TokensPlan
from fkernel.study.analyses.situation import Situation
from fkernel.study.outcome import Finding
from fkernel.study.workspace import tokens_of


def tokens_found(at: Situation, asked: TokensPlan, strict: bool) -> Finding:
    """Predict the change of every token of E, and compute the token × token kernels that are asked for.

    Raises:
        RolloutError: a pair names a sequence that is not there.
    """
    p, read, change = at.policy, reader(at.policy.tokenizer), _change(at)
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
        K = _kernel(at, e, u)
        if at.workspace.loss is not None and at.workspace.loss.ratio is not None:
            K = K * at.workspace.loss.ratio[at.workspace.row(column)][u.response_mask[0].bool()].to(K)
        name = f"pair_{len(facts['pairs'])}"
        arrays[name] = (K * float(at.weights[at.workspace.index[column]])).cpu().numpy()
        columns = read(at.workspace.batch.by_id(column).response_ids)
        facts["pairs"].append({"row": row, "column": column, "array": name, "column_tokens": columns})
    return Finding(arrays, facts)


def _change(at: Situation) -> TokenChange:
    """Σ_j q_j of what every token does along Δθ, at the path's nodes."""
    p, step, m = at.policy, at.step.total, at.grant.microbatch
    found = [(q, token_change(p.apply, node, at.E, step, p.temperature, microbatch=m)) for q, node in p.nodes]
    return TokenChange(*(sum(q * each[k] for q, each in found) for k in (0, 1)))  # pyright: ignore[reportArgumentType]


def _kernel(at: Situation, e: Sequences, u: Sequences) -> Tensor:
    """The kernel of two sequences, token by token, [response tokens of e, response tokens of u]."""
    p, asked = at.policy, Asked({"": at.workspace.P.d})
    E, U = Ordered("E", apart(e), p.f), Ordered("U", apart(u), p.columns)
    problem = Problem(p.params, E, U, asked, p.path, p.step, promised=at.grant.memory is not None)
    K = torch.empty(len(E), len(U), dtype=at.dtype)
    for block in blocks(problem, Strategy("sequences", "E", None, None, at.grant.microbatch * max(E.tokens))):
        K[block.at] = block.kernel().to(at.dtype)
    return K


def reader(tokenizer: Any) -> Callable[[Any], list[str]]:
    """What reads token ids as texts, one each; their numbers where there is no tokenizer."""
    if tokenizer is None:
        return lambda ids: [str(int(i)) for i in ids]
    return lambda ids: [tokenizer.decode([int(i)]) for i in ids]
