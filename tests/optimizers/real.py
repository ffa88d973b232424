"""Real optimizers after some steps, and the step that they take next."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import Adafactor

from fkernel.shapes import Tree

SHAPES: dict[str, tuple[int, ...]] = {"w": (4, 3), "b": (5,), "v": (6, 2)}
LARGE: dict[str, tuple[int, ...]] = {"w": (64, 80), "b": (5,), "v": (65, 67)}
"""Large enough for 8 bits; the last is no multiple of a block."""
LIKELY: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1}


class Taken(NamedTuple):
    """One step.

    Attributes:
        before: θ before it.
        state_dict: the optimizer's before it, as a file gives it back.
        grads: g.
        delta: what the optimizer really did to what is stored, in float64.
    """

    before: Tree
    state_dict: Any
    grads: Tree
    delta: Tree


def drawn(seed: int, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float64) -> Tree:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def through_a_file(state_dict: Any) -> Any:
    """Save and load, tensors only."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def taken(
    make: Any,
    options: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float64,
    steps: int = 4,
) -> Taken:
    """Take some steps and one more; w and b decay, v has another learning rate and no decay."""
    params = {name: torch.nn.Parameter(leaf) for name, leaf in drawn(0, shapes, dtype).items()}
    decaying = [(name, leaf) for name, leaf in params.items() if name != "v"]
    other: dict[str, Any] = {"weight_decay": 0.0}
    if "lr" in options and not isinstance(options["lr"], torch.Tensor):
        other["lr"] = 2 * options["lr"]
    optimizer = make([{"params": decaying}, {"params": [("v", params["v"])], **other}], **options)
    with torch.compiler.set_stance("force_eager"):
        for step in range(steps):
            _step(optimizer, params, drawn(step + 1, shapes, dtype))
        state_dict = through_a_file(optimizer.state_dict())
        before = {name: leaf.detach().clone() for name, leaf in params.items()}
        grads = drawn(99, shapes, dtype)
        _step(optimizer, params, grads)
    delta = {name: leaf.detach().double() - before[name].double() for name, leaf in params.items()}
    return Taken(before, state_dict, grads, delta)


def _step(optimizer: Any, params: Mapping[str, Any], grads: Tree) -> None:
    for name, leaf in params.items():
        leaf.grad = grads[name].clone()
    optimizer.step()


TORCH: dict[str, tuple[Any, dict[str, Any], Mapping[str, tuple[int, ...]]]] = {
    "AdamW": (torch.optim.AdamW, LIKELY, SHAPES),
    "AdamW, fused": (torch.optim.AdamW, {**LIKELY, "fused": True}, SHAPES),
    "AdamW, foreach": (torch.optim.AdamW, {**LIKELY, "foreach": True}, SHAPES),
    "AdamW, tensor lr": (torch.optim.AdamW, {**LIKELY, "lr": torch.tensor(1e-3, dtype=torch.float64)}, SHAPES),
    "AdamW, amsgrad": (torch.optim.AdamW, {**LIKELY, "amsgrad": True}, SHAPES),
    "AdamW, maximize": (torch.optim.AdamW, {**LIKELY, "maximize": True}, SHAPES),
    "Adam, L2": (torch.optim.Adam, LIKELY, SHAPES),
    "Adam, L2, amsgrad, maximize": (torch.optim.Adam, {**LIKELY, "amsgrad": True, "maximize": True}, SHAPES),
    "NAdam": (torch.optim.NAdam, LIKELY, SHAPES),
    "NAdam, decoupled": (torch.optim.NAdam, {**LIKELY, "decoupled_weight_decay": True, "maximize": True}, SHAPES),
    "RAdam": (torch.optim.RAdam, {**LIKELY, "betas": (0.9, 0.99)}, SHAPES),
    "RAdam, decoupled": (torch.optim.RAdam, {**LIKELY, "decoupled_weight_decay": True}, SHAPES),
    "SGD": (torch.optim.SGD, LIKELY, SHAPES),
    "SGD, Nesterov": (torch.optim.SGD, {**LIKELY, "momentum": 0.9, "nesterov": True}, SHAPES),
    "SGD, dampening": (torch.optim.SGD, {**LIKELY, "momentum": 0.9, "dampening": 0.3, "maximize": True}, SHAPES),
    "RMSprop": (torch.optim.RMSprop, {"lr": 1e-3}, SHAPES),
    "RMSprop, centered": (torch.optim.RMSprop, {**LIKELY, "momentum": 0.9, "centered": True}, SHAPES),
    "Adagrad": (torch.optim.Adagrad, {**LIKELY, "lr_decay": 0.1, "initial_accumulator_value": 0.5}, SHAPES),
    "Adafactor": (torch.optim.Adafactor, LIKELY, SHAPES),
    "transformers' Adafactor": (Adafactor, {"weight_decay": 0.1}, SHAPES),
    "transformers' Adafactor, lr": (
        Adafactor,
        {**LIKELY, "relative_step": False, "scale_parameter": False, "beta1": 0.9},
        SHAPES,
    ),
    "Muon": (torch.optim.Muon, LIKELY, {"w": (4, 3), "v": (6, 2)}),
    "Muon, as AdamW": (
        torch.optim.Muon,
        {**LIKELY, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"},
        {"w": (4, 3), "v": (6, 2)},
    ),
}
"""{name: (class, options, shapes)}: float64 throughout."""
