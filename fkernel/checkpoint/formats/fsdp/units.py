"""FSDP1 with use_orig_params=False: whose numbers are in a flat parameter that has none but a number?

FSDP1 wraps a model's layers, and each wrapped module becomes one flat parameter, a unit: the parameters inside it,
those of units inside left out, one after another in the order of `named_parameters()`, shared ones once. With T
numbers in a unit and W ranks,

    rank r holds    numbers [r c, (r + 1) c) of the unit, padded at the end with zeros,    c = ⌈T / W⌉

and the optimizer numbers units as the wrapped model's `parameters()` gives them: a unit stands before those inside it.
Which modules were wrapped no file says. The known ways are tried, and one is believed only if it is the only one whose
number of units, and each unit's c, fit the file:

    layers     each module of a class in the model's `_no_split_modules` (verl, accelerate), and of LoRA adapters each
               module without children whose weight is trained (verl, PEFT's `fsdp_auto_wrap_policy`)
    one unit   nothing was wrapped but the model

Source: torch 2.13, distributed/fsdp/wrap.py (`_recursive_wrap`) and _flat_param.py (`FlatParamHandle`); verl 0.9.1,
utils/fsdp_utils.py (`get_fsdp_wrap_policy`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fkernel.errors import CheckpointError
from fkernel.shapes import Tree

Unit = dict[str, tuple[int, ...]]
"""{parameter: shape}, in the order in which they lie in a flat parameter."""


def find_units(lengths: Sequence[int | None], ranks: int, model: torch.nn.Module, path: Path) -> list[Unit]:
    """Find which of a model's parameters are in each flat parameter.

    Args:
        lengths: c of each numbered unit; None where the optimizer keeps nothing of it, as it was frozen.
        ranks: W.
        model: the model that was trained.
        path: a rank's file, for messages.

    Raises:
        CheckpointError: no known way to wrap fits, or two do.

    Example:
        >>> find_units([5], 2, torch.nn.Linear(2, 3), Path("optim.pt"))
        [{'weight': (3, 2), 'bias': (3,)}]
    """
    layers = _layers(model)
    known = {"one unit": [model]}
    if layers:
        known = {
            f"a unit for each {' and '.join(sorted({type(m).__name__ for m in layers}))}": [model, *layers]
        } | known
    fitting: list[list[Unit]] = []
    tried: list[str] = []
    for name, wrapped in known.items():
        units = units_of(model, wrapped)
        sizes = [-(-_total(unit) // ranks) for unit in units]
        if len(sizes) == len(lengths) and all(c in (None, size) for c, size in zip(lengths, sizes, strict=True)):
            fitting.append(units)
        tried.append(f"{name}: {len(sizes)} of {_shortened(sizes)}")
    if len(fitting) == 1:
        return fitting[0]
    raise CheckpointError(
        f"{path} holds {len(lengths)} flat parameters of FSDP1, of {_shortened(lengths)} numbers on each of {ranks} "
        f"ranks, and {'more than one' if fitting else 'no'} known way to wrap this model gives that: "
        f"{'; '.join(tried)}. Is it the model that was trained? Other ways to wrap (min_num_params, other classes) are "
        f"not told by the files: save with use_orig_params=True, with FSDP2, or the whole state."
    )


def units_of(model: torch.nn.Module, wrapped: Sequence[torch.nn.Module]) -> list[Unit]:
    """List the flat parameters that FSDP1 makes of a model when it wraps some of its modules.

    Args:
        model: the model.
        wrapped: modules of it, itself one of them.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Linear(2, 1))
        >>> units_of(net, [net, net[1]])
        [{'0.weight': (2, 1), '0.bias': (2,)}, {'1.weight': (1, 2), '1.bias': (1,)}]
    """
    units: dict[torch.nn.Module, Unit] = {}
    seen: set[torch.nn.Parameter] = set()
    owners: dict[str, torch.nn.Module] = {}
    for place, module in model.named_modules():
        owners[place] = module if module in wrapped else owners[place.rpartition(".")[0]]
        unit = units.setdefault(owners[place], {})
        for name, leaf in module.named_parameters(recurse=False):
            if leaf not in seen:
                seen.add(leaf)
                unit[f"{place}.{name}" if place else name] = tuple(leaf.shape)
    return [unit for unit in units.values() if unit]


def cut(flat: torch.Tensor, unit: Unit, whose: str, directory: Path) -> Tree:
    """Cut a unit's numbers, brought together from all ranks, into its parameters.

    Args:
        flat: [W c] numbers.
        unit: which parameters they are.
        whose: of the state, for the message.
        directory: for the message.

    Raises:
        CheckpointError: there is something else than zeros in the padding.

    Example:
        >>> cut(torch.tensor([1.0, 2.0, 3.0, 0.0]), {"w": (1, 2), "b": (1,)}, "exp_avg", Path("run"))
        {'w': tensor([[1., 2.]]), 'b': tensor([3.])}
    """
    leaves: Tree = {}
    begin = 0
    for name, shape in unit.items():
        end = begin + torch.Size(shape).numel()
        leaves[name] = flat[begin:end].view(shape)
        begin = end
    if flat[begin:].any():
        raise CheckpointError(
            f"The ranks' {whose} in {directory} has other numbers than zeros after the last parameter, "
            f"{next(reversed(unit))!r}: it is of another model, or the order of the ranks is another."
        )
    return leaves


def _layers(model: Any) -> list[torch.nn.Module]:
    """The modules that are wrapped: layers, and an adapter's parts."""
    names = {*(getattr(model, "_no_split_modules", None) or ())}
    classes = tuple({type(module) for module in model.modules() if type(module).__name__ in names})
    frozen = any(not leaf.requires_grad for leaf in model.parameters())
    return [
        module
        for module in model.modules()
        if module is not model and (isinstance(module, classes) or (frozen and _is_trained_leaf(module)))
    ]


def _is_trained_leaf(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return not [*module.children()] and isinstance(weight, torch.Tensor) and weight.requires_grad


def _total(unit: Mapping[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in unit.values())


def _shortened(sizes: Sequence[int | None]) -> str:
    """Count equal neighbours, as layers are.

    Example:
        >>> _shortened([64, 268, 268, None])
        '[64, 2 × 268, frozen]'
    """
    runs: list[list[Any]] = []
    for size in sizes:
        if runs and runs[-1][1] == size:
            runs[-1][0] += 1
        else:
            runs.append([1, size])
    shown = [f"{n} × {s}" if n > 1 else str(s) for n, s in ((n, "frozen" if s is None else s) for n, s in runs)]
    return f"[{', '.join(shown if len(shown) < 12 else [*shown[:10], '…', shown[-1]])}]"
