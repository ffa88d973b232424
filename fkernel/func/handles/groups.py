"""Groups of a language model's parameters, by layer or kind, and kernels by group.

    K[n, m] = Σ_groups Σ_{names in group} ⟨x[name]_n, D y[name]_m⟩

An inner product is a sum over parameters, so the parts add up to the whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from fkernel.boundary import public
from fkernel.func.handles.forms import Handles
from fkernel.func.handles.products import contract
from fkernel.shapes import Tensor, Tree

KINDS = (
    (r"lora_a", "LoRA A"),
    (r"lora_b", "LoRA B"),
    (r"norm|(^|\.)ln_|layernorm|\.ln\d", "norm"),
    (r"(^|\.)(embed_tokens|wte|embed_in|tok_embeddings)\b", "embedding"),
    (r"(^|\.)(wpe|embed_positions|position_embeddings)\b", "positions"),
    (r"(^|\.)(lm_head|embed_out|output)\b", "head"),
    (r"\b(q_proj|query)\b", "attention q"),
    (r"\b(k_proj|key)\b", "attention k"),
    (r"\b(v_proj|value)\b", "attention v"),
    (r"\b(c_attn|qkv_proj|query_key_value|W_pack)\b", "attention qkv"),
    (r"attn.*\b(o_proj|out_proj|c_proj|dense)\b|attention.*\bdense\b", "attention o"),
    (r"mlp|fc\d|gate_proj|up_proj|down_proj|experts|feed_forward", "MLP"),
)
"""(pattern, kind), the first match counts; for names of Hugging Face models."""


class Part(NamedTuple):
    """Layer and kind of a parameter.

    Attributes:
        layer: number of the block, or None outside of blocks.
        kind: "embedding", "attention q", …, "MLP", "norm", "head", "LoRA A", "LoRA B" or "other".
    """

    layer: int | None
    kind: str


@public
def part_of(name: str) -> Part:
    """Find the layer and kind of a parameter by its name.

    Args:
        name: as `named_parameters` has it.

    Example:
        >>> part_of("model.layers.3.self_attn.q_proj.weight")
        Part(layer=3, kind='attention q')
        >>> part_of("transformer.wte.weight")
        Part(layer=None, kind='embedding')
    """
    number = re.search(r"\.(?:layers|h|blocks?)\.(\d+)\.", f".{name}")
    kind = next((kind for pattern, kind in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")
    return Part(None if number is None else int(number.group(1)), kind)


@public
def by_kind(name: str) -> str:
    """Group parameters by kind: "embedding", "attention q", "MLP", ….

    Args:
        name: as `named_parameters` has it.

    Example:
        >>> by_kind("model.layers.3.mlp.up_proj.weight")
        'MLP'
    """
    return part_of(name).kind


@public
def by_layer(name: str) -> str:
    """Group parameters by block; those outside of blocks by kind.

    Args:
        name: as `named_parameters` has it.

    Example:
        >>> by_layer("model.layers.3.mlp.up_proj.weight"), by_layer("lm_head.weight")
        ('layer 3', 'head')
    """
    layer, kind = part_of(name)
    return kind if layer is None else f"layer {layer}"


@public
def grouped(names: Iterable[str], key: Callable[[str], str] = by_kind) -> dict[str, list[str]]:
    """Sort names into groups, in the order in which they first occur.

    Args:
        names: of parameters.
        key: name ↦ group, such as `by_kind` and `by_layer`.

    Example:
        >>> grouped(["wte.weight", "h.0.ln_1.weight", "h.0.ln_2.weight"])
        {'embedding': ['wte.weight'], 'norm': ['h.0.ln_1.weight', 'h.0.ln_2.weight']}
    """
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(key(name), []).append(name)
    return members


@public
def contract_by(
    x: Handles, y: Handles, key: Callable[[str], str] = by_kind, *, diagonal: Tree | None = None
) -> dict[str, Tensor]:
    """Compute a kernel's parts, {group: [n m]}; their sum is `contract(x, y, diagonal=diagonal)`.

    Args:
        x: {name: [n, *shape]}, or handles.
        y: {name: [m, *shape]}, or handles, of the same parameters.
        key: name ↦ group.
        diagonal: D, {name: [*shape]}; None for ones.

    Raises:
        As `contract`.

    Example:
        >>> import torch
        >>> J = {"wte.weight": torch.ones(1, 2), "lm_head.weight": torch.ones(1, 3)}
        >>> {group: K.item() for group, K in contract_by(J, J).items()}
        {'embedding': 2.0, 'head': 3.0}
    """
    return {
        group: contract(
            {name: x[name] for name in names},
            {name: y[name] for name in names},
            diagonal=None if diagonal is None else {name: diagonal[name] for name in names},
        )
        for group, names in grouped(x, key).items()
    }
