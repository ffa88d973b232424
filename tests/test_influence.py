"""Influence by reverse passes alone: what is asked of handles is what their gradients give, and no forward rule is."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import fkernel as fk
from fkernel import func, precond
from fkernel.errors import NonFiniteError
from fkernel.func.handles.forms import Concat, Factored, SparseRows, Sum, count
from fkernel.func.handles.head import Head
from fkernel.func.handles.products import contract
from fkernel.func.trust.directional import along_direction
from tests.laws import close

D = torch.float64


def factored(n: int) -> Factored:
    return Factored(torch.randn(n, 3, 4, dtype=D), torch.randn(n, 3, 7, dtype=D))


def rows(n: int) -> SparseRows:
    return SparseRows(torch.randint(0, 7, (n, 5)), torch.randn(n, 5, 4, dtype=D), 7)


def head(n: int) -> Head:
    W = torch.randn(7, 4, dtype=D)
    targets, omega, x = torch.randint(0, 7, (n, 3)), torch.randn(n, 3, dtype=D), torch.randn(n, 3, 4, dtype=D)
    return Head(targets, omega, (x @ W.mT).logsumexp(-1), x, W.__getitem__, 7, 1.0)


HANDLES = {
    "dense": lambda: torch.randn(3, 7, 4, dtype=D),
    "factors": lambda: factored(3),
    "lookups": lambda: rows(3),
    "a head": lambda: head(3),
    "a tied table": lambda: Sum((head(3), rows(3), factored(3))),
    "successive sequences": lambda: Concat((factored(1), Sum((factored(2), rows(2))), torch.randn(1, 7, 4, dtype=D))),
}


@pytest.mark.parametrize("kind", HANDLES)
def test_along_a_direction_is_the_contraction_with_it(kind):
    torch.manual_seed(0)
    J, v = {"w": HANDLES[kind]()}, {"w": torch.randn(7, 4, dtype=D)}
    found = along_direction(J, v)
    assert found.dtype == D
    close(found, contract(J, {"w": v["w"][None]})[:, 0])
    assert len(found) == count(J["w"])


def test_fused_attention_has_no_forward_rule_and_needs_none():
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 13, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "num_hidden_layers": 2, "attn_implementation": "sdpa"}
    config = Qwen2Config(**shape)
    apply, params = func.make_functional(Qwen2ForCausalLM(config).double().eval())
    S, w = func.sequence_logprob(apply), torch.randn(3, dtype=D)
    E, U = func.pad([[1, 2, 3], [4]], [[5], [6, 7, 8]]), func.pad([[1]] * 3, [[2], [3, 4, 5, 6], [7, 8]])
    P = precond.diagonal({name: leaf.abs() + 0.1 for name, leaf in params.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fk.influence(S, params, E, U, P, w)
    close(found, fk.kernel(S, params, E, U, P) @ w, 1e-6)  # a norm computes in float32


def test_an_influence_that_overflows_names_its_row():
    f = lambda params, x: torch.nn.functional.linear(x, params["w"]).sum((1, 2))  # noqa: E731
    params, E = {"w": torch.ones(8, 8)}, torch.stack([torch.ones(2, 8), 1e30 * torch.ones(2, 8)])
    with pytest.raises(NonFiniteError, match="row 1"):
        fk.influence(f, params, E, 1e10 * torch.ones(1, 2, 8), precond.identity(), torch.ones(1))
