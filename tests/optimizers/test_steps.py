"""Every optimizer's step in real numbers is the real optimizer's, and its parts add up to it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import jaxtyping
import pytest
import torch

import fkernel as fk
from fkernel import precond
from fkernel.checkpoint import optimizer_state
from fkernel.precond import updates
from fkernel.shapes import Tree
from tests.optimizers.real import LARGE, LIKELY, SHAPES, TORCH, drawn, taken

QUANTISED = {
    "bitsandbytes AdamW": ("AdamW", {}),
    "bitsandbytes PagedAdamW32bit": ("PagedAdamW32bit", {}),
    "bitsandbytes AdamW8bit": ("AdamW8bit", {}),
    "bitsandbytes PagedAdamW8bit": ("PagedAdamW8bit", {}),
    "bitsandbytes Lion": ("Lion", {}),
    "bitsandbytes Lion8bit": ("Lion8bit", {}),
}


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torch count in float64, and Muon orthogonalise in it."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def apart(one: Tree, other: Tree) -> float:
    """The largest difference, beside the largest entry."""
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).abs().max() / other[name].abs().max()) for name in other)


def shares(g: Tree) -> Tree:
    """Gradients of four sequences that add up to g, and are larger than it."""
    x = drawn(7, {name: tuple(leaf.shape) for name, leaf in g.items()}, g["w"].dtype)
    return {n: torch.stack([3 * x[n], -2 * x[n], 3 * leaf, -2 * leaf - x[n]]) for n, leaf in g.items()}


@pytest.mark.parametrize("steps", [0, 1, 6])
@pytest.mark.parametrize("name", TORCH)
def test_the_step_is_the_real_optimizers_and_its_parts_add_up(name, steps):
    make, options, shapes = TORCH[name]
    step = taken(make, options, shapes, steps=steps)
    state = optimizer_state(step.state_dict, step.before)
    parts = precond.optimizer_step(step.before, {**step.grads}, state)
    assert apart(parts.total, step.delta) < 5e-12  # of θ's rounding, which the real difference has
    P = precond.response(state, {**step.grads}, step.before)
    assert isinstance(P, precond.Diagonal) == (not name.startswith(("Muon", "Adafactor", "transformers")))
    batch = {n: -leaf.sum(0) for n, leaf in P(shares(step.grads)).items()}
    assert apart({n: batch[n] + parts.momentum[n] + parts.decay[n] for n in batch}, step.delta) < 1e-10
    resting = precond.optimizer_step(step.before, {n: torch.zeros_like(g) for n, g in step.grads.items()}, state)
    for n, leaf in resting.batch.items():
        assert float(leaf.abs().max()) < 1e-16 * float(step.delta[n].abs().max()), n


@pytest.mark.parametrize("name", ["Adam, L2", "SGD, Nesterov", "NAdam", "RMSprop, centered"])
def test_decay_in_the_gradient_has_its_share_as_a_sequence_has(name):
    """Were λθ a sequence's gradient, it would be credited with the same."""
    make, options, shapes = TORCH[name]
    step = taken(make, options, shapes)
    state = optimizer_state(step.state_dict, step.before)
    λθ = {n: (0.0 if n == "v" else 0.1) * theta for n, theta in step.before.items()}
    told = {n: step.grads[n] + leaf for n, leaf in λθ.items()}
    without = optimizer_state(step.state_dict, step.before)
    without = type(without)(**{**vars(without), "weight_decay": dict.fromkeys(told, 0.0)})
    P = precond.response(without, {**told}, step.before)
    decay = precond.optimizer_step(step.before, {**step.grads}, state).decay
    for n, leaf in P(λθ).items():
        torch.testing.assert_close(decay[n], -leaf, rtol=1e-10, atol=1e-18)
    assert bool(decay["w"].any())


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_moments_step_as_they_mean(name):
    """In float32 the step is what bitsandbytes' kernels do to their own rounding; three moments in 8 bits, one not."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.set_default_dtype(torch.float32)
    kind, options = QUANTISED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # paged states are plain ones on a CPU
        step = taken(getattr(bitsandbytes.optim, kind), {**LIKELY, **options}, LARGE, torch.float32)
    state = optimizer_state(step.state_dict, step.before)
    assert type(state) is (updates.LionState if "Lion" in kind else precond.AdamWState)
    parts = precond.optimizer_step(step.before, {**step.grads}, state)
    for n, real in step.delta.items():  # a weight of 1 is known to 6e-8
        torch.testing.assert_close(parts.total[n].double(), real, rtol=1e-5, atol=4e-7)


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_torchaos_moments_step_as_they_mean(kind):
    optim = pytest.importorskip("torchao.optim")
    torch.set_default_dtype(torch.float32)
    step = taken(getattr(optim, kind), {**LIKELY, "lr": torch.tensor(1e-3)}, LARGE, torch.float32)
    state = optimizer_state(step.state_dict, step.before, decoupled=True)
    parts = precond.optimizer_step(step.before, {**step.grads}, state)
    for n, real in step.delta.items():
        torch.testing.assert_close(parts.total[n].double(), real, rtol=1e-5, atol=4e-7)


def test_muon_for_matrices_and_adamw_for_the_rest_is_one_step():
    shapes = {"w": (4, 3), "b": (5,), "v": (6, 2)}
    muon = taken(torch.optim.Muon, LIKELY, {"w": (4, 3), "v": (6, 2)})
    both = taken(torch.optim.AdamW, LIKELY, shapes)
    rest = {"b": both.before["b"]}
    group = {**both.state_dict["param_groups"][0], "params": [0], "param_names": ["b"]}
    adamw = {"state": {0: both.state_dict["state"][1]}, "param_groups": [group]}
    before = {**muon.before, **rest}
    state = optimizer_state([muon.state_dict, adamw], before)
    assert isinstance(state, precond.MixedState)
    grads = {**muon.grads, "b": both.grads["b"]}
    parts = precond.optimizer_step(before, {**grads}, state)
    assert apart(parts.total, {**muon.delta, "b": both.delta["b"]}) < 5e-12
    P = precond.response(state, {**grads}, before)
    batch = {n: -leaf.sum(0) for n, leaf in P(shares(grads)).items()}
    assert apart(batch, parts.batch) < 1e-10
    only = state.restricted(["b", "w"])
    assert only.names == ["w", "b"]
    some = {n: before[n] for n in only.names}
    alone = precond.optimizer_step(some, {n: grads[n] for n in some}, only).total
    assert all(torch.equal(alone[n], parts.total[n]) for n in some)
    with pytest.raises(fk.TreeError, match="'b' in more than one part"):
        precond.MixedState((state.parts[1], state.parts[1]))


@pytest.mark.parametrize("name", ["AdamW, amsgrad", "SGD, dampening", "RMSprop, centered", "Muon"])
def test_a_parameter_without_gradient_is_left_alone(name):
    make, options, shapes = TORCH[name]
    step = taken(make, options, shapes)
    state = optimizer_state(step.state_dict, step.before)
    grads = {**step.grads, "v": None}
    parts = precond.optimizer_step(step.before, grads, state)
    assert not any(part["v"].any() for part in parts)
    assert not precond.response(state, grads, step.before)(step.before)["v"].any()
    assert apart({"w": parts.total["w"]}, {"w": step.delta["w"]}) < 5e-12


@pytest.mark.parametrize("name", TORCH)
def test_a_fresh_state_takes_the_real_first_step(name):
    make, options, shapes = TORCH[name]
    step = taken(make, options, shapes, steps=0)
    group = step.state_dict["param_groups"][0]
    kind = updates.kind_of(optimizer_state(step.state_dict, step.before))
    known = {key for key, _ in updates.OPTIMIZERS[kind].settings.values()}
    settings = {key: value for key, value in group.items() if key in known and value is not None}
    settings["weight_decay"] = {n: 0.0 if n == "v" else group["weight_decay"] for n in step.before}
    if "lr" in options and not isinstance(options["lr"], torch.Tensor):
        settings["lr"] = {n: 2e-3 if n == "v" else 1e-3 for n in step.before}
    if kind == "adagrad":
        return  # whose first sum is a setting of its own: told by its state
    state = precond.fresh_state(kind, step.before, **settings)
    assert apart(precond.optimizer_step(step.before, {**step.grads}, state).total, step.delta) < 5e-12


def test_lion_at_first_is_shared_by_the_secant_and_not_by_its_derivative():
    params = {"w": torch.ones(3)}
    state = precond.fresh_state("lion", params, lr=0.1)
    g = {"w": torch.tensor([2.0, -0.5, 0.0])}
    P = precond.response(state, {**g}, params)(params)["w"]
    torch.testing.assert_close(P, torch.tensor([0.05, 0.2, 0.0]))
    assert not precond.linearized(updates.lion, g, state)(params)["w"].any()


def test_settings_of_a_fresh_state_are_the_optimizers_own():
    w = {"w": torch.zeros(2, 2), "b": torch.zeros(2)}
    state = precond.fresh_state("adamw", w, lr=0.1, betas=(0.8, 0.9), weight_decay={"w": 0.1, "b": 0.0})
    assert isinstance(state, precond.AdamWState)
    assert (state.beta1["w"], state.beta2["b"], state.weight_decay) == (0.8, 0.9, {"w": 0.1, "b": 0.0})
    with pytest.raises(fk.OptimizerStateError, match=r"lion has no setting 'momentum'; it has 'beta1'"):
        precond.fresh_state("lion", w, lr=0.1, momentum=0.9)
    with pytest.raises(fk.OptimizerStateError, match="lr is not given, and sgd has no learning rate of its own"):
        precond.fresh_state("sgd", w)
    with pytest.raises(fk.OptimizerStateError, match="'sophia' is no optimizer that is known; expected one of adamw"):
        precond.fresh_state("sophia", w, lr=0.1)
    with pytest.raises(fk.OptimizerStateError, match="say relative_step=False"):
        precond.fresh_state("transformers_adafactor", w, lr=0.1)


def test_cancellation_is_told_beside_a_secant():
    """Two coordinates; on one of them two sequences take each other off to 1 in 1000."""
    g = {"w": torch.tensor([1e3, 1.0])}
    absolute = {"w": torch.tensor([1e3, 2e3])}
    P = {"w": torch.tensor([1.0, -2.0])}
    assert precond.cancellation(g, absolute, P) == pytest.approx(4.0 / 5.0)
    assert precond.cancellation(g, absolute, P, share=1e-4) == 0.0
    assert precond.cancellation({"w": torch.zeros(2)}, {"w": torch.zeros(2)}, P) == 0.0
    with pytest.raises(fk.OptimizerStateError, match=r"less than .* in places"):
        precond.cancellation(absolute, g, P)
    with pytest.raises(fk.TreeError):
        precond.cancellation(g, {"b": absolute["w"]}, P)


def test_what_no_optimizer_has_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users have it
    params = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    state = precond.fresh_state("lion", params, lr=0.1)
    with pytest.raises(fk.TreeError, match=r"params\['w'\] has shape \[3, 4\], .* moments have \[4, 3"):
        precond.optimizer_step({**params, "w": torch.zeros(3, 4)}, {**params}, state)
    with pytest.raises(fk.TreeError, match="lacks 'w'"):
        precond.response(state, {n: g for n, g in params.items() if n != "w"}, params)
    with pytest.raises(fk.NonFiniteError):
        precond.optimizer_step(params, {**params, "b": torch.full((5,), float("nan"))}, state)
    with pytest.raises(fk.OptimizerStateError, match=r"exp_avg\['w'\] holds 1 non-finite value"):
        updates.LionState({"w": torch.tensor([float("inf")])})
    with pytest.raises(fk.OptimizerStateError, match=r"square_avg\['w'\] is negative in 1 of 1 places"):
        updates.RMSpropState({"w": torch.tensor([-1.0])})
    with pytest.raises(fk.OptimizerStateError, match=r"is a torch.optim.SGD; .*optimizer_state, where"):
        precond.optimizer_step(params, {**params}, torch.optim.SGD([params["w"]]))  # pyright: ignore
    rows = precond.fresh_state("adafactor", params, lr=0.1)
    with pytest.raises(fk.TreeError, match=r"the optimizer state's row_var has \[4, 1\]"):
        precond.optimizer_step({**params, "w": torch.zeros(3, 4)}, {**params}, rows)
