"""What a training script has at hand, given where a state or a gradient is expected, says how to make what is."""

from __future__ import annotations

from typing import Any

import jaxtyping
import pytest
import torch

import fkernel as fk
from fkernel import checkpoint, precond
from fkernel.precond import updates

NET = torch.nn.Linear(2, 1)


def f(params: Any, x: torch.Tensor) -> torch.Tensor:
    """A score of each row."""
    return x @ params["weight"][0] + params["bias"]


@pytest.fixture(autouse=True)
def _as_users_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Annotations are executed in tests alone, and would refuse before the library does."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


PARAMS = {name: leaf.detach() for name, leaf in NET.named_parameters()}
GRADS = {name: torch.ones_like(leaf) for name, leaf in PARAMS.items()}
WHICH = ["identity", "post-step", "adamw", "muon"]
STATE = precond.adamw_init(PARAMS, lr=0.1)
TAKE_STATE: dict[str, Any] = {
    "adam": lambda state: precond.adam(state),
    "adam, post-step": lambda state: precond.adam(state, {**GRADS}),
    "adamw_response": lambda state: precond.adamw_response(state, {**GRADS}),
    "adamw_step": lambda state: precond.adamw_step(PARAMS, {**GRADS}, state),
    "gradient_rates": precond.gradient_rates,
    "alternatives": lambda state: precond.alternatives(PARAMS, GRADS, state, which=WHICH),
    "secant": lambda state: precond.secant(updates.adamw, GRADS, state),
    "explain_step": lambda state: fk.explain_step(f, PARAMS, torch.eye(2), torch.eye(2), torch.ones(2), state),
}
TAKE_GRADS: dict[str, Any] = {
    "adam": lambda grads: precond.adam(STATE, grads),
    "adamw_response": lambda grads: precond.adamw_response(STATE, grads),
    "adamw_step": lambda grads: precond.adamw_step(PARAMS, grads, STATE),
    "alternatives": lambda grads: precond.alternatives(PARAMS, grads, STATE, which=WHICH),
    "clip_factor": lambda grads: precond.clip_factor(grads, 1.0),
    "diagonal": precond.diagonal,
    "a diagonal's argument": lambda grads: precond.diagonal(PARAMS)(grads),
    "identity's argument": lambda grads: precond.identity()(grads),
    "select's argument": lambda grads: precond.select(["weight"])(grads),
    "secant": lambda grads: precond.secant(updates.adamw, grads, STATE),
    "broyden": lambda grads: precond.broyden(updates.adamw, grads, STATE),
    "linearized": lambda grads: precond.linearized(updates.adamw, grads, STATE),
}


@pytest.mark.parametrize("entry", TAKE_STATE)
@pytest.mark.parametrize("given", ["optimizer", "state_dict", "tuple", "None"])
def test_a_state_of_torchs_says_how_to_make_ours(entry, given):
    optimizer = torch.optim.AdamW(NET.named_parameters(), lr=0.1)
    wrong = {"optimizer": optimizer, "state_dict": optimizer.state_dict(), "tuple": (GRADS, 1.0, 1.0), "None": None}
    with pytest.raises(fk.OptimizerStateError, match=r"expected an AdamWState.*adamw_state\(") as caught:
        TAKE_STATE[entry](wrong[given])
    if given == "optimizer":
        assert "is a torch.optim.AdamW" in str(caught.value)
        made = checkpoint.adamw_state(optimizer.state_dict(), dict(NET.named_parameters()), model=NET)  # as it says
        if entry != "adam":  # the frozen form has nothing to divide by before the first step
            TAKE_STATE[entry](made)


@pytest.mark.parametrize("entry", TAKE_GRADS)
def test_the_tuple_of_loss_gradient_says_which_part_is_meant(entry):
    given = fk.loss_gradient(f, PARAMS, torch.eye(2), torch.ones(2))
    with pytest.raises(
        fk.TreeError, match=r"is a tuple of 3; expected \{name: tensor\}.*g, clip, norm = loss_gradient"
    ):
        TAKE_GRADS[entry](given)
    TAKE_GRADS[entry](given[0])
    with pytest.raises(fk.TreeError, match="give one of its parts, batch, momentum, decay"):
        TAKE_GRADS[entry](precond.adamw_step(PARAMS, {**given[0]}, STATE))
    with pytest.raises(fk.TreeError, match=r"is a Linear; expected .* dict\(model\.named_parameters\(\)\)"):
        TAKE_GRADS[entry](NET)


def test_parameters_and_numbers_that_are_none():
    with pytest.raises(fk.TreeError, match="params is a generator"):
        precond.adamw_init(NET.parameters(), lr=0.1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(fk.TreeError, match="params is a Linear"):
        precond.adamw_step(NET, {**GRADS}, STATE)  # pyright: ignore[reportArgumentType]
    with pytest.raises(fk.OptimizerStateError, match=r"step is a int; expected \{name: …\}"):
        precond.AdamWState(**{**vars(STATE), "step": 3})


@pytest.mark.parametrize("name", ["rmsprop", "adafactor", "lion", "muon"])
def test_other_optimizers_states_are_told_as_well(name):
    with pytest.raises(fk.OptimizerStateError, match=r"is a AdamW; expected fkernel\.precond\.updates\.\w+State"):
        getattr(updates, name)(GRADS, torch.optim.AdamW(NET.parameters()))


def test_a_model_in_the_place_of_its_parameters_is_named():
    state: Any = torch.optim.AdamW(NET.named_parameters()).state_dict()
    with pytest.raises(fk.TreeError, match=r"params is a Linear; expected \{name: tensor\}"):
        checkpoint.optimizer_state(state, NET)  # pyright: ignore[reportArgumentType]
