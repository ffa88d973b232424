"""Experts: their rows are gathered from all sequences, and of their gradients only those that were touched are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import fkernel as fk
from fkernel import func
from fkernel.func.handles.forms import nbytes, stack_handles
from fkernel.func.handles.reductions import squared_sum
from fkernel.func.handles.touched import Touch, touched_rows
from fkernel.func.inputs.batch import take
from fkernel.func.taps.batched import batch_plan
from fkernel.func.taps.rows import handles_of
from fkernel.func.taps.whose import Whose, by_sequence
from tests.laws import close, flat, rows
from tests.test_architectures import LLAMA_LIKE
from tests.test_taps import EXPERTS, LAST_BIT, alone, built, written

DTYPE = torch.float64
BATCH = func.pad([[5, 6, 7], [8], [9, 3], [4, 4, 4, 4], [5, 6]], [[3, 4], [5], [6, 7, 8, 9], [3], [7, 8]])
MANY = 16


def with_experts(name: str, way: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """S and its parameters, the experts computed in one of transformers' ways."""
    model = built(name).to(torch.float32 if way == "grouped_mm" else DTYPE)
    apply, params = func.make_functional(model)
    apply.module.set_experts_implementation(way)  # pyright: ignore[reportCallIssue]
    return func.sequence_logprob(apply).fn, params


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", EXPERTS)
def test_every_way_to_compute_experts_has_the_gradients_of_a_loop(name, way):
    f, params = with_experts(name, way)
    plan = batch_plan(f, params, take(BATCH, slice(1, 2)))
    assert plan is not None
    handles, _ = handles_of(f, params, BATCH, plan)
    expected = alone(f, params, BATCH)
    close(rows(written(handles, params, 5)), rows(expected), 1e-5 if way == "grouped_mm" else LAST_BIT)
    experts = {name for name, leaf in params.items() if leaf.ndim == 3 and "experts" in name}
    assert experts
    for one in experts:
        handle = handles[one]
        assert isinstance(handle, func.SparseRows)
        touched = expected[one].flatten(2).abs().amax(2) > 0
        assert handle.ids.shape[1] == int(touched.sum(1).max())


@pytest.fixture(scope="module")
def sparse():
    """S of a model with many experts, of which a short sequence meets few."""
    torch.manual_seed(3)
    shape = {**LLAMA_LIKE, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 1}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, num_experts=MANY, moe_intermediate_size=8)).double().eval()
    apply, params = func.make_functional(model)
    return func.sequence_logprob(apply), params


def test_memory_is_that_of_the_experts_that_were_touched(sparse):
    S, params = sparse
    handles = func.per_sequence_handles(S)(params, BATCH)
    dense = func.per_sequence_grad(S)(params, BATCH)
    for name in (name for name in params if "experts" in name):
        touched = int((dense[name].flatten(2).abs().amax(2) > 0).sum(1).max())
        assert touched <= 6 < MANY
        size = 8 * 5 * touched * (params[name][0].numel() + 1)  # and a number for each
        assert nbytes({name: handles[name]}) <= size


def test_they_contract_as_dense_gradients_do(sparse):
    S, params = sparse
    dense = func.per_sequence_grad(S)(params, BATCH)
    handles = func.per_sequence_handles(S, 2)(params, BATCH)
    whole = func.per_sequence_handles(S)(params, BATCH)
    assert any(isinstance(handle, func.SparseRows) and handle.cotangents.ndim == 4 for handle in whole.values())
    D = {name: torch.rand_like(leaf) + 0.1 for name, leaf in params.items()}
    expected = func.contract(dense, {name: D[name] * leaf for name, leaf in dense.items()})
    for x, y in ((handles, handles), (whole, whole), (handles, whole), (whole, dense), (dense, handles)):
        close(func.contract(x, y, diagonal=D), expected, 1e-12)
    w = torch.randn(5, dtype=DTYPE)
    for J in (handles, whole):
        close(flat(func.weighted_sum(J, w)), w @ rows(dense), 1e-12)
        close(func.squared_norms(J, diagonal=D).weighted, expected.diagonal(), 1e-12)
        close(flat(squared_sum(J, w.abs())), w.abs() @ rows(dense).square(), 1e-12)
    again = stack_handles([{**func.per_sequence_handles(S)(params, take(BATCH, slice(i, i + 1)))} for i in range(5)])
    close(func.contract(again, whole, diagonal=D), expected, 1e-12)


def test_a_kernel_by_layers_is_that_of_dense_gradients(sparse):
    S, params = sparse
    J = rows(func.per_sequence_grad(S)(params, BATCH))
    close(fk.kernel(S, params, BATCH, BATCH, fk.precond.identity()), J @ J.T, LAST_BIT)


