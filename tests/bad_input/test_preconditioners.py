"""Preconditioners and optimizer states that cannot be."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fkernel as fk
from fkernel import precond
from tests.bad_input.common import DTYPE, NAN, _explain, _ones, clear_error, plain, vectors

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
