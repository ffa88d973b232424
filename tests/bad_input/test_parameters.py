"""Parameters and directions that cannot be computed with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fkernel as fk
from fkernel import func, precond
from tests.bad_input.common import DTYPE, ENTRIES, NAN, clear_error, everywhere, plain, vectors


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
