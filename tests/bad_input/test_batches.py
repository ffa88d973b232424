"""Batches that cannot be computed with."""

from __future__ import annotations

import pytest
import torch

import fkernel as fk
from fkernel import func
from tests.bad_input.common import (
    BAD_BATCHES,
    BATCHED,
    DTYPE,
    ENTRIES,
    _set,
    clear_error,
    everywhere,
    plain,
    sequences,
    vectors,
)


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
