"""An optimizer's state as it is stored: in the optimizer's own dtypes and codes, keyed by parameter name.

Two things are made of it. `exact_state` is what it means, in real numbers: codes become moments,

    bitsandbytes   m_i = map[code_i] · absmax[i // 256]            map of 256 values, blocks of 256, as they are stored
    torchao        m = moment.dequantize()                         its own: 8-bit, 4-bit and fp8

and bfloat16 becomes float32, without loss. `executed_step` takes it as it is.

Source: bitsandbytes 0.50's `dequantize_blockwise`; torchao 0.18's `OptimState8bit`, `OptimState4bit`; T. Dettmers et
al., "8-bit optimizers via block-wise quantization" (2022).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fkernel.boundary import public
from fkernel.errors import OptimizerStateError
from fkernel.precond.base import OptimizerState
from fkernel.precond.making import state_from
from fkernel.precond.state import check_covers
from fkernel.precond.steps import MixedState
from fkernel.precond.updates import kind_of, optimizer_of
from fkernel.shapes import Tensor, Tree

BLOCK = 256
"""Numbers of bitsandbytes that share a scale."""
CODES = {"state1": ("qmap1", "absmax1"), "state2": ("qmap2", "absmax2")}


@dataclass(frozen=True, eq=False)
class StoredState:
    """An optimizer's state in its own dtypes; every field is {name: …}.

    Attributes:
        kinds: which of `fkernel.precond.updates.OPTIMIZERS` moves the parameter.
        writers: the class that does: "torch.optim.AdamW", "bitsandbytes.optim.AdamW", "torchao.optim.AdamW8bit", …
        entries: what the optimizer keeps of it, under its own names; empty before its first step.
        groups: its parameter group's settings, under the optimizer's own names.
        masters: its float32 master weights, where the optimizer keeps any.
    """

    kinds: Mapping[str, str]
    writers: Mapping[str, str]
    entries: Mapping[str, Mapping[str, Any]]
    groups: Mapping[str, Mapping[str, Any]]
    masters: Tree = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The parameters, in order."""
        return list(self.kinds)

    @property
    def dtypes(self) -> dict[str, tuple[str, ...]]:
        """{name: the dtypes of its moments, as they are stored}; codes are uint8."""
        each = {name: [leaf for leaf in entry.values() if _is_moment(leaf)] for name, entry in self.entries.items()}
        return {name: tuple(sorted({str(leaf.dtype)[6:] for leaf in leaves})) for name, leaves in each.items()}

    def restricted(self, names: Iterable[str]) -> StoredState:
        """Keep some parameters, in their order."""
        wanted = list(names)
        kept = {key: {name: value[name] for name in wanted if name in value} for key, value in vars(self).items()}
        return StoredState(**kept)


@public
def exact_state(stored: StoredState, params: Tree) -> OptimizerState:
    """Make the state in real numbers: what a stored one means.

    Args:
        stored: the stored state.
        params: {name: [*shape]}, the parameters that it must be about.

    Returns:
        `AdamWState` for AdamW, else the state of its kind; a `MixedState` where parameters have different optimizers.

    Raises:
        OptimizerStateError: codes without their map, blocks that do not fit, or a number that is impossible.
        TreeError: it is about other parameters, or shapes differ.

    Example:
        >>> w = {"w": torch.zeros(2)}
        >>> entry = {"step": 1, "exp_avg": torch.ones(2).bfloat16(), "exp_avg_sq": torch.ones(2).bfloat16()}
        >>> group = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        >>> exact_state(StoredState({"w": "adamw"}, {"w": "torch.optim.AdamW"}, {"w": entry}, {"w": group}), w).exp_avg
        {'w': tensor([1., 1.])}
    """
    parts: list[OptimizerState] = []
    for kind in dict.fromkeys(stored.kinds.values()):
        own = {name: params[name] for name in stored.names if stored.kinds[name] == kind and name in params}
        foreign = [name for name in stored.names if stored.kinds[name] == kind and name not in params]
        own |= {name: _shaped(stored.entries[name]) for name in foreign}
        entries = {name: real_entry(stored.entries[name], name) for name in own}
        groups = {name: _with_eps(stored, name) for name in own}
        parts.append(state_from(kind, own, entries, groups))
    state = parts[0] if len(parts) == 1 else MixedState(tuple(parts))
    check_covers(state, list(params), params, "params")
    return state


