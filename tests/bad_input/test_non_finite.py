"""NaN and infinity are named by sequence and parameter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import fkernel as fk
from fkernel import func, precond
from tests.bad_input.common import BATCHED, DTYPE, ENTRIES, NAN, TRANSFORMS, _set, clear_error, vectors


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
