"""Bad input gets a clear error: what was given, what was expected, what to do, in the user's own names."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fkernel as fk
from fkernel import func, precond
from fkernel.func import Sequences

DTYPE = torch.float64
NAN = math.nan
VOCABULARY, CONTEXT, WIDTH = 11, 8, 5

Entry = Callable[..., Any]


def _ones(batch: Any) -> torch.Tensor:
    """One weight a sequence, counted without the library."""
    leaf = next((leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor)), None)
    return torch.ones(0 if leaf is None or leaf.ndim == 0 else len(leaf), dtype=DTYPE)


def _explain(f: Any, params: Any, E: Any, U: Any, **options: Any) -> Any:
    return fk.explain_step(f, params, E, U, _ones(U), precond.adamw_init(params, lr=0.1), **options)


# Each takes (f, params, the batch at fault, a batch that is not, microbatch), and hands the first to one public name.
ENTRIES: dict[str, Entry] = {
    "per_sequence_grad": lambda f, p, b, good, m=None: func.per_sequence_grad(f, m)(p, b),
    "vjp": lambda f, p, b, good, m=None: func.vjp(f, m)(p, b, _ones(b)),
    "jvp": lambda f, p, b, good, m=None: func.jvp(f, m)(p, b, p),
    "curvature": lambda f, p, b, good, m=None: func.curvature(f, m)(p, b, p),
    "kernel, E": lambda f, p, b, good, m=8: fk.kernel(f, p, b, good, precond.identity(), microbatch=m),
    "kernel, U": lambda f, p, b, good, m=8: fk.kernel(f, p, good, b, precond.identity(), microbatch=m),
    "influence, E": lambda f, p, b, good, m=8: fk.influence(
        f, p, b, good, precond.identity(), _ones(good), microbatch=m
    ),
    "influence, U": lambda f, p, b, good, m=8: fk.influence(f, p, good, b, precond.identity(), _ones(b), microbatch=m),
    "loss_gradient, U": lambda f, p, b, good, m=8: fk.loss_gradient(f, p, b, _ones(b), microbatch=m),
    "explain_step, E": lambda f, p, b, good, m=8: _explain(f, p, b, good, microbatch=m),
    "explain_step, U": lambda f, p, b, good, m=8: _explain(f, p, good, b, microbatch=m),
    "realised_change, E": lambda f, p, b, good, m=8: fk.realised_change(f, p, p, b, microbatch=m),
}
TRANSFORMS = ("per_sequence_grad", "vjp", "jvp", "curvature")
BATCHED = [name for name in ENTRIES if "," in name]
everywhere = pytest.mark.parametrize("entry", ENTRIES)


@contextmanager
def clear_error(kind: type[Exception], *pieces: str) -> Iterator[pytest.ExceptionInfo[Any]]:
    """Expect an error of one kind whose message holds every piece."""
    with pytest.raises(kind) as caught:
        yield caught
    for piece in pieces:
        assert piece in str(caught.value)


def plain(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """An f that has nothing to do with language."""
    return torch.tanh(x @ params["w"] + params["b"])


def vectors(n: int = 3) -> torch.Tensor:
    return torch.linspace(0.1, 1.0, 3 * n, dtype=DTYPE).reshape(n, 3)


@pytest.fixture
def params() -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([0.5, -1.0, 2.0], dtype=DTYPE), "b": torch.tensor(0.3, dtype=DTYPE)}


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=8, n_layer=1, n_head=2)
    return GPT2LMHeadModel(config).double().train()


@pytest.fixture(scope="module")
def language(gpt2: GPT2LMHeadModel) -> tuple[func.Apply, dict[str, torch.Tensor]]:
    return func.make_functional(gpt2)


def sequences() -> Sequences:
    """Three sequences, five wide; the last is padded by one."""
    return func.pad([[1, 2], [3], [4, 5]], [[6, 7, 8], [9, 1, 2, 3], [4, 5]])


# ---------------------------------------------------------------------------------------------------------- batches


def _set(batch: Sequences, field: str, row: int, column: int | slice, value: int) -> Sequences:
    changed = getattr(batch, field).clone().to(torch.int64)
    changed[row, column] = value
    return batch._replace(**{field: changed})


def _left_padded(batch: Sequences) -> Sequences:
    return Sequences(*(leaf.flip(1) for leaf in batch))._replace(response_mask=batch.attention_mask.flip(1))


BAD_BATCHES: dict[str, tuple[Callable[[Sequences], Sequences], tuple[str, ...]]] = {
    "no sequence": (
        lambda b: Sequences(*(leaf[:0] for leaf in b)),
        ("empty", "0 sequences", "give at least one"),
    ),
    "no token": (
        lambda b: Sequences(*(leaf[:, :0] for leaf in b)),
        ("[3, 0]",),
    ),
    "no response": (
        lambda b: _set(b, "response_mask", 2, slice(None), 0),
        ("Sequence 2 has no response token", "1 of 3", "response_mask"),
    ),
    "response outside of the attention mask": (
        lambda b: _set(b, "response_mask", 2, 4, 1),
        ("Sequence 2", "outside its attention_mask", "1 of 3", "response_mask must lie inside attention_mask"),
    ),
    "left-padded": (
        _left_padded,
        ("Sequence 2", "padded on the left", "1 of 3", "right-padded", "fkernel.func.pad"),
    ),
    "a hole in the attention mask": (
        lambda b: _set(_set(b, "attention_mask", 2, 1, 0), "response_mask", 2, 1, 0),
        ("Sequence 2", "hole in its attention_mask", "right-padded"),
    ),
    "a response that begins at position 0": (
        lambda b: _set(b, "response_mask", 2, 0, 1),
        ("Sequence 2", "position 0", "position 1 or later"),
    ),
    "a mask of twos": (
        lambda b: _set(b, "response_mask", 2, 2, 2),
        ("Sequence 2", "response_mask holds values other than 0 and 1"),
    ),
    "ids of another integer type": (
        lambda b: b._replace(input_ids=b.input_ids.int()),
        ("input_ids is torch.int32", "int64", "long()"),
    ),
    "masks of another width": (
        lambda b: b._replace(attention_mask=b.attention_mask[:, :4]),
        ("one shape [n t]", "input_ids is [3, 5]", "attention_mask [3, 4]", "response_mask [3, 5]"),
    ),
    "masks of another number of rows": (
        lambda b: b._replace(response_mask=b.response_mask[:2]),
        ("disagree about the number of sequences", "[3, 5]", "[2, 5]"),
    ),
    "one sequence without its leading dimension": (
        lambda b: Sequences(*(leaf[0] for leaf in b)),
        ("[n t]", "input_ids is [5]"),
    ),
    "a token id beyond the vocabulary": (
        lambda b: _set(b, "input_ids", 2, 1, VOCABULARY),
        ("Sequence 2, position 1", f"token id {VOCABULARY}", f"vocabulary of {VOCABULARY}", "tokenizer"),
    ),
    "a negative token id": (
        lambda b: _set(b, "input_ids", 2, 4, -100),
        ("Sequence 2, position 4", "token id -100", f"vocabulary of {VOCABULARY}", "padding ids included"),
    ),
    "more tokens than the context holds": (
        lambda b: func.pad([[1], [2], [3]], [[1] * CONTEXT, [2], [3]]),
        (f"{CONTEXT + 1} tokens wide", f"context holds {CONTEXT}", "shorten"),
    ),
}


@everywhere
@pytest.mark.parametrize("case", BAD_BATCHES)
def test_a_batch_that_cannot_be_scored_is_a_batch_error_wherever_it_is_given(language, entry, case):
    apply, params = language
    spoil, pieces = BAD_BATCHES[case]
    with clear_error(fk.BatchError, *pieces):
        ENTRIES[entry](func.sequence_logprob(apply), params, spoil(sequences()), sequences())


@pytest.mark.parametrize("case", BAD_BATCHES)
@pytest.mark.parametrize("make", [func.sequence_logprob, func.token_logprobs, func.token_entropy])
def test_a_batch_that_cannot_be_scored_is_a_batch_error_when_f_is_called_itself(language, make, case):
    apply, params = language
    spoil, pieces = BAD_BATCHES[case]
    with clear_error(fk.BatchError, *pieces):
        make(apply)(params, spoil(sequences()))


@pytest.mark.parametrize("entry", [name for name in BATCHED if "loss" not in name])
def test_the_row_of_an_unscorable_sequence_counts_within_the_whole_batch_whatever_the_microbatch(language, entry):
    apply, params = language
    bad = _set(sequences(), "response_mask", 2, slice(None), 0)
    with clear_error(fk.BatchError, "Sequence 2 has no response token"):
        ENTRIES[entry](func.sequence_logprob(apply), params, bad, sequences(), 1)


@everywhere
@pytest.mark.parametrize(
    ("batch", "pieces"),
    [
        ({}, ("holds no tensor", "dict", "Sequences or a pytree of tensors")),
        ({"x": vectors(), "scale": torch.tensor(2.0)}, ("scalar tensor", "first dimension that counts sequences")),
        ({"x": vectors(3), "y": vectors(2)}, ("disagree about the number of sequences", "[3, 3]", "[2, 3]")),
        ({"x": vectors()[:0]}, ("empty", "give at least one")),
    ],
    ids=["no tensor", "a scalar", "rows disagree", "no rows"],
)
def test_a_plain_batch_without_one_number_of_rows_is_a_batch_error(params, entry, batch, pieces):
    with clear_error(fk.BatchError, *pieces):
        ENTRIES[entry](lambda p, b: plain(p, b["x"]), params, batch, {"x": vectors()})


@everywhere
def test_a_lookup_outside_of_a_table_is_a_batch_error_even_where_f_declares_no_vocabulary(entry):
    table = {"table": torch.ones(4, dtype=DTYPE)}
    with clear_error(fk.BatchError, "a row that does not exist", "vocabulary"):
        ENTRIES[entry](lambda p, ids: p["table"][ids], table, torch.tensor([0, 4]), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("prompts", "responses", "pieces"),
    [
        ([], [], ("No prompts", "at least one sequence")),
        ([[1]], [[1], [2]], ("1 prompts but 2 responses",)),
        ([[1], []], [[1], [2]], ("Sequence 1", "empty prompt")),
        ([[1], [2]], [[1], []], ("Sequence 1", "empty response")),
    ],
)
def test_pad_refuses_what_makes_no_sequence(prompts, responses, pieces):
    with clear_error(fk.BatchError, *pieces):
        func.pad(prompts, responses)


def test_every_error_is_also_the_built_in_that_a_newcomer_would_catch():
    for kind in (fk.BatchError, fk.TreeError, fk.ModelError, fk.OptimizerStateError):
        assert issubclass(kind, ValueError)
        assert issubclass(kind, fk.FKernelError)
    assert issubclass(fk.NonFiniteError, ArithmeticError)
    assert issubclass(fk.NonFiniteError, fk.FKernelError)


# -------------------------------------------------------------------------------------- parameters and directions


@everywhere
def test_no_parameters_at_all_is_a_tree_error(entry):
    with clear_error(fk.TreeError, "params is an empty dict", "{name: tensor}"):
        ENTRIES[entry](lambda p, x: x.sum(1), {}, vectors(), vectors())


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_refused_with_the_way_to_convert_them(params, entry, dtype):
    with clear_error(fk.TreeError, f"is {dtype}", "'w'", "float32 or float64", "fkernel.tree.cast"):
        ENTRIES[entry](plain, fk.tree.cast(params, dtype), vectors().to(dtype), vectors().to(dtype))


@everywhere
@pytest.mark.parametrize("value", [NAN, math.inf])
def test_a_non_finite_parameter_is_named(params, entry, value):
    params["w"][1] = value
    with clear_error(fk.NonFiniteError, "params['w'] holds 1 non-finite value(s) of 3") as caught:
        ENTRIES[entry](plain, params, vectors(), vectors())
    assert caught.value.parameter == "w"
    assert caught.value.row is None


def test_parameters_after_a_step_that_diverged_are_named(params):
    after = {**params, "w": params["w"] * NAN}
    with clear_error(fk.NonFiniteError, "'w'"):
        fk.realised_change(plain, params, after, vectors())


@pytest.mark.parametrize("derivative", [func.jvp, func.curvature])
@pytest.mark.parametrize(
    ("change", "kind", "pieces"),
    [
        (lambda v: {"w": v["w"]}, fk.TreeError, ("direction lacks 'b'", "params has")),
        (lambda v: {**v, "c": v["b"]}, fk.TreeError, ("direction has 'c'", "params lacks")),
        (lambda v: {**v, "w": v["w"][:2]}, fk.TreeError, ("direction['w'] has shape [2]", "params['w'] has [3]")),
        (
            lambda v: {**v, "w": v["w"].float()},
            fk.TreeError,
            ("direction['w'] is torch.float32", "params['w'] is torch.float64", "fkernel.tree.cast"),
        ),
        (lambda v: {**v, "w": v["w"] * NAN}, fk.NonFiniteError, ("direction['w'] holds 3 non-finite",)),
    ],
    ids=["name missing", "name too many", "shape", "dtype", "not finite"],
)
def test_a_direction_must_be_a_finite_vector_of_the_parameters_own_space(params, derivative, change, kind, pieces):
    with clear_error(kind, *pieces):
        derivative(plain)(params, vectors(), change(params))


@pytest.mark.parametrize(
    ("change", "pieces"),
    [
        (lambda p: {"w": p["w"]}, ("after lacks 'b'", "before has")),
        (lambda p: {**p, "c": p["b"]}, ("after has 'c'", "before lacks")),
        (lambda p: {**p, "w": p["w"][:2]}, ("after['w'] has shape [2]", "before['w'] has [3]")),
        (lambda p: {**p, "w": p["w"].float()}, ("after['w'] is torch.float32", "fkernel.tree.cast")),
    ],
)
def test_a_realised_change_needs_the_same_parameters_before_and_after(params, change, pieces):
    with clear_error(fk.TreeError, *pieces):
        fk.realised_change(plain, params, change(params), vectors())


WEIGHTED: dict[str, Callable[..., Any]] = {
    "vjp": lambda p, x, w: func.vjp(plain)(p, x, w),
    "influence": lambda p, x, w: fk.influence(plain, p, x[:1], x, precond.identity(), w),
    "loss_gradient": lambda p, x, w: fk.loss_gradient(plain, p, x, w),
    "explain_step": lambda p, x, w: fk.explain_step(plain, p, x[:1], x, w, precond.adamw_init(p, lr=0.1)),
}


@pytest.mark.parametrize("entry", WEIGHTED)
def test_there_must_be_one_weight_a_sequence(params, entry):
    with clear_error(fk.BatchError, "weights has shape [2]", "3 sequences", "expected [3]"):
        WEIGHTED[entry](params, vectors(), torch.ones(2, dtype=DTYPE))


def test_weights_are_a_vector_and_not_a_column(params):
    with clear_error(fk.BatchError, "weights has shape [3, 1]", "expected [3]"):
        WEIGHTED["explain_step"](params, vectors(), torch.ones(3, 1, dtype=DTYPE))


@pytest.mark.parametrize("entry", WEIGHTED)
@pytest.mark.parametrize("value", [NAN, -math.inf])
def test_a_weight_that_is_not_finite_is_named_by_its_row(params, entry, value):
    with clear_error(fk.NonFiniteError, f"weights[1] is {value}", "finite weight") as caught:
        WEIGHTED[entry](params, vectors(), torch.tensor([1.0, value, 1.0], dtype=DTYPE))
    assert caught.value.row == 1


def test_negative_weights_are_advantages_and_no_error(params):
    w = torch.tensor([1.0, 0.0, -2.0], dtype=DTYPE)
    x = vectors()
    pairs = zip(func.vjp(plain)(params, x, w).values(), func.vjp(plain)(params, x, -w).values(), strict=True)
    assert all(torch.equal(g, -h) for g, h in pairs)


# ----------------------------------------------------------------------------------------------------- what f does


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


# ----------------------------------------------------------------------------------------------- non-finite values


def _nan_after_nine(params: dict[str, torch.Tensor], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A language model whose logits overflow after token 9."""
    return params["table"][ids] + torch.where(ids[..., None] == 9, NAN, 0.0)


