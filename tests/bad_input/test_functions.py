"""What f does wrong."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.func import functional_call

import fkernel as fk
from fkernel import func, precond
from tests.bad_input.common import (
    BAD_BATCHES,
    BATCHED,
    DTYPE,
    ENTRIES,
    NAN,
    TRANSFORMS,
    clear_error,
    everywhere,
    plain,
    sequences,
    vectors,
)


@everywhere
@pytest.mark.parametrize(
    ("f", "shape"),
    [
        (lambda p, x: plain(p, x).sum(), "[]"),
        (lambda p, x: plain(p, x).repeat(2)[: 2 * len(x)], "["),
    ],
    ids=["one number for the batch", "two numbers a sequence"],
)
def test_an_f_of_the_wrong_shape_is_a_model_error(params, entry, f, shape):
    with clear_error(fk.ModelError, f"f returned shape {shape}", "expected [n]", "one a sequence"):
        ENTRIES[entry](f, params, vectors(), vectors())


def test_a_row_a_sequence_of_e_alone_is_a_model_error(params):
    """f is right for U: its batch has a dimension less."""
    with clear_error(fk.ModelError, "f returned shape [1, ", "expected [n]"):
        ENTRIES["explain_step, E"](plain, params, vectors()[None], vectors())


@pytest.mark.parametrize("entry", [name for name in ENTRIES if name not in ("jvp", "curvature", "realised_change, E")])
def test_an_f_with_a_row_a_sequence_has_no_single_gradient(params, entry):
    with clear_error(fk.ModelError, "f returned shape", "expected [n]"):
        ENTRIES[entry](lambda p, x: plain(p, x)[:, None], params, vectors(), vectors())


class Dropping(nn.Module):
    """A user's own module, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 16, dtype=DTYPE)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.linear(x)).tanh().sum(1)


@everywhere
def test_dropout_that_is_active_is_a_model_error_in_every_transform(entry):
    module = Dropping().train()
    params = {name: leaf.detach() for name, leaf in module.named_parameters()}

    def f(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(module, p, (x,))

    with clear_error(fk.ModelError, "random", "dropout", "model.eval()"):
        ENTRIES[entry](f, params, vectors(), vectors())
    module.eval()
    ENTRIES[entry](f, params, vectors(), vectors())


@pytest.mark.parametrize("entry", TRANSFORMS)
def test_dropout_of_a_language_model_called_past_make_functional_is_a_model_error(gpt2, entry):
    model = copy.deepcopy(gpt2).train()
    model.set_attn_implementation("eager")
    params = {name: leaf.detach() for name, leaf in model.named_parameters()}

    def apply(p: dict[str, torch.Tensor], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return functional_call(model, p, (), {"input_ids": ids, "attention_mask": mask, "use_cache": False}).logits

    with clear_error(fk.ModelError, "dropout", "model.eval()"):
        ENTRIES[entry](func.sequence_logprob(apply), params, sequences(), sequences())


def test_an_f_that_branches_on_values_is_told_to_use_where(params):
    """It is followed all the same, one sequence at a time."""

    def f(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return plain(p, x) if bool(x.abs().sum() > 0) else -plain(p, x)

    with pytest.warns(fk.ModelWarning, match=r"one sequence at a time.*branches on values.*torch\.where"):
        J = func.per_sequence_grad(f)(params, vectors())
    for name, leaf in func.per_sequence_grad(plain)(params, vectors()).items():
        torch.testing.assert_close(J[name], leaf)


@everywhere
@pytest.mark.parametrize("size", [0, -2])
def test_a_microbatch_must_be_positive(params, entry, size):
    with clear_error(fk.BatchError, f"microbatch is {size}", "positive whole number"):
        ENTRIES[entry](plain, params, vectors(), vectors(), size)


def _composed(apply: func.Apply) -> Callable[..., torch.Tensor]:
    logprob, entropy = func.sequence_logprob(apply), func.token_entropy(apply)
    return lambda p, b: 2 * logprob(p, b) + entropy(p, b).sum(1)


@pytest.mark.parametrize("microbatch", [None, 2])
def test_a_function_that_the_user_composed_works_under_every_transform(language, microbatch):
    apply, params = language
    batch, f = sequences(), _composed(apply)
    w = torch.tensor([1.0, -0.5, 2.0], dtype=DTYPE)
    move = {name: torch.randn_like(leaf) for name, leaf in params.items()}

    J = func.per_sequence_grad(f, microbatch)(params, batch)
    pulled = func.vjp(f, microbatch)(params, batch, w)
    pushed = func.jvp(f, microbatch)(params, batch, move)
    bent = func.curvature(f, microbatch)(params, batch, move)

    rows = torch.cat([leaf.reshape(3, -1) for leaf in J.values()], 1)
    v = torch.cat([leaf.reshape(-1) for leaf in move.values()])
    torch.testing.assert_close(torch.cat([leaf.reshape(-1) for leaf in pulled.values()]), w @ rows)
    torch.testing.assert_close(pushed, rows @ v)
    entropy = func.token_entropy(apply)
    twice = 2 * func.curvature(func.sequence_logprob(apply))(params, batch, move)
    torch.testing.assert_close(bent, twice + func.curvature(lambda p, b: entropy(p, b).sum(1))(params, batch, move))

    K = fk.kernel(f, params, batch, batch, precond.identity(), microbatch=microbatch or 8)
    torch.testing.assert_close(K, rows @ rows.T)
    for name in BATCHED:
        assert ENTRIES[name](f, params, batch, batch) is not None


@everywhere
@pytest.mark.parametrize("case", ["no response", "left-padded", "a token id beyond the vocabulary"])
def test_a_function_that_the_user_composed_is_told_of_a_bad_batch_all_the_same(language, entry, case):
    apply, params = language
    spoil, _ = BAD_BATCHES[case]
    with pytest.raises(fk.BatchError):
        ENTRIES[entry](_composed(apply), params, spoil(sequences()), sequences())


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN, math.inf])
@pytest.mark.parametrize("make", [func.sequence_logprob, func.token_logprobs, func.token_entropy])
def test_a_temperature_must_be_positive_and_finite(language, make, temperature):
    with clear_error(fk.ModelError, f"temperature is {temperature}", "positive number"):
        make(language[0], temperature)
