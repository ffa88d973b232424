"""A step's effect by parts of the model, and the error of methods that leave some parts out.

An inner product is a sum over parameters, so every quantity is a sum over parts:

    C_e = Σ_groups C_e^group,   C_eu^group = c w_u A_u Σ_{names in group} ⟨∇S_e[name], P ∇S_u[name]⟩

Every part (layer and kind at once) is contracted once; layers and kinds are sums of parts.

    share    Σ |C^group| / Σ_groups Σ |C^group|     of the absolute effect
    missed   ‖Σ_{left out} C^group‖ / ‖C‖           the relative error of a method that leaves some kinds out
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from fkernel import func, tree
from fkernel.boundary import public
from fkernel.errors import TreeError, listing
from fkernel.func import by_kind, by_layer
from fkernel.shapes import Tensor

ENDS = ("embedding", "positions", "head")
"""Kinds that common methods leave out."""


@public
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


@public
def summed(parts: Mapping[str, Tensor], names: Iterable[str], key: Callable[[str], str]) -> dict[str, Tensor]:
    """Sum parts into coarser groups.

    C^group = Σ_{parts in group} C^part;  Σ_groups C^group = Σ_parts C^part

    Args:
        parts: {part: tensor}, of `by_part`.
        names: of the parameters in these parts, which determine the group of each part.
        key: name ↦ group, such as `func.by_kind`.

    Raises:
        TreeError: a part would belong to several groups, or parts and names are of different parameters.

    Example:
        >>> names = ["h.0.mlp.up_proj", "h.1.mlp.up_proj"]
        >>> summed({by_part(name): torch.ones(1) for name in names}, names, by_kind)
        {'MLP': tensor([2.])}
    """
    tree.check_finite(parts, "parts")
    sums: dict[str, Tensor] = {}
    for part, group in _groups(parts, names, key).items():  # in the model's order, whatever the order of gradients
        sums[group] = sums[group] + parts[part] if group in sums else parts[part]
    return sums


def _groups(parts: Mapping[str, Tensor], names: Iterable[str], key: Callable[[str], str]) -> dict[str, str]:
    """Return the group of each part."""
    members = func.grouped(names, by_part)
    tree.check_names(parts, members, "parts", "names")
    groups_of = {part: [*dict.fromkeys(map(key, own))] for part, own in members.items()}
    for part, groups in groups_of.items():
        if len(groups) > 1:
            raise TreeError(
                f"The part {part!r} has parameters of {len(groups)} groups, {listing(groups)}; expected groups of "
                f"whole parts. Take a coarser key, or split the kernel by this one: func.contract_by(x, y, key)."
            )
    return {part: groups[0] for part, groups in groups_of.items()}


@public
def shares(groups: Mapping[str, Tensor]) -> dict[str, float]:
    """Compute each group's share of the absolute effect; shares add up to 1.

    Σ |C^group| / Σ_groups Σ |C^group|

    Args:
        groups: {group: [...]}, such as contributions by kind.

    Example:
        >>> shares({"MLP": torch.tensor([1.0, -1.0]), "norm": torch.tensor([0.0, 2.0])})
        {'MLP': 0.5, 'norm': 0.5}
    """
    tree.check_finite(groups, "groups")
    sizes = {group: float(value.double().abs().sum()) for group, value in groups.items()}
    total = sum(sizes.values())
    return {group: size / total if total else 0.0 for group, size in sizes.items()}


@public
def missed(groups: Mapping[str, Tensor], left_out: Iterable[str] = ENDS) -> float:
    """Compute the relative error of a method that leaves some kinds out.

    ‖Σ_{left out} C^group‖ / ‖Σ_groups C^group‖

    Args:
        groups: {kind: [...]}, which add up to the whole.
        left_out: kinds.

    Returns:
        The relative error; NaN where the whole is zero.

    Example:
        >>> missed({"MLP": torch.tensor([3.0]), "head": torch.tensor([1.0])})
        0.25
    """
    tree.check_finite(groups, "groups")
    values = [value.double() for value in groups.values()]
    total, gone = torch.stack(values).sum(0), torch.zeros_like(values[0])
    for group in left_out:
        gone = gone + groups[group].double() if group in groups else gone
    size = float(total.norm())
    return float(gone.norm()) / size if size else float("nan")