def _never_eight(params: dict[str, torch.Tensor], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A language model that masks token 8 out of its vocabulary, so that its log-probability is −inf."""
    return torch.where(torch.arange(10) == 8, -math.inf, params["table"][ids])


def _broken(kind: str) -> tuple[Any, dict[str, torch.Tensor], Any, Any]:
    """f, params, a batch of five whose row 3 alone is not finite, and one that is."""
    if kind == "gradient":
        good = vectors(5)
        bad = good.clone()
        bad[3] = 0.0
        return lambda p, x: (x @ p["w"]).clamp(min=0).sqrt(), {"w": torch.ones(3, dtype=DTYPE)}, bad, good
    good = func.pad([[1], [2, 3], [4], [5, 7], [6]], [[1, 2], [3], [4, 4], [5, 6], [6]])
    params = {"table": torch.randn(10, 10, dtype=DTYPE)}
    if kind == "logits":
        return func.sequence_logprob(_nan_after_nine), params, _set(good, "input_ids", 3, 1, 9), good
    return func.sequence_logprob(_never_eight), params, _set(good, "input_ids", 3, 2, 8), good


KINDS = ("gradient", "logits", "probability of zero")


@pytest.mark.parametrize("microbatch", [None, 2, 1])
@pytest.mark.parametrize("entry", TRANSFORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_sequence_that_is_not_finite_is_named_by_its_row(kind, entry, microbatch):
    f, params, bad, good = _broken(kind)
    with clear_error(fk.NonFiniteError, "sequence 3", "not finite") as caught:
        ENTRIES[entry](f, params, bad, good, microbatch)
    assert caught.value.row == 3


@pytest.mark.parametrize("entry", TRANSFORMS)
def test_a_value_that_is_not_finite_is_named_even_where_its_derivatives_are_finite(entry):
    x = vectors(5)
    x[3] = -1.0
    with clear_error(fk.NonFiniteError, "sequence 3", "not finite") as caught:
        ENTRIES[entry](lambda p, x: torch.log(x @ p["w"]), {"w": torch.ones(3, dtype=DTYPE)}, x, x)
    assert caught.value.row == 3


@pytest.mark.parametrize("entry", ["per_sequence_grad", "vjp"])
@pytest.mark.parametrize("microbatch", [None, 2])
def test_a_gradient_that_is_not_finite_is_named_by_its_parameter(entry, microbatch):
    f, params, bad, good = _broken("gradient")
    with clear_error(fk.NonFiniteError, "with respect to 'w'") as caught:
        ENTRIES[entry](f, params, bad, good, microbatch)
    assert caught.value.parameter == "w"


@pytest.mark.parametrize("microbatch", [8, 2, 1])
@pytest.mark.parametrize("entry", [name for name in BATCHED if name.split(",")[0] in ("kernel", "influence")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_non_finite_sequence_is_named_by_its_side_and_its_row_in_the_whole_batch(kind, entry, microbatch):
    f, params, bad, good = _broken(kind)
    side = entry[-1]
    with clear_error(fk.NonFiniteError, f"In {side}, row 3 of the whole batch") as caught:
        ENTRIES[entry](f, params, bad, good, microbatch)
    assert caught.value.row == 3


@pytest.mark.parametrize("held", ["smaller", "tiled"])
@pytest.mark.parametrize("side", ["E", "U"])
def test_the_row_is_the_whole_batch_s_on_the_held_side_too(side, held):
    f, params, bad, good = _broken("gradient")
    other, tile = (torch.cat([good, good]), None) if held == "smaller" else (good, 1)
    E, U = (bad, other) if side == "E" else (other, bad)
    strategy = fk.Strategy("sequences", "E" if side == "E" else "U", tile, 1, 1)
    with clear_error(fk.NonFiniteError, f"In {side}, row 3 of the whole batch"):
        fk.kernel(f, params, E, U, precond.identity(), strategy=strategy, microbatch=1)


@pytest.mark.parametrize("microbatch", [8, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["E", "U"])
def test_explaining_a_step_names_the_side_and_the_row_of_a_non_finite_sequence(side, kind, microbatch):
    f, params, bad, good = _broken(kind)
    with clear_error(fk.NonFiniteError, f"In {side}, row 3") as caught:
        ENTRIES[f"explain_step, {side}"](f, params, bad, good, microbatch)
    assert caught.value.row == 3


@pytest.mark.parametrize("microbatch", [8, 2])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_realised_change_that_is_not_finite_names_its_row(kind, microbatch):
    f, params, bad, good = _broken(kind)
    with clear_error(fk.NonFiniteError, "sequence 3") as caught:
        ENTRIES["realised_change, E"](f, params, bad, good, microbatch)
    assert caught.value.row == 3


@pytest.mark.parametrize("make", [func.sequence_logprob, func.token_logprobs, func.token_entropy])
def test_a_language_model_s_non_finite_logits_are_named_by_sequence_when_f_is_called_itself(make):
    _, params, bad, _ = _broken("logits")
    with clear_error(fk.NonFiniteError, "sequence 3", "1 of 5", "logits") as caught:
        make(_nan_after_nine)(params, bad)
    assert caught.value.row == 3


def test_a_token_that_the_model_masks_out_adds_nothing_to_an_entropy():
    _, params, _, batch = _broken("probability of zero")
    without = func.token_entropy(lambda p, ids, mask: p["table"][ids][..., [0, 1, 2, 3, 4, 5, 6, 7, 9]])
    torch.testing.assert_close(func.token_entropy(_never_eight)(params, batch), without(params, batch))


def test_contracting_a_row_that_is_not_finite_names_row_and_parameter():
    x = {"v": torch.ones(2, 1), "w": torch.tensor([[1.0, 2.0], [NAN, 1.0]])}
    with clear_error(fk.NonFiniteError, "sequence 1", "'w'") as caught:
        func.contract(x, {"v": torch.ones(1, 1), "w": torch.ones(1, 2)})
    assert (caught.value.row, caught.value.parameter) == (1, "w")


def test_an_overflow_of_finite_gradients_says_what_to_do():
    x = {"w": torch.full((1, 2), 1e30)}
    with clear_error(fk.NonFiniteError, "overflow", "float64"):
        func.contract(x, x)


@pytest.mark.parametrize(
    ("x", "y", "kind", "pieces"),
    [
        ({"w": (2, 3)}, {"v": (2, 3)}, fk.TreeError, ("'w'", "'v'", "lacks")),
        ({"w": (2, 3)}, {"w": (2, 4)}, fk.TreeError, ("'w'", "[3]", "[4]")),
        ({"w": (2, 3), "v": (1,)}, {"w": (2, 3), "v": (2,)}, fk.TreeError, ("x must hold per-sequence gradients",)),
        ({"w": (0, 3)}, {"w": (2, 3)}, fk.BatchError, ("x holds no rows", "at least one")),
        ({"w": (2, 3)}, {"w": (0, 3)}, fk.BatchError, ("y holds no rows", "at least one")),
    ],
)
def test_contraction_wants_rows_of_the_same_parameters(x, y, kind, pieces):
    trees = [{name: torch.ones(shape) for name, shape in side.items()} for side in (x, y)]
    with clear_error(kind, *pieces):
        func.contract(*trees)


# ------------------------------------------------------------------------------------------------- preconditioners

PRECONDITIONED: dict[str, Callable[..., Any]] = {
    "kernel": lambda p, P: fk.kernel(plain, p, vectors(), vectors(), P),
    "influence": lambda p, P: fk.influence(plain, p, vectors(), vectors(), P, _ones(vectors())),
}
preconditioned = pytest.mark.parametrize("entry", PRECONDITIONED)


@preconditioned
@pytest.mark.parametrize(
    ("make", "pieces"),
    [
        (lambda p: precond.diagonal({"w": p["w"]}), ("has 'b', which the preconditioner lacks",)),
        (lambda p: precond.diagonal({**p, "c": p["w"]}), ("lacks 'c', which the preconditioner has",)),
        (lambda p: precond.diagonal({**p, "w": p["w"][:2]}), ("'w'", "the preconditioner's has [2]")),
        (lambda p: precond.select(["w", "c"]), ("select names 'c'", "'w', 'b'")),
        (
            lambda p: precond.adamw_response(precond.adamw_init({"w": p["w"]}, lr=0.1), {"w": p["w"]}),
            ("has 'b', which the preconditioner lacks",),
        ),
    ],
    ids=["diagonal lacks a name", "diagonal has one too many", "shape", "select", "the optimizer lacks a name"],
)
def test_a_preconditioner_of_other_parameters_is_a_tree_error(params, entry, make, pieces):
    with clear_error(fk.TreeError, *pieces):
        PRECONDITIONED[entry](params, make(params))


@preconditioned
def test_a_preconditioner_that_loses_a_name_is_blamed_for_it(params, entry):
    with clear_error(fk.TreeError, "precond", "'b'"):
        PRECONDITIONED[entry](params, lambda x: {"w": x["w"]})


@preconditioned
def test_a_preconditioner_that_makes_nan_is_blamed_for_it(params, entry):
    with clear_error(fk.NonFiniteError, "precond", "'w'") as caught:
        PRECONDITIONED[entry](params, lambda x: {**x, "w": x["w"] * NAN})
    assert caught.value.parameter == "w"


def test_a_diagonal_must_be_finite():
    with clear_error(fk.NonFiniteError, "the diagonal['w'] holds 1 non-finite value(s) of 2"):
        precond.diagonal({"w": torch.tensor([1.0, math.inf])})


def test_selecting_nothing_is_a_tree_error():
    with clear_error(fk.TreeError, "no parameter name", "zero"):
        precond.select([])


# ------------------------------------------------------------------------------------------------ optimizer states


def state_of(params: dict[str, torch.Tensor], **changes: Any) -> precond.AdamWState:
    """A state after three steps, with some fields changed."""
    state = dataclasses.replace(
        precond.adamw_init(params, lr=0.1),
        step=dict.fromkeys(params, 3),
        exp_avg={name: 0.1 * leaf for name, leaf in params.items()},
        exp_avg_sq={name: leaf**2 for name, leaf in params.items()},
    )
    return dataclasses.replace(state, **changes)


def _moment(value: float, w: tuple[int, ...] = (3,)) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    filled = torch.ones(w, dtype=DTYPE)
    filled.view(-1)[1] = value
    return lambda p: {"w": filled, "b": torch.ones((), dtype=DTYPE)}


@pytest.mark.parametrize(
    ("field", "value", "pieces"),
    [
        ("exp_avg_sq", _moment(-1.5), ("exp_avg_sq['w'] is negative in 1 of 3", "-1.5", "mean of squares")),
        ("exp_avg_sq", _moment(NAN), ("exp_avg_sq['w'] holds 1 non-finite value(s) of 3", "earlier checkpoint")),
        ("exp_avg_sq", _moment(math.inf), ("exp_avg_sq['w'] holds 1 non-finite value(s) of 3",)),
        ("exp_avg", _moment(NAN), ("exp_avg['w'] holds 1 non-finite value(s) of 3",)),
        ("exp_avg_sq", _moment(1.0, (3, 1)), ("exp_avg_sq['w'] has shape [3, 1]", "exp_avg['w'] has [3]")),
        ("exp_avg_sq", lambda p: {"w": p["w"] ** 2}, ("exp_avg_sq lacks 'b'", "exp_avg has")),
        ("exp_avg_sq", lambda p: {**_moment(1.0)(p), "c": p["b"]}, ("exp_avg_sq has 'c'", "exp_avg lacks")),
        ("lr", lambda p: {"w": 0.1}, ("lr lacks 'b'",)),
        ("step", lambda p: {"w": 1, "b": 1, "c": 1}, ("step has 'c'",)),
        ("step", lambda p: {"w": -1, "b": 1}, ("step['w'] is -1", "0 or more")),
        ("lr", lambda p: {"w": -0.1, "b": 0.1}, ("lr['w'] is -0.1", "0.0 ≤ lr")),
        ("lr", lambda p: {"w": NAN, "b": 0.1}, ("lr['w'] is nan",)),
        ("beta1", lambda p: {"w": 0.9, "b": 1.0}, ("beta1['b'] is 1.0", "beta1 < 1.0")),
        ("beta2", lambda p: {"w": 0.9, "b": 1.5}, ("beta2['b'] is 1.5", "beta2 < 1.0")),
        ("eps", lambda p: {"w": 1e-8, "b": -1e-8}, ("eps['b'] is -1e-08", "0.0 ≤ eps")),
        ("weight_decay", lambda p: {"w": 0.0, "b": math.inf}, ("weight_decay['b'] is inf",)),
    ],
)
def test_an_impossible_optimizer_state_is_refused_when_it_is_made(params, field, value, pieces):
    with clear_error(fk.OptimizerStateError, *pieces):
        state_of(params, **{field: value(params)})


def test_the_frozen_form_has_no_second_moment_at_step_0(params):
    with clear_error(fk.OptimizerStateError, "'w' is at step 0", "grads=", "after the first step"):
        precond.adam(precond.adamw_init(params, lr=0.1))


def test_the_step_0_of_a_single_parameter_is_named(params):
    with clear_error(fk.OptimizerStateError, "'b' is at step 0"):
        precond.adam(state_of(params, step={"w": 4, "b": 0}))


@pytest.mark.parametrize(
    "make",
    [
        lambda state, g: precond.adam(state),
        lambda state, g: precond.adam(state, g),
        lambda state, g: precond.adamw_response(state, g, unseen="error"),
    ],
    ids=["frozen", "post-step", "response"],
)
def test_unseen_coordinates_are_counted_and_named(params, make):
    params["v"] = torch.zeros(4, dtype=DTYPE)
    params["w"][1] = 0.0
    unseen = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
    with clear_error(
        fk.OptimizerStateError, "5 of 8 coordinates", "2 parameter(s)", "w: 1", "v: 4", "unseen='zero'", "unseen='eps'"
    ):
        make(state_of(params), unseen)


def test_unseen_coordinates_are_left_out_or_taken_as_the_optimizer_does_when_asked(params):
    params["w"][1] = 0.0
    ones = {name: torch.ones_like(leaf) for name, leaf in params.items()}
    assert precond.adam(state_of(params), unseen="zero")(ones)["w"][1] == 0.0
    assert precond.adam(state_of(params), unseen="eps")(ones)["w"][1] == pytest.approx(1e8)


def test_an_unknown_policy_for_unseen_coordinates_is_an_error(params):
    policy: Any = "ignore"
    with pytest.raises(Exception, match="unseen"):
        precond.adam(state_of(params), unseen=policy)


@pytest.mark.parametrize(
    ("change", "kind", "pieces"),
    [
        (lambda g: {"w": g["w"]}, fk.TreeError, ("grads lacks 'b'", "the optimizer state has")),
        (lambda g: {**g, "c": g["b"]}, fk.TreeError, ("grads has 'c'", "the optimizer state lacks")),
        (lambda g: {**g, "w": g["w"][:2]}, fk.TreeError, ("grads['w'] has shape [2]", "[3]")),
        (lambda g: {**g, "w": g["w"] * NAN}, fk.NonFiniteError, ("grads['w'] holds 3 non-finite value(s) of 3",)),
    ],
    ids=["lacks", "has", "shape", "not finite"],
)
@pytest.mark.parametrize(
    "use",
    [
        lambda p, g, s: precond.adam(s, g),
        lambda p, g, s: precond.adamw_response(s, g),
        lambda p, g, s: precond.adamw_step(p, g, s),
    ],
    ids=["adam", "adamw_response", "adamw_step"],
)
def test_gradients_must_be_those_of_the_optimizer_s_parameters(params, use, change, kind, pieces):
    with clear_error(kind, *pieces):
        use(params, change(params), state_of(params))


@pytest.mark.parametrize(
    ("change", "kind", "pieces"),
    [
        (lambda p: {"w": p["w"]}, fk.TreeError, ("params lacks 'b'", "the optimizer state has")),
        (lambda p: {**p, "c": p["b"]}, fk.TreeError, ("params has 'c'", "the optimizer state lacks")),
        (lambda p: {**p, "w": p["w"][:, None]}, fk.TreeError, ("params['w'] has shape [3, 1]", "[3]", "transposed")),
        (lambda p: {**p, "w": p["w"] * NAN}, fk.NonFiniteError, ("params['w'] holds 3",)),
    ],
    ids=["lacks", "has", "shape", "not finite"],
)
def test_parameters_of_a_step_must_be_the_optimizer_s(params, change, kind, pieces):
    with clear_error(kind, *pieces):
        precond.adamw_step(change(params), {**params}, state_of(params))


def test_a_step_explained_with_a_foreign_state_is_a_tree_error(params):
    state = state_of({"w": params["w"]})
    with clear_error(fk.TreeError, "params has 'b'", "the optimizer state lacks"):
        fk.explain_step(plain, params, vectors(), vectors(), _ones(vectors()), state)


def test_an_epsilon_of_zero_never_divides_by_zero_silently(params):
    zeros: dict[str, torch.Tensor | None] = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
    with clear_error(fk.FKernelError, "eps"):
        precond.adamw_step(params, zeros, precond.adamw_init(params, lr=0.1, eps=0.0))


def test_a_parameter_without_gradient_is_left_alone_as_torch_does(params):
    parameters = {name: nn.Parameter(leaf.clone()) for name, leaf in params.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, weight_decay=0.2)
    for value in (0.3, -0.7):
        for parameter in parameters.values():
            parameter.grad = torch.full_like(parameter, value)
        optimizer.step()
    history = {name: optimizer.state[parameter] for name, parameter in parameters.items()}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    state = state_of(
        before,
        step={name: int(each["step"]) for name, each in history.items()},
        exp_avg={name: each["exp_avg"].clone() for name, each in history.items()},
        exp_avg_sq={name: each["exp_avg_sq"].clone() for name, each in history.items()},
        weight_decay=dict.fromkeys(before, 0.2),
    )
    gradient = torch.tensor([1.0, -2.0, 0.5], dtype=DTYPE)
    step = precond.adamw_step(before, {"w": gradient, "b": None}, state)

    parameters["w"].grad, parameters["b"].grad = gradient, None
    optimizer.step()
    torch.testing.assert_close(before["w"] + step.total["w"], parameters["w"].detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(parameters["b"].detach(), before["b"])
    assert all(float(part["b"]) == 0.0 for part in step)
    assert float(precond.adamw_response(state, {"w": gradient, "b": None})(before)["b"]) == 0.0


@pytest.mark.parametrize("max_norm", [0.0, -1.0, NAN, -math.inf])
def test_a_clipping_threshold_must_be_positive(params, max_norm):
    with clear_error(fk.OptimizerStateError, f"max_norm is {max_norm}", "positive", "None for no clipping"):
        precond.clip_factor(params, max_norm)
    with clear_error(fk.OptimizerStateError, f"max_norm is {max_norm}", "None for no clipping"):
        _explain(plain, params, vectors(), vectors(), max_norm=max_norm)


@pytest.mark.parametrize("value", [NAN, math.inf])
def test_a_gradient_that_is_not_finite_has_no_clipping_factor(value):
    with clear_error(fk.NonFiniteError, "'w'"):
        precond.clip_factor({"w": torch.tensor([1.0, value])}, 1.0)


# ---------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("entry", ["kernel", "influence", "explain_step"])
@pytest.mark.parametrize("memory", ["lots", "8 parsecs", "-1GB", -1, ""])
def test_memory_must_be_a_size(params, entry, memory):
    with clear_error(fk.BatchError, f"memory is {memory!r}", "bytes", "8GiB"):
        _with_memory(entry, params, memory)


def _with_memory(entry: str, params: dict[str, torch.Tensor], memory: int | str) -> Any:
    x = vectors()
    if entry == "kernel":
        return fk.kernel(plain, params, x, x, precond.identity(), memory=memory, microbatch=1)
    if entry == "influence":
        return fk.influence(plain, params, x, x, precond.identity(), _ones(x), memory=memory, microbatch=1)
    return _explain(plain, params, x, x, memory=memory, microbatch=1)


@pytest.mark.parametrize("entry", ["kernel", "influence", "explain_step"])
def test_too_little_memory_says_how_much_would_do(params, entry):
    """What the message asks for is enough, and 2 % less is not."""
    with clear_error(fk.BatchError, "memory=7", "4 parameters", "at least") as caught:
        _with_memory(entry, params, 7)
    needed = int(str(caught.value).split("at least ")[1].split(" bytes")[0])
    assert _with_memory(entry, params, needed) is not None
    with pytest.raises(fk.BatchError):
        _with_memory(entry, params, int(0.98 * needed))


def test_too_little_memory_for_influence_is_not_answered_by_advice_to_use_influence(params):
    with pytest.raises(fk.BatchError) as caught:
        _with_memory("influence", params, 50)
    assert "influence() needs no gradient rows" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ models


def test_a_frozen_model_has_nothing_to_differentiate(gpt2):
    frozen = copy.deepcopy(gpt2).requires_grad_(False)
    with clear_error(fk.ModelError, "None of the model's", "requires a gradient", "requires_grad_(True)", "select="):
        func.make_functional(frozen)
    _, chosen = func.make_functional(frozen, select=["transformer.ln_f.weight"])
    assert list(chosen) == ["transformer.ln_f.weight"]


@pytest.mark.parametrize(
    ("select", "pieces"),
    [
        (["transformer.ln_f.weight", "ln_g"], ("select names 'ln_g'", "the model has 'transformer.wte.weight'")),
        (["lm_head.weight"], ("select names 'lm_head.weight'", "tied weight goes by the first of its names")),
        ([], ("no parameter", "the model has")),
        (lambda name: "adapter" in name, ("accepted none of the", "'transformer.wte.weight'")),
    ],
    ids=["unknown", "the second name of a tie", "nothing", "a predicate that accepts nothing"],
)
def test_selected_names_must_be_the_model_s(gpt2, select, pieces):
    with clear_error(fk.ModelError, *pieces):
        func.make_functional(gpt2, select=select)


def test_parameters_on_the_meta_device_hold_no_values(gpt2):
    with torch.device("meta"):
        model = GPT2LMHeadModel(copy.deepcopy(gpt2.config))
    with clear_error(fk.ModelError, "'transformer.wte.weight'", "meta device", "load the weights"):
        func.make_functional(model)


def test_frozen_parameters_on_the_meta_device_are_found_too(gpt2):
    model = copy.deepcopy(gpt2)
    model.transformer.h[0].to("meta")
    with clear_error(fk.ModelError, "transformer.h.0", "meta device"):
        func.make_functional(model, select=["transformer.ln_f.weight"])


# ------------------------------------------------------------------------------------------------------- padding id

PADDING_ID = 10


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=PADDING_ID,
    )
    return LlamaForCausalLM(config).double()


@everywhere
def test_a_padding_id_inside_of_a_sequence_warns(llama, entry):
    apply, params = func.make_functional(llama)
    inside = _set(sequences(), "input_ids", 1, 1, PADDING_ID)
    with pytest.warns(UserWarning, match=rf"1 sequence.*padding id {PADDING_ID} inside.*padding_idx"):
        ENTRIES[entry](func.sequence_logprob(apply), params, inside, sequences())


@everywhere
def test_padding_after_a_sequence_and_an_eos_that_doubles_as_padding_do_not_warn(llama, entry):
    apply, params = func.make_functional(llama)
    fine = func.pad([[1, 2], [3]], [[6, 7, PADDING_ID], [9, PADDING_ID]], pad_id=PADDING_ID)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ENTRIES[entry](func.sequence_logprob(apply), params, fine, fine)


def test_a_padding_id_does_not_warn_where_the_embedding_is_not_differentiated(llama):
    apply, params = func.make_functional(llama, select=["model.norm.weight"])
    inside = _set(sequences(), "input_ids", 1, 1, PADDING_ID)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        func.per_sequence_grad(func.sequence_logprob(apply))(params, inside)
