"""The executed step is the real optimizer's, bit for bit, in the dtypes that it trained in."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import Adafactor

import fkernel as fk
from fkernel import precond
from fkernel.checkpoint import optimizer_state, stored_optimizer_state
from tests.optimizers.real import LARGE, LIKELY, TORCH, drawn, taken

HALF: dict[str, Any] = {
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW, fused": (torch.optim.AdamW, {"fused": True}),
    "AdamW, amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "Adam, L2": (torch.optim.Adam, {}),
    "NAdam": (torch.optim.NAdam, {}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "Adafactor": (torch.optim.Adafactor, {}),
    "transformers' Adafactor": (Adafactor, {"relative_step": False, "scale_parameter": False}),
}


def same(one: Any, other: Any) -> None:
    for name, leaf in other.items():
        assert torch.equal(one[name], leaf.to(one[name])), name


@pytest.mark.parametrize("name", HALF)
def test_in_bfloat16_it_is_the_real_step_bit_for_bit(name):
    make, options = HALF[name]
    step = taken(make, {**LIKELY, **options}, LARGE, torch.bfloat16)
    stored = stored_optimizer_state(step.state_dict, step.before)
    executed = precond.executed_step(step.before, {**step.grads}, stored)
    same(executed.delta, step.delta)
    share = sum(int((leaf != 0).sum()) for leaf in step.delta.values()) / sum(g.numel() for g in step.grads.values())
    assert executed.moved == pytest.approx(share)
    assert 0 < share < 1
    state = optimizer_state(step.state_dict, step.before)  # means the same, in float32
    whole = {n: leaf.float() for n, leaf in step.before.items()}
    exact = precond.optimizer_step(whole, {n: g.float() for n, g in step.grads.items()}, state).total
    assert all(leaf.dtype == torch.float32 for leaf in exact.values())
    apart = max(float((executed.delta[n] - leaf).abs().max() / leaf.abs().max()) for n, leaf in exact.items())
    assert apart > 0.1  # which is what arithmetic did


@pytest.mark.parametrize("name", TORCH)
def test_in_float64_it_is_the_exact_step(name):
    make, options, shapes = TORCH[name]
    step = taken(make, options, shapes)
    executed = precond.executed_step(step.before, {**step.grads}, stored_optimizer_state(step.state_dict, step.before))
    same(executed.delta, step.delta)
    assert executed.moved == 1.0


@pytest.mark.parametrize("kind", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit", "AdamW", "Lion"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitsandbytes_decodes_steps_and_codes_again(kind, dtype):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # paged states are plain ones on a CPU
        step = taken(getattr(bitsandbytes.optim, kind), LIKELY, LARGE, dtype)
    stored = stored_optimizer_state(step.state_dict, step.before)
    assert {*stored.writers.values()} == {f"bitsandbytes.optim.{'Lion' if 'Lion' in kind else 'AdamW'}"}
    assert ("uint8" in stored.dtypes["w"]) == ("8bit" in kind)
    executed = precond.executed_step(step.before, {**step.grads}, stored)
    for name, leaf in step.delta.items():
        torch.testing.assert_close(executed.delta[name], leaf.float(), rtol=0, atol=1e-7)
    if "8bit" in kind:
        same(executed.delta, step.delta)
        assert not torch.equal(executed.entries["w"]["state1"], stored.entries["w"]["state1"])


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW4bit"])
def test_torchao_does_too(kind):
    optim = pytest.importorskip("torchao.optim")
    step = taken(getattr(optim, kind), {**LIKELY, "lr": torch.tensor(1e-3)}, LARGE, torch.bfloat16)
    stored = stored_optimizer_state(step.state_dict, step.before, decoupled=True)
    assert stored.writers["w"] == f"torchao.optim.{kind}"
    same(precond.executed_step(step.before, {**step.grads}, stored).delta, step.delta)


def test_adafactors_least_root_is_that_of_the_dtype_it_stepped_in():
    """torch takes ε₁ = 2⁻⁷ in bfloat16, where none is given: the rule that was executed, in real numbers."""
    step = taken(torch.optim.Adafactor, LIKELY, LARGE, torch.bfloat16)
    state: Any = optimizer_state(step.state_dict, {n: leaf.float() for n, leaf in step.before.items()})
    assert state.eps1 == dict.fromkeys(LARGE, 2.0**-7)
    assert {leaf.dtype for leaf in state.row_var.values()} == {torch.float32}


def test_nothing_that_is_given_is_changed():
    step = taken(torch.optim.AdamW, LIKELY, LARGE, torch.bfloat16)
    stored = stored_optimizer_state(step.state_dict, step.before)
    moments = {n: entry["exp_avg"].clone() for n, entry in stored.entries.items()}
    before = {n: leaf.clone() for n, leaf in step.before.items()}
    precond.executed_step(step.before, {**step.grads}, stored)
    same({n: entry["exp_avg"] for n, entry in stored.entries.items()}, moments)
    same(step.before, before)
    assert all(int(entry["step"]) == 4 for entry in stored.entries.values())


def test_float32_masters_are_stepped_and_rounded():
    """Of a step that bfloat16 would lose whole."""
    step = taken(torch.optim.AdamW, {**LIKELY, "lr": 1e-5}, LARGE, torch.float32)
    masters = step.before
    weights = {n: leaf.bfloat16() for n, leaf in masters.items()}
    for number, name in enumerate(("w", "b", "v")):
        step.state_dict["state"][number]["master_param"] = masters[name]
    stored = stored_optimizer_state(step.state_dict, weights)
    assert [*stored.masters] == ["w", "b", "v"]
    executed = precond.executed_step(weights, {**step.grads}, stored)
    for n, leaf in executed.delta.items():
        after = (masters[n] + step.delta[n].float()).bfloat16()
        torch.testing.assert_close(leaf, after.float() - weights[n].float())
    assert 0 < executed.moved < 0.1
    other = {n: leaf + 0.1 for n, leaf in weights.items()}
    with pytest.raises(fk.OptimizerStateError, match=r"master weights of 'w' are not those .*: \d+ of 5120"):
        stored_optimizer_state(step.state_dict, other)


def test_a_state_in_real_numbers_is_stepped_by_its_usual_class():
    params = drawn(0, LARGE, torch.bfloat16)
    state = precond.fresh_state("adam", params, lr=1e-3, amsgrad=True, betas=(0.8, 0.99))
    executed = precond.executed_step(params, {**params}, state)
    leaves = {n: torch.nn.Parameter(leaf.clone()) for n, leaf in params.items()}
    optimizer = torch.optim.Adam([*leaves.values()], lr=1e-3, amsgrad=True, betas=(0.8, 0.99))
    for n, leaf in leaves.items():
        leaf.grad = params[n].clone()
    optimizer.step()
    same(executed.delta, {n: leaf.detach().float() - params[n].float() for n, leaf in leaves.items()})
    still = precond.executed_step(params, dict.fromkeys(params), state)
    assert still.moved == 0.0


def test_some_parameters_alone_are_executed_as_among_all():
    step = taken(torch.optim.AdamW, LIKELY, LARGE, torch.bfloat16)
    stored = stored_optimizer_state(step.state_dict, step.before).restricted(["v"])
    same(precond.executed_step({"v": step.before["v"]}, {"v": step.grads["v"]}, stored).delta, {"v": step.delta["v"]})


def test_what_cannot_be_executed_is_said():
    step = taken(torch.optim.AdamW, LIKELY, LARGE, torch.bfloat16)
    stored = stored_optimizer_state(step.state_dict, step.before)
    grads: precond.Grads = {**step.grads}

    def with_(**changes: Any) -> precond.StoredState:
        return precond.StoredState(**{**vars(stored), **changes})

    rounding = {n: {**group, "bf16_stochastic_round": True} for n, group in stored.groups.items()}
    with pytest.raises(fk.OptimizerStateError, match=r"AdamW rounds stochastically \(bf16_stochastic_round=True\)"):
        precond.executed_step(step.before, grads, with_(groups=rounding))
    with pytest.raises(fk.OptimizerStateError, match=r"The optimizer is no\.such\.Thing, and no is not installed"):
        precond.executed_step(step.before, grads, with_(writers=dict.fromkeys(step.before, "no.such.Thing")))
    with pytest.raises(fk.OptimizerStateError, match=r"torch.optim.AdamW could not step 'w': .*loaded.stored"):
        precond.executed_step(step.before, grads, optimizer_state(step.state_dict, step.before))  # moments in float32
    with pytest.raises(fk.TreeError, match="'other'"):
        precond.executed_step({**step.before, "other": step.before["w"]}, grads, stored)
    with pytest.raises(fk.NonFiniteError):
        precond.executed_step(step.before, {**grads, "b": torch.full((5,), float("nan"))}, stored)
