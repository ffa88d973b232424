"""Memory, models and padding ids."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fkernel as fk
from fkernel import func, precond
from tests.bad_input.common import (
    ENTRIES,
    VOCABULARY,
    _explain,
    _ones,
    _set,
    clear_error,
    everywhere,
    plain,
    sequences,
    vectors,
)


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
    apply, params = func.make_functional(model)
    batch = func.pad([[1]], [[2]])
    with clear_error(fk.ModelError, "'transformer.wte.weight'", "meta device", "load the weights", "mesh="):
        func.vjp(func.sequence_logprob(apply))(params, batch, torch.ones(1))


def test_frozen_parameters_on_the_meta_device_are_found_too(gpt2):
    model = copy.deepcopy(gpt2)
    model.transformer.h[0].to("meta")
    apply, params = func.make_functional(model, select=["transformer.ln_f.weight"])
    with clear_error(fk.ModelError, "transformer.h.0", "meta device"):
        func.vjp(func.sequence_logprob(apply))(params, func.pad([[1]], [[2]]), torch.ones(1))


def test_buffers_on_the_meta_device_are_in_no_checkpoint(llama):
    model = copy.deepcopy(llama)
    model.model.rotary_emb.to("meta")
    apply, params = func.make_functional(model)
    with clear_error(fk.ModelError, "rotary_emb.inv_freq", "meta device", "without_weights"):
        func.vjp(func.sequence_logprob(apply))(params, func.pad([[1]], [[2]]), torch.ones(1))


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
