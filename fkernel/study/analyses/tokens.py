"""Predicted change of every token of E, and token × token kernels; E's gradients are at the nodes of the step's path.

A sequence's token changes add up to its prediction, a pair's entries to its contribution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field

from fkernel.analysis import TokenChange, apart, token_change
from fkernel.engine import Problem, SortedBatch, Strategy, blocks
from fkernel.errors import RolloutError
from fkernel.func import Sequences
from fkernel.func.handles import ProductSpec
from fkernel.func.inputs import take
from fkernel.shapes import Tensor
from fkernel.study.analyses.analysis import Analysis
from fkernel.study.analyses.context import RequestContext
from fkernel.study.config.values import Strict
from fkernel.study.outcome import AnalysisResult
from fkernel.study.workspace import tokens_of


class TokensPlan(Strict):
    """The change of every token, and token × token kernels of some pairs.

    Attributes:
        pairs: [E id, U id].
    """

    pairs: tuple[tuple[str, str], ...] = Field((), description="[E id, U id]")


def compute(context: RequestContext, config: TokensPlan) -> AnalysisResult:
    """Predict the change of every token of E, and compute the token × token kernels of `pairs`.

    Raises:
        RolloutError: a pair names an unknown sequence.
    """
    p, read, change = context.policy, reader(context.policy.tokenizer), _change(context)
    arrays = {
        "logprob": change.logprob.cpu().numpy(),
        "entropy": change.entropy.cpu().numpy(),
        "response": context.E.response_mask.bool().cpu().numpy(),
    }
    facts: dict[str, Any] = {"tokens": [read(record.response_ids) for record in context.batch], "pairs": []}
    row_of, U = {name: i for i, name in enumerate(context.batch.ids)}, tokens_of(context.workspace.batch, p.params)
    for row, column in config.pairs:
        if row not in row_of:
            if context.strict:
                raise RolloutError(f"tokens: the pair [{row}, {column}] names a row that is none of this request's.")
            continue
        e, u = (take(x, torch.tensor([i])) for x, i in ((context.E, row_of[row]), (U, context.workspace.row(column))))
        K = _kernel(context, e, u)
        if context.workspace.loss is not None and context.workspace.loss.ratio is not None:
            K = K * context.workspace.loss.ratio[context.workspace.row(column)][u.response_mask[0].bool()].to(K)
        name = f"pair_{len(facts['pairs'])}"
        arrays[name] = (K * float(context.weights[context.workspace.index[column]])).cpu().numpy()
        columns = read(context.workspace.batch.by_id(column).response_ids)
        facts["pairs"].append({"row": row, "column": column, "array": name, "column_tokens": columns})
    return AnalysisResult(arrays, facts)


def _change(context: RequestContext) -> TokenChange:
    """Σ_j q_j (directional derivative along Δθ at node j), of every token."""
    p, step, m = context.policy, context.step.total, context.grant.microbatch
    changes = [(q, token_change(p.apply, node, context.E, step, p.temperature, microbatch=m)) for q, node in p.nodes]
    return TokenChange(*(sum(q * each[k] for q, each in changes) for k in (0, 1)))  # pyright: ignore[reportArgumentType]


def _kernel(context: RequestContext, e: Sequences, u: Sequences) -> Tensor:
    """The token × token kernel of two sequences, [response tokens of e, response tokens of u]."""
    p, spec = context.policy, ProductSpec({"": context.workspace.P.d})
    E, U = SortedBatch("E", apart(e), p.f), SortedBatch("U", apart(u), p.columns)
    problem = Problem(p.params, E, U, spec, p.path, p.step, promised=context.grant.memory is not None)
    K = torch.empty(len(E), len(U), dtype=context.dtype)
    for block in blocks(problem, Strategy("sequences", "E", None, None, context.grant.microbatch * max(E.tokens))):
        K[block.at] = block.kernel().to(context.dtype)
    return K


def reader(tokenizer: Any) -> Callable[[Any], list[str]]:
    """A function that decodes token ids one by one; to their numbers without a tokenizer."""
    if tokenizer is None:
        return lambda ids: [str(int(i)) for i in ids]
    return lambda ids: [tokenizer.decode([int(i)]) for i in ids]


TOKENS = Analysis(("logprob", "entropy", "response", "pair_*"), compute=compute)
