"""Whose state is it, and how many steps did it take: the next step is reproduced, or the state is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fkernel as fk
from fkernel.checkpoint import adamw_state
from fkernel.checkpoint.recognising import recognise


def network() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)).double()


def closure(model: Any, optimizer: torch.optim.Optimizer):
    def loss():
        optimizer.zero_grad()
        value = model(torch.arange(15, dtype=torch.float64).reshape(5, 3).sin()).square().sum()
        value.backward()
        return value

    return loss


def stepped(make: Any, steps: int = 5) -> tuple[Any, torch.optim.Optimizer]:
    model = network()
    optimizer = make(model.parameters())
    for _ in range(steps):
        optimizer.step(closure(model, optimizer))
    return model, optimizer


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def relative_error(state_dict: Any, **options: Any) -> float:
    """How far a step from `state_dict`, as it was edited, is from the next one of the AdamW that wrote it."""
    model, optimizer = stepped(adamw)
    params = {name: leaf.detach().clone() for name, leaf in model.named_parameters()}
    state = adamw_state(state_dict, params, model=model, **options)
    closure(model, optimizer)()
    grads = {name: leaf.grad.clone() for name, leaf in model.named_parameters()}
    optimizer.step()
    step = fk.precond.adamw_step(params, grads, state).total
    taken = torch.cat([(leaf.detach() - params[name]).flatten() for name, leaf in model.named_parameters()])
    return float((torch.cat([leaf.flatten() for leaf in step.values()]) - taken).norm() / taken.norm())


def saved() -> Any:
    return copy.deepcopy(stepped(adamw)[1].state_dict())


def fused(state_dict: Any) -> Any:
    """Group and states as apex's and DeepSpeed's fused Adam name them."""
    for group in state_dict["param_groups"]:
        for key in ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"):
            del group[key]
        del group["decoupled_weight_decay"]
        group["bias_correction"] = True
    return state_dict


# ---------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("step", [5, torch.tensor(5), torch.tensor([5.0])])
def test_the_groups_step_counts_where_the_states_have_none(step):
    state_dict = fused(saved())
    for entry in state_dict["state"].values():
        del entry["step"]
    state_dict["param_groups"][0]["step"] = step
    assert relative_error(state_dict, decoupled=True) < 1e-12


def test_the_groups_step_counts_in_a_group_of_torch_too():
    state_dict = saved()
    for entry in state_dict["state"].values():
        del entry["step"]
    state_dict["param_groups"][0]["step"] = 5
    assert relative_error(state_dict) < 1e-12


def test_a_fused_adam_whose_last_parameter_alone_counts():
    """DeepSpeed's FusedAdam outside ZeRO advances the step of a group's last parameter."""
    state_dict = fused(saved())
    for index in list(state_dict["state"])[:-1]:
        state_dict["state"][index]["step"] = 0
    assert relative_error(state_dict, decoupled=True) < 1e-12


@pytest.mark.parametrize("step", ["none", 0, torch.tensor(0.0)])
def test_moments_without_a_step_are_never_of_step_zero(step):
    state_dict = saved()
    for entry in state_dict["state"].values():
        del entry["step"]
        if step != "none":
            entry["step"] = step
    expected = "no step, neither its own nor its group's" if isinstance(step, str) else "step 0"
    with pytest.raises(fk.OptimizerStateError, match=rf"has moments and tells {expected}.*Add it to the parameter gr"):
        relative_error(state_dict)


@pytest.mark.parametrize("steps", [(4, 5), (5, 5)])
def test_steps_that_disagree_are_refused(steps):
    state_dict = fused(saved())
    state_dict["state"][0]["step"] = steps[0]
    state_dict["param_groups"][0]["step"] = steps[1] if steps[0] == 4 else 7
    with pytest.raises(fk.OptimizerStateError, match=r"disagree within one parameter group: \[.*, .*\]"):
        relative_error(state_dict, decoupled=True)


def test_a_group_of_torch_may_not_disagree_with_its_states():
    state_dict = saved()
    state_dict["param_groups"][0]["step"] = 6
    with pytest.raises(fk.OptimizerStateError, match=r"disagree within one parameter group: \[5, 6\]"):
        relative_error(state_dict)


def test_parameters_of_torchs_adamw_may_have_taken_different_steps():
    state_dict = saved()
    state_dict["state"][0]["step"] = torch.tensor(3.0)
    params = dict(network().named_parameters())
    assert adamw_state(state_dict, params, model=network()).step == {
        "0.weight": 3, "0.bias": 5, "1.weight": 5, "1.bias": 5,
    }  # fmt: skip


@pytest.mark.parametrize("step", [2.5, -1, float("nan"), "five", torch.ones(3)])
def test_a_step_is_a_whole_number(step):
    state_dict = saved()
    state_dict["state"][1]["step"] = step
    with pytest.raises(fk.OptimizerStateError, match=r"The step of '0.bias' is .*expected a whole number"):
        relative_error(state_dict)


def test_moments_of_zero_may_be_of_step_zero():
    """As torch.distributed.checkpoint initialises them."""
    state_dict = saved()
    for entry in state_dict["state"].values():
        entry.update(step=torch.tensor(0.0), exp_avg=entry["exp_avg"] * 0, exp_avg_sq=entry["exp_avg_sq"] * 0)
    params = dict(network().named_parameters())
    assert {*adamw_state(state_dict, params, model=network()).step.values()} == {0}


# -------------------------------------------------------------------------------------------------- torch's optimizers

WHOSE = {
    "ASGD": "ASGD's",
    "Adadelta": "Adadelta's",
    "Adamax": "Adamax's",
    "LBFGS": "LBFGS's",
    "Rprop": "Rprop's",
}
TAKEN = {
    "Adafactor": "adafactor",
    "Adagrad": "adagrad",
    "Muon": "muon",
    "NAdam": "nadam",
    "RAdam": "radam",
    "RMSprop": "rmsprop",
    "SGD": "sgd",
}
"""{torch's name: ours}."""
OTHERS = [
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    if name not in ("Optimizer", "Adam", "AdamW", "SparseAdam")
]


@pytest.mark.parametrize("fresh", [False, True], ids=["stepped", "fresh"])
@pytest.mark.parametrize("name", OTHERS)
def test_every_other_optimizer_of_torch_is_taken_or_refused_by_its_name(name, fresh):
    def make(parameters):
        matrices = [leaf for leaf in parameters if leaf.ndim == 2]
        return getattr(torch.optim, name)(matrices, lr=1e-3)

    model, optimizer = stepped(make, steps=0 if fresh else 2)
    params = {n: leaf for n, leaf in model.named_parameters() if leaf.ndim == 2}
    if name in TAKEN:
        (written,) = recognise(optimizer.state_dict(), decoupled=True)
        assert written[:2] == (TAKEN[name], f"torch.optim.{name}")
        with pytest.raises(
            fk.OptimizerStateError, match=rf"state of {TAKEN[name]}, not that of AdamW.*optimizer_state"
        ):
            adamw_state(optimizer.state_dict(), params, names=[*params])
        return
    with pytest.raises(fk.OptimizerStateError, match=WHOSE[name]) as caught:
        recognise(optimizer.state_dict(), decoupled=True)
    assert "supported are adamw, adam, nadam" in str(caught.value)


def test_sparse_adam_is_refused():
    state_dict = torch.optim.SparseAdam(list(network().parameters())).state_dict()
    with pytest.raises(fk.OptimizerStateError, match="lacks 'weight_decay'"):
        recognise(state_dict, decoupled=True)


def test_radam_is_told_by_the_name_that_it_lacks():
    """Its state has Adam's names to the letter; its groups lack amsgrad, and in torch 1.11 nothing else tells."""
    _, optimizer = stepped(lambda parameters: torch.optim.RAdam(parameters, lr=1e-2, decoupled_weight_decay=True))
    state_dict = optimizer.state_dict()
    assert recognise(state_dict)[0].kind == "radam"
    for group in state_dict["param_groups"]:
        for key in ("maximize", "foreach", "capturable", "differentiable", "decoupled_weight_decay"):
            del group[key]
    with pytest.raises(fk.OptimizerStateError, match=r"has no 'amsgrad', which torch.optim.AdamW always writes.*RAdam"):
        recognise(state_dict, decoupled=True)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "capturable": {"lr": torch.tensor(1e-2), "foreach": False},
    "differentiable": {"differentiable": False},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", [None, "linear", "one cycle"])
def test_adamw_in_all_its_forms_is_adamw(kind, schedule):
    optimizer = torch.optim.AdamW(network().named_parameters(), **{"lr": 1e-2, **KINDS[kind]})
    if schedule == "linear":
        torch.optim.lr_scheduler.LinearLR(optimizer)
    elif schedule:
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
    assert [by[:2] for by in recognise(optimizer.state_dict())] == [("adamw", "torch.optim.AdamW")]


GROUPS = {
    "Prodigy": ({"d": 1e-6, "d0": 1e-6, "d_coef": 1.0, "decouple": True}, "Prodigy's"),
    "schedule-free": ({"r": 0.0, "k": 3, "weight_lr_power": 2.0, "train_mode": True}, "a schedule-free optimizer's"),
    "Adan": ({"betas": (0.98, 0.92, 0.99), "no_prox": False}, "Adan's"),
    "three betas": ({"betas": (0.9, 0.999, 0.9999)}, "AdamW has two"),
    "AdEMAMix": ({"alpha": 5.0, "t_alpha": None, "t_beta3": None}, "alpha=5.0: it is AdEMAMix's"),
    "LAMB": ({"grad_averaging": True, "max_grad_norm": 1.0}, "LAMB's or NovoGrad's"),
    "ADOPT": ({"decouple": True}, "ADOPT's"),
    "unheard of": ({"tempo": 3}, r"has 'tempo', which no AdamW has.*take it out of the group"),
    "no number": ({"lr": None}, "lr=None; expected one number"),
}


@pytest.mark.parametrize("kind", GROUPS)
def test_groups_of_other_optimizers_are_refused_by_name(kind):
    state_dict = saved()
    state_dict["param_groups"][0] |= GROUPS[kind][0]
    with pytest.raises(fk.OptimizerStateError, match=GROUPS[kind][1]):
        recognise(state_dict)


@pytest.mark.parametrize("broken", [{"state": []}, {"param_groups": {}}, {"param_groups": [3]}, {"param_groups": [{}]}])
def test_what_is_no_state_dict_is_said_so(broken):
    with pytest.raises(fk.OptimizerStateError, match="This is no optimizer state_dict of torch: expected state as"):
        recognise({**saved(), **broken})


# -------------------------------------------------------------------------------------------------------- bitsandbytes


def as_bitsandbytes(state_dict: Any, wrapped: bool) -> Any:
    """Names of bitsandbytes 0.50's 32-bit and paged AdamW (wrapped), and of those before 0.46."""
    for group in state_dict["param_groups"]:
        for key in [key for key in group if key not in ("params", "lr", "betas", "eps", "weight_decay")]:
            del group[key]
        if wrapped:
            group.update(alpha=0.0, t_alpha=None, t_beta3=None)
    for index, entry in state_dict["state"].items():
        moments = {"state1": entry["exp_avg"], "state2": entry["exp_avg_sq"]}
        named = {"__bnb_optimizer_quant_state__": moments} if wrapped else moments
        state_dict["state"][index] = {"step": int(entry["step"]), **named}
    return state_dict


@pytest.mark.parametrize("wrapped", [True, False])
def test_bitsandbytes_moments_in_full_precision_are_read(wrapped):
    """Its decay is decoupled whatever the class: nobody is asked."""
    assert relative_error(as_bitsandbytes(saved(), wrapped)) < 1e-12


def test_bitsandbytes_own_state_reproduces_its_next_step():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = network().float()
    optimizer = bitsandbytes.optim.PagedAdamW32bit(model.parameters(), lr=1e-2, weight_decay=0.1)
    x = torch.arange(15.0).reshape(5, 3).sin()

    def gradients():
        optimizer.zero_grad()
        model(x).square().sum().backward()
        return {name: leaf.grad.clone() for name, leaf in model.named_parameters()}

    for _ in range(3):
        gradients()
        optimizer.step()
    params = {name: leaf.detach().clone() for name, leaf in model.named_parameters()}
    state = adamw_state(copy.deepcopy(optimizer.state_dict()), params, model=model)
    grads = gradients()
    optimizer.step()
    step = fk.precond.adamw_step(params, grads, state).total
    for name, leaf in model.named_parameters():
        torch.testing.assert_close(step[name], leaf.detach() - params[name], rtol=1e-4, atol=2e-7)


@pytest.mark.parametrize("missing", ["qmap1", "absmax1"])
def test_codes_of_8_bits_mean_nothing_without_their_map_and_scales(missing):
    state_dict = as_bitsandbytes(saved(), wrapped=True)
    moments = state_dict["state"][0]["__bnb_optimizer_quant_state__"]
    codes = {"qmap1": torch.zeros(256), "absmax1": torch.zeros(1)}
    moments.update(codes, state1=moments["state1"].to(torch.uint8))
    relative_error(state_dict)
    del moments[missing]
    with pytest.raises(fk.OptimizerStateError, match=rf"'0.weight' has 8-bit codes \(state1\) and no {missing}"):
        relative_error(state_dict)
    moments.update(codes, absmax1=torch.zeros(2))
    with pytest.raises(fk.OptimizerStateError, match=r"12 codes \(state1\), a map of 256 and 2 scales"):
        relative_error(state_dict)


@pytest.mark.parametrize(
    ("keys", "whose"),
    [
        ({"unorm_vec": torch.zeros(1)}, "scales a step by layers"),
        ({"gnorm_vec": torch.zeros(100)}, "clips by percentiles"),
        ({"state2": None}, "with one moment that is not Lion"),
    ],
)
def test_other_optimizers_of_bitsandbytes_are_refused(keys, whose):
    state_dict = as_bitsandbytes(saved(), wrapped=False)
    for entry in state_dict["state"].values():
        entry.update(keys)
        for key in [key for key, value in keys.items() if value is None]:
            del entry[key]
    with pytest.raises(fk.OptimizerStateError, match=rf"{whose}.*supported are adamw"):
        relative_error(state_dict)


class Quantised(torch.Tensor):
    """As torchao keeps moments: a tensor by name."""


def test_moments_that_are_no_plain_tensors_are_refused():
    state_dict = saved()
    state_dict["state"][0]["exp_avg"] = state_dict["state"][0]["exp_avg"].as_subclass(Quantised)
    with pytest.raises(fk.OptimizerStateError, match=r"exp_avg of parameter 0 is a Quantised; expected a plain ten"):
        relative_error(state_dict)