# ---------------------------------------------------------------------------------------------------- whose a row is


def followed(n: int, f: Any, *given: torch.Tensor) -> torch.Tensor | None:
    """Run f over tensors with a gradient, and tell whose the rows of its result are."""
    whose = Whose(n)

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            whose.follow(func, args, kwargs or {}, out)
            return out

    with Mode():
        out = f(*(x.requires_grad_() for x in given))
    return whose.of([out], len(out))


IDS = torch.tensor([5, 0, 3, 3, 2])
CASES = {
    "gathered": (lambda x: x[IDS], [2, 0, 1, 1, 1]),
    "selected": (lambda x: torch.index_select(x, 0, IDS), [2, 0, 1, 1, 1]),
    "and computed with": (lambda x: (x[IDS].tanh() * 2.0).chunk(2, -1)[0], [2, 0, 1, 1, 1]),
    "gathered again": (lambda x: x[IDS][torch.tensor([4, 0])], [1, 2]),
    "a range": (lambda x: x[IDS][1:3], [0, 1]),
    "split": (lambda x: x[IDS].split([2, 3])[1], [1, 1, 1]),
    "joined": (lambda x: torch.cat([x[IDS].sin(), x[IDS[:2]]]), [2, 0, 1, 1, 1, 2, 0]),
    "of pairs": (lambda x: x[IDS, torch.zeros(5, dtype=torch.int64), None], [2, 0, 1, 1, 1]),
    "added where they belong": (lambda x: torch.zeros(5, 4).index_add(0, IDS % 5, x[IDS]), None),
    "all together": (lambda x: x.tanh(), None),
    "reshaped": (lambda x: x[torch.arange(6)].view(3, 2, 4), None),
}


@pytest.mark.parametrize(("f", "expected"), CASES.values(), ids=CASES)
def test_rows_are_followed_to_their_sequence(f, expected):
    found = followed(3, f, torch.randn(6, 4))
    assert (None if found is None else found.tolist()) == expected


def test_rows_of_different_sequences_are_not_combined():
    with pytest.raises(fk.ModelError, match="gathered from different sequences"):
        followed(3, lambda x: x[IDS] + x[IDS.flip(0)], torch.randn(6, 4))


def test_gathered_rows_are_brought_back_in_their_order():
    owners = torch.tensor([1, 0, 1, 1])
    found = by_sequence(torch.arange(4.0), 3, owners, -1.0)
    assert found.tolist() == [[1.0, -1.0, -1.0], [0.0, 2.0, 3.0], [-1.0, -1.0, -1.0]]


def test_a_row_without_a_gradient_touches_nothing():
    δ = torch.tensor([[[1.0], [0.0]], [[0.0], [0.0]]])
    found = touched_rows([Touch(torch.tensor([[2, 1], [0, -1]]), δ, torch.ones(2, 2, 1))], 3)
    assert found is not None
    assert found.ids.tolist() == [[2], [0]]
    assert found.cotangents.flatten().tolist() == [1.0, 0.0]
    nothing = Touch(torch.tensor([[2, 1], [0, -1]]), torch.zeros(2, 2, 1), torch.ones(2, 2, 1))
    assert touched_rows([nothing], 3) is None


def test_a_padding_row_of_a_batch_is_nobody_s_expert():
    """The router sends padding to experts too; what comes back to it is zero."""
    W = torch.randn(4, 3, 3, dtype=DTYPE)

    def f(p: Any, x: Any) -> torch.Tensor:
        h, ids = x
        y = torch.bmm(p["W"][ids.reshape(-1)], h.reshape(-1, 3, 1)).view_as(h)
        return (y.tanh() * h.abs().sum(-1, keepdim=True).sign()).sum((1, 2))

    h, ids = torch.randn(3, 2, 3, dtype=DTYPE), torch.tensor([[0, 1], [1, 3], [2, 2]])
    h[1, 1] = 0.0
    x = F.layer_norm(h, (3,)) * h.abs().sum(-1, keepdim=True).sign(), ids

    def g(p: Any, x: Any) -> torch.Tensor:
        return f({"W": p["W"]}, (F.linear(x[0], p["V"]), x[1]))

    params = {"W": W, "V": torch.eye(3, dtype=DTYPE)}
    plan = batch_plan(g, params, (x[0][:1], x[1][:1]))
    assert plan is not None
    handles, _ = handles_of(g, params, x, plan)
    close(rows(written(handles, params, 3)), rows(alone(g, params, x)), 1e-12)
    W_rows = handles["W"]
    assert isinstance(W_rows, func.SparseRows)
    assert W_rows.ids.tolist() == [[0, 1], [1, 0], [2, 0]]
