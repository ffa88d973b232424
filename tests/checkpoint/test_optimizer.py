"""An optimizer's state_dict is keyed by the names it recorded, or refused."""

import pickle
from typing import Any

import pytest
import torch

import fkernel as fk
from fkernel.checkpoint import adamw_state, load_adamw_state, load_model, optimizer_state
from fkernel.precond.updates import AdamState
from tests.models import gpt2


@pytest.fixture
def model():
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)).double()


def stepped(model, **options):
    decay = [(name, p) for name, p in model.named_parameters() if name.endswith("weight")]
    plain = [(name, p) for name, p in model.named_parameters() if name.endswith("bias")]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0, "lr": 2e-3}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, **options)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 3, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    return optimizer


def params_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_state_reproduces_the_optimizers_own_next_step(model, tmp_path):
    optimizer = stepped(model)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    before = params_of(model)
    state = load_adamw_state(tmp_path / "optimizer.pt", before)
    optimizer.zero_grad()
    model(torch.randn(5, 3, dtype=torch.float64)).square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    step = fk.precond.adamw_step(before, grads, state)
    assert state.step == dict.fromkeys(before, 3)
    for name, p in model.named_parameters():
        torch.testing.assert_close(step.total[name], p.detach() - before[name], atol=1e-13, rtol=0)


def test_parameter_that_never_had_a_gradient_is_at_step_zero(model):
    model[1].requires_grad_(False)
    state = adamw_state(stepped(model).state_dict(), params_of(model))
    assert state.step["1.weight"] == 0
    assert state.step["0.weight"] == 3
    assert not state.exp_avg_sq["1.weight"].any()


def test_state_without_recorded_names_is_refused(model):
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(fk.OptimizerStateError, match="records no param_names, so its 6 moments"):
        adamw_state(optimizer.state_dict(), params_of(model))


@pytest.mark.parametrize("flag", ["amsgrad", "maximize"])
def test_variants_are_no_adamw_in_the_plain(model, flag):
    state_dict = stepped(model, **{flag: True}).state_dict()
    with pytest.raises(fk.OptimizerStateError, match=f"state of adam with {flag}=True, not that of AdamW in the plain"):
        adamw_state(state_dict, params_of(model))
    state = optimizer_state(state_dict, params_of(model))
    assert isinstance(state, AdamState)
    assert getattr(state, flag) == dict.fromkeys(params_of(model), True)


def test_coupled_decay_is_no_adamws(model):
    optimizer = torch.optim.Adam(model.named_parameters(), weight_decay=0.1)
    with pytest.raises(fk.OptimizerStateError, match="whose decay is added to the gradient"):
        adamw_state(optimizer.state_dict(), params_of(model))
    state = optimizer_state(optimizer.state_dict(), params_of(model))
    assert isinstance(state, AdamState)
    assert state.decoupled_weight_decay == dict.fromkeys(params_of(model), False)


def test_a_group_without_decay_is_of_the_same_optimizer(model):
    """Adam's decay is in the gradient; that one group has none makes it no AdamW."""
    decay = [(name, p) for name, p in model.named_parameters() if name.endswith("weight")]
    plain = [(name, p) for name, p in model.named_parameters() if name.endswith("bias")]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    state = optimizer_state(torch.optim.Adam(groups).state_dict(), params_of(model))
    assert isinstance(state, AdamState)
    assert state.of("0.bias").weight_decay == 0.0


def test_decay_of_an_unknown_kind_is_asked_for(model):
    state_dict = stepped(model).state_dict()
    for group in state_dict["param_groups"]:
        del group["decoupled_weight_decay"]
    with pytest.raises(fk.OptimizerStateError, match="Say decoupled=True if the training used AdamW"):
        optimizer_state(state_dict, params_of(model))
    assert isinstance(optimizer_state(state_dict, params_of(model), decoupled=False), AdamState)
    assert isinstance(optimizer_state(state_dict, params_of(model), decoupled=True), fk.precond.AdamWState)


def test_other_optimizers_are_no_adamw(model):
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    with pytest.raises(
        fk.OptimizerStateError, match=r"state of sgd, not that of AdamW in the plain; .*optimizer_state"
    ):
        adamw_state(optimizer.state_dict(), params_of(model))


def test_state_about_other_parameters_is_refused(model):
    params = params_of(model)
    state_dict = stepped(model).state_dict()
    missing = {name: p for name, p in params.items() if name != "0.bias"}
    with pytest.raises(fk.TreeError, match=r"params lacks '0\.bias', which the optimizer state has"):
        adamw_state(state_dict, missing)
    with pytest.raises(fk.TreeError, match="params has 'extra', which the optimizer state lacks"):
        adamw_state(state_dict, params | {"extra": torch.zeros(1)})
    turned = params | {"0.weight": params["0.weight"].T}
    with pytest.raises(fk.TreeError, match=r"'0.weight'\] has shape \[3, 4\].*have \[4, 3\]"):
        adamw_state(state_dict, turned)


def test_nothing_in_a_file_is_executed(model, tmp_path):
    class Payload:
        def __reduce__(self):
            return (exec, ("raise SystemExit('executed')",))

    path = tmp_path / "optimizer.pt"
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(fk.CheckpointError, match="could not be read as tensors only"):
        load_adamw_state(path, params_of(model))
    torch.save({"state": Payload()}, path)
    with pytest.raises(fk.CheckpointError, match="could not be read as tensors only"):
        load_adamw_state(path, params_of(model))


@pytest.mark.parametrize("damage", ["truncated", "missing", "something else"])
def test_damaged_files_are_refused_with_the_reason(model, tmp_path, damage):
    path = tmp_path / "optimizer.pt"
    torch.save([1, 2, 3] if damage == "something else" else stepped(model).state_dict(), path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    if damage == "missing":
        path.unlink()
    expected = {
        "truncated": (fk.CheckpointError, "could not be read as tensors only"),
        "missing": (fk.CheckpointError, "There is no file .*expected an optimizer state"),
        "something else": (fk.OptimizerStateError, "lacks 'state' and 'param_groups'"),
    }
    kind, message = expected[damage]
    with pytest.raises(kind, match=message):
        load_adamw_state(path, params_of(model))


def test_model_round_trips_with_eager_attention(tmp_path):
    model: Any = gpt2(0)
    model = model.float()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config._attn_implementation == "eager"
    assert not loaded.training
    for (name, p), (other, q) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(p, q)


def test_directory_without_a_model_is_refused(tmp_path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(fk.ModelError, match=r"holds no config.json \(\['weights.bin'\]\)"):
        load_model(tmp_path)
    with pytest.raises(fk.ModelError, match=r"There is no directory .*a model that may be fetched is named hub:"):
        load_model(tmp_path / "nowhere")
