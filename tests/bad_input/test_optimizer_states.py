"""An optimizer's state with something in it that no optimizer keeps is refused, by the parameter's or group's name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fkernel as fk
from fkernel import checkpoint
from tests.checkpoint.writers import qwen2

NO_STEP: dict[str, Any] = {
    "nan": float("nan"),
    "infinite": float("inf"),
    "large": 10**400,
    "text": "x",
    "none": None,
    "list": [1],
    "negative": -1,
    "half": 2.5,
    "boolean": True,
    "several": torch.ones(3),
    "complex": torch.ones((), dtype=torch.complex64),
    "sparse": torch.ones(1).to_sparse(),
    "meta": torch.ones((), device="meta"),
}
NO_MOMENT: dict[str, Any] = {
    "int32": lambda m: m.int(),
    "uint8": lambda m: m.to(torch.uint8),
    "boolean": lambda m: m.bool(),
    "complex": lambda m: m.to(torch.complex64),
    "sparse": lambda m: m.to_sparse(),
    "meta": lambda m: m.to("meta"),
    "quantised": lambda m: torch.quantize_per_tensor(m, 0.1, 0, torch.qint8),
    "nan": lambda m: m * float("nan"),
    "infinite": lambda m: m + float("inf"),
    "shape": lambda m: m[:1],
    "list": lambda m: m.tolist(),
    "text": lambda m: "x",
    "number": lambda m: 1.0,
}
NO_NUMBER: dict[str, Any] = {
    "nan": float("nan"),
    "infinite": float("inf"),
    "negative": -1.0,
    "large": 10**400,
    "text": "x",
    "none": None,
    "list": [0.1],
    "complex": 1j,
    "boolean": True,
    "several": torch.ones(2),
    "meta": torch.ones((), device="meta"),
    "texts": ("a", "b"),
    "pair of nan": (0.9, float("nan")),
}


@pytest.fixture(scope="module")
def trained() -> tuple[dict[str, torch.nn.Parameter], dict[str, Any]]:
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(net.named_parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        net(torch.randn(5, 3)).sum().backward()
        optimizer.step()
    return dict(net.named_parameters()), optimizer.state_dict()


def refused(trained, change):
    params, state_dict = trained
    edited = copy.deepcopy(state_dict)
    replaced = change(edited)
    with pytest.raises((fk.OptimizerStateError, fk.TreeError, fk.NonFiniteError)) as caught:
        checkpoint.optimizer_state(edited if replaced is None else replaced, params)
    return str(caught.value)


@pytest.mark.parametrize("step", NO_STEP.values(), ids=NO_STEP)
def test_a_step_that_is_no_count(trained, step):
    text = refused(trained, lambda state: state["state"][0].update(step=step))
    assert "0.weight" in text
    assert "step" in text


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("change", NO_MOMENT.values(), ids=NO_MOMENT)
def test_a_moment_that_is_no_tensor_of_numbers(trained, key, change):
    moment = trained[1]["state"][0][key]
    text = refused(trained, lambda state: state["state"][0].update({key: change(moment)}))
    assert "parameter 0" in text or "0.weight" in text


@pytest.mark.parametrize("key", ["lr", "eps", "weight_decay", "betas"])
@pytest.mark.parametrize("value", NO_NUMBER.values(), ids=NO_NUMBER)
def test_a_setting_that_is_no_number(trained, key, value):
    refused(trained, lambda state: state["param_groups"][0].update({key: value}))


GROUPS: dict[str, Any] = {
    "no params": {"params": None},
    "params of lists": {"params": [[0], 1, 2, 3]},
    "params twice": {"params": [0, 0, 1, 2]},
    "params that have no state": {"params": [9, 10, 11, 12]},
    "no names": {"param_names": None},
    "names that are numbers": {"param_names": [1, 2, 3, 4]},
    "too few names": {"param_names": ["0.weight"]},
    "a flag that is a text": {"maximize": "no"},
    "a flag that is a tensor": {"amsgrad": torch.ones(2)},
}


@pytest.mark.parametrize("change", GROUPS.values(), ids=GROUPS)
def test_a_group_that_no_optimizer_has(trained, change):
    refused(trained, lambda state: state["param_groups"][0].update(change))


@pytest.mark.parametrize(
    "whole",
    ["x", [], 3, {}, {"param_groups": []}, {"state": {}, "param_groups": []}, {"state": [1], "param_groups": []}],
)
def test_what_is_no_state_dict(trained, whole):
    refused(trained, lambda _: whole)


def test_a_lost_entry_beside_others_is_told(tmp_path):
    """It may never have had a gradient: no one can tell, so that it is said."""
    model = qwen2()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    for leaf in model.parameters():
        leaf.grad = torch.ones_like(leaf)
    optimizer.step()
    state = optimizer.state_dict()
    model.save_pretrained(tmp_path)
    name = state["param_groups"][0]["param_names"][2]
    torch.save(state, tmp_path / "optimizer.pt")
    assert "unstepped" not in [condition.kind for condition in checkpoint.load(tmp_path).conditions]
    del state["state"][2]
    torch.save(state, tmp_path / "optimizer.pt")
    with pytest.warns(fk.CheckpointWarning, match=f"has nothing of 1 of its .* never stepped: '{name}'"):
        loaded = checkpoint.load(tmp_path)
    assert loaded.optimizer is not None
    assert loaded.optimizer.of(name).step == 0