@public
def stored_state(state: OptimizerState) -> StoredState:
    """Make a stored state of one in real numbers, for its optimizer's usual class: its own tensors, under its names.

    Args:
        state: any optimizer's.

    Example:
        >>> from fkernel.precond import adamw_init
        >>> stored_state(adamw_init({"w": torch.zeros(1)}, lr=0.1)).groups["w"]["betas"]
        (0.9, 0.999)
    """
    if isinstance(state, MixedState):
        each = [stored_state(part) for part in state.parts]
        named = ("kinds", "writers", "entries", "groups")
        return StoredState(*({k: v for part in each for k, v in getattr(part, key).items()} for key in named))
    optimizer, kind = optimizer_of(state), kind_of(state)
    entries: dict[str, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = {}
    for name in state.names:
        past = vars(state.of(name))
        kept = (*optimizer.state.MOMENTS, *optimizer.state.OPTIONAL, *optimizer.numbers)
        entries[name] = {key: past[key] for key in kept if past[key] is not None}
        if past.get("step") == 0:
            entries[name] = {}
        groups[name] = {}
        for own, (key, place) in optimizer.settings.items():
            groups[name][key] = past[own] if place is None else (*groups[name].get(key, ()), past[own])
    names = state.names
    return StoredState(dict.fromkeys(names, kind), dict.fromkeys(names, optimizer.writer), entries, groups)


@public
def real_entry(entry: Mapping[str, Any], name: Any) -> dict[str, Any]:
    """Give what a parameter's entry means, in real numbers and under torch's names.

    Args:
        entry: the entry; bitsandbytes' state1 and state2 are exp_avg and exp_avg_sq.
        name: of the parameter, for messages.

    Raises:
        OptimizerStateError: codes have no map, or their blocks do not fit.

    Example:
        >>> real_entry({"step": torch.tensor(3.0), "state1": torch.zeros(1), "state2": torch.ones(1)}, "w")
        {'step': 3, 'exp_avg': tensor([0.]), 'exp_avg_sq': tensor([1.])}
    """
    renamed = {"state1": "exp_avg", "state2": "exp_avg_sq"}
    plain: dict[str, Any] = {}
    for key, value in entry.items():
        if key == "step":
            plain[key] = int(float(value))
        elif key == "mu_product":
            plain[key] = float(value)
        elif key in CODES and not value.is_floating_point():
            plain[renamed[key]] = _decoded(entry, key, name)
        elif isinstance(value, torch.Tensor) and key not in ("qmap1", "qmap2", "absmax1", "absmax2"):
            plain[renamed.get(key, key)] = _real(value)
    return plain


def _real(moment: Any) -> Tensor:
    if type(moment) not in (torch.Tensor, torch.nn.Parameter) and hasattr(moment, "dequantize"):
        moment = moment.dequantize()
    return moment if moment.dtype in (torch.float32, torch.float64) else moment.float()


def _decoded(entry: Mapping[str, Any], key: str, name: Any) -> Tensor:
    codes: Tensor = entry[key]
    lacking = [each for each in CODES[key] if entry.get(each) is None]
    if lacking:
        raise OptimizerStateError(
            f"The state of {name!r} has 8-bit codes ({key}) and no {lacking[0]}: codes mean nothing without their map "
            f"and scales. Save the optimizer's whole state_dict."
        )
    values, scales = (entry[each].to(codes.device).float() for each in CODES[key])
    if values.numel() != 256 or scales.numel() != -(-codes.numel() // BLOCK):
        raise OptimizerStateError(
            f"The state of {name!r} has {codes.numel()} codes ({key}), a map of {values.numel()} and {scales.numel()} "
            f"scales; expected a map of 256 and a scale for each {BLOCK} codes."
        )
    moments = values[codes.reshape(-1).long()] * scales.repeat_interleave(BLOCK)[: codes.numel()]
    return moments.reshape(codes.shape)


def _with_eps(stored: StoredState, name: str) -> Mapping[str, Any]:
    """A group's settings; torch's Adafactor takes ε₁ from the dtype that it steps in, where none is given."""
    group = stored.groups[name]
    if stored.kinds[name] != "adafactor" or group.get("eps", (0.0,))[0] is not None:
        return group
    moments = [leaf for leaf in stored.entries[name].values() if _is_moment(leaf)]
    return {**group, "eps": (torch.finfo(moments[0].dtype).eps, group["eps"][1])} if moments else group


def _is_moment(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0


@public
def shape_of_entry(entry: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Tell the shape of the parameter that an entry is of, where a moment has it or two make it; None where none does.

    Args:
        entry: what an optimizer keeps of a parameter.

    Example:
        >>> shape_of_entry({"exp_avg_sq_row": torch.zeros(2), "exp_avg_sq_col": torch.zeros(3)})
        (2, 3)
    """
    for rows, columns in (("row_var", "col_var"), ("exp_avg_sq_row", "exp_avg_sq_col")):
        if entry.get(rows) is not None:
            own = entry[rows].shape[:-1] if rows == "row_var" else entry[rows].shape
            return (*own, entry[columns].shape[-1])
    for key in ("exp_avg_sq", "exp_avg", "state1", "momentum_buffer", "square_avg", "sum", "variance"):
        if entry.get(key) is not None:
            return tuple(entry[key].shape)
    return None


def _shaped(entry: Mapping[str, Any]) -> Tensor:
    shape = shape_of_entry(entry)
    return torch.zeros(()) if shape is None else torch.zeros(()).expand(shape)
