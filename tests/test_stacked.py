"""What is computed a microbatch at a time is computed once, and its rows and columns stay where they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fkernel import func
from fkernel.func.inputs.microbatch import stacked

# Lengths 4, 7, 3, 7, 5: the longest are neither first nor together.
BATCH = func.pad([[5, 6], [7, 8, 9], [4], [1, 2, 3], [3, 3]], [[1, 1], [2, 2, 2, 1], [6, 1], [5, 4, 3, 1], [9, 8, 1]])


def of_tokens(params: Any, batch: Any) -> torch.Tensor:
    """[n t] a number of every token, padding included."""
    return params["w"] * batch.input_ids + 100 * batch.response_mask


@pytest.mark.parametrize("own_width", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, None])
def test_every_sequence_is_computed_once(size, own_width):
    seen = list[int]()

    def counted(params, batch):
        seen.append(len(batch.input_ids))
        return of_tokens(params, batch), batch.input_ids.sum(1)

    params = {"w": torch.tensor(2.0)}
    values, sums = stacked(counted, size, own_width)(params, BATCH)
    assert sum(seen) == 5, seen
    torch.testing.assert_close(values, of_tokens(params, BATCH))
    torch.testing.assert_close(sums, BATCH.input_ids.sum(1))
    assert size is None or max(seen) <= size or own_width


@pytest.mark.parametrize("size", [2, None])
def test_padding_that_all_sequences_share_keeps_its_columns(size):
    """The first microbatch was cut narrower than the batch: it alone is computed again."""
    wide = func.Sequences(*(torch.nn.functional.pad(leaf, (0, 3)) for leaf in BATCH))
    params = {"w": torch.tensor(2.0)}
    rows = stacked(lambda params, batch: of_tokens(params, batch) + 1.0, size)(params, wide)
    torch.testing.assert_close(rows, of_tokens(params, wide) + 1.0)


def test_a_public_function_of_tokens_runs_once_a_microbatch():
    calls = list[int]()

    def logprobs(params, batch):
        calls.append(len(batch.input_ids))
        return params["w"] * batch.input_ids

    found = func.evaluate(logprobs, 2)({"w": torch.tensor(2.0)}, BATCH)
    torch.testing.assert_close(found, 2.0 * BATCH.input_ids)
    calls.clear()
    func.evaluate(logprobs, 2)({"w": torch.tensor(3.0)}, BATCH)  # certified before: what is left are the microbatches
    assert sum(calls) == 5, calls
