"""Through which parts of the model a step moved a sequence, and what a method that leaves some out would not see.

An inner product is a sum over parameters, so every quantity splits, and the parts add up to the whole:

    C_e = Σ_groups C_e^group,   C_eu^group = c w_u A_u Σ_{names in group} ⟨∇S_e[name], P ∇S_u[name]⟩

Every part (layer and kind at once) is contracted once; layers and kinds are sums of parts.

    share    Σ |C^group| / Σ_groups Σ |C^group|     of what moved, in either direction
    missed   ‖Σ_{left out} C^group‖ / ‖C‖           the relative error of a method that leaves some kinds out
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from fkernel import func, tree
from fkernel.errors import TreeError, listing
from fkernel.func import by_kind, by_layer
from fkernel.shapes import Tensor

ENDS = ("embedding", "positions", "head")
"""Kinds that common methods leave out."""


def by_part(name: str) -> str:
    """Group parameters by layer and kind at once: "layer 3 · MLP".

    Args:
        name: as `named_parameters` has it.

    Example:
        >>> by_part("model.layers.3.mlp.up_proj.weight"), by_part("model.embed_tokens.weight")
        ('layer 3 · MLP', 'embedding')
    """
    layer, kind = by_layer(name), by_kind(name)
    return kind if layer == kind else f"{layer} · {kind}"


def summed(parts: Mapping[str, Tensor], names: Iterable[str], key: Callable[[str], str]) -> dict[str, Tensor]:
    """Add parts up to coarser groups.

    C^group = Σ_{parts in group} C^part;  Σ_groups C^group = Σ_parts C^part

    Args:
        parts: {part: tensor}, of `by_part`.
        names: of the parameters that the parts are of, from which it is known what part belongs to what group.
        key: name ↦ group, such as `func.by_kind`.

    Raises:
        TreeError: a group would hold a part of a part, so that the sums could not be told, or parts and names are not
            of the same parameters.

    Example:
        >>> names = ["h.0.mlp.up_proj", "h.1.mlp.up_proj"]
        >>> summed({by_part(name): torch.ones(1) for name in names}, names, by_kind)
        {'MLP': tensor([2.])}
    """
    found: dict[str, Tensor] = {}
    for part, group in _groups(parts, names, key).items():  # in the model's order, in whichever gradients came
        found[group] = found[group] + parts[part] if group in found else parts[part]
    return found


def _groups(parts: Mapping[str, Tensor], names: Iterable[str], key: Callable[[str], str]) -> dict[str, str]:
    """The group that each part belongs to, whole."""
    members = func.grouped(names, by_part)
    tree.check_names(parts, members, "parts", "names")
    found = {part: [*dict.fromkeys(map(key, own))] for part, own in members.items()}
    for part, groups in found.items():
        if len(groups) > 1:
            raise TreeError(
                f"The part {part!r} has parameters of {len(groups)} groups, {listing(groups)}; expected groups of "
                f"whole parts. Take a coarser key, or split the kernel by this one: func.contract_by(x, y, key)."
            )
    return {part: groups[0] for part, groups in found.items()}


def shares(groups: Mapping[str, Tensor]) -> dict[str, float]:
    """Tell how much of what moved went through each group, in either direction; they add up to 1.

    Σ |C^group| / Σ_groups Σ |C^group|

    Args:
        groups: {group: [...]}, such as contributions by kind.

    Example:
        >>> shares({"MLP": torch.tensor([1.0, -1.0]), "norm": torch.tensor([0.0, 2.0])})
        {'MLP': 0.5, 'norm': 0.5}
    """
    sizes = {group: float(value.double().abs().sum()) for group, value in groups.items()}
    whole = sum(sizes.values())
    return {group: size / whole if whole else 0.0 for group, size in sizes.items()}


def missed(groups: Mapping[str, Tensor], left_out: Iterable[str] = ENDS) -> float:
    """Tell how wrong a method is that leaves some kinds out.

    ‖Σ_{left out} C^group‖ / ‖Σ_groups C^group‖

    Args:
        groups: {kind: [...]}, additive to the whole.
        left_out: kinds.

    Returns:
        The relative error that it makes; 0 where it leaves nothing out that matters, and NaN where nothing moved.

    Example:
        >>> missed({"MLP": torch.tensor([3.0]), "head": torch.tensor([1.0])})
        0.25
    """
    values = [value.double() for value in groups.values()]
    whole, gone = torch.stack(values).sum(0), torch.zeros_like(values[0])
    for group in left_out:
        gone = gone + groups[group].double() if group in groups else gone
    size = float(whole.norm())
    return float(gone.norm()) / size if size else float("nan")
