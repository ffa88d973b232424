"""Whose is each part of Megatron's tensors? Its GPT keeps several of Hugging Face's parameters in one.

    embedding.word_embeddings.weight                  model.embed_tokens.weight (rows beyond the vocabulary are padding)
    decoder.final_layernorm.weight                    model.norm.weight
    output_layer.weight                               lm_head.weight
    decoder.layers.self_attention.linear_qkv.*        q_proj, k_proj, v_proj: for each group of queries, its query
                                                      heads, its key head, its value head, one below the other
    …linear_qkv.layer_norm_weight                     input_layernorm.weight
    decoder.layers.self_attention.linear_proj.weight  o_proj.weight
    decoder.layers.self_attention.{q,k}_layernorm.*   q_norm.*, k_norm.*
    decoder.layers.mlp.linear_fc1.layer_norm_weight   post_attention_layernorm.weight
    decoder.layers.mlp.linear_fc1.weight              gate_proj.weight above up_proj.weight (or two keys, _w and _v)
    decoder.layers.mlp.linear_fc2.weight              down_proj.weight

Layers are stacked, as the first dimension, or have their number after "layers". It is so for dense Qwen2, Qwen3 and
Llama; every parameter of the model must be found, and nothing may be left. A model whose own names are Megatron's is
taken as it is.

Source: megatron-core 0.16.1, `transformer/attention.py` (SelfAttention.get_query_key_value_tensors), `transformer/
mlp.py` (apply_swiglu_sharded_factory), `transformer/transformer_block.py`, `models/gpt/gpt_layer_specs.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from fkernel.errors import CheckpointError, ModelError, listing
from fkernel.shapes import Tree

KNOWN = ("qwen2", "qwen3", "llama")
"""Model types of Hugging Face. Qwens are held against their Megatron twins; a Llama lacks their biases and norms."""
LAYER = re.compile(r"^(.*layers)\.(\d+)\.(.+)$")
ATTENTION, MLP = "decoder.layers.{}self_attention.", "decoder.layers.{}mlp."

Cut = Callable[[torch.Tensor], torch.Tensor]


class Piece(NamedTuple):
    """A part of one of Megatron's tensors.

    Attributes:
        key: Megatron's, with the layer's number where it is not stacked.
        layer: the number in a stacked tensor, else None.
        cut: takes the part of what is then left.
    """

    key: str
    layer: int | None
    cut: Cut


def gather(tensors: dict[str, torch.Tensor], pieces: Mapping[str, Piece], source: Any) -> Tree:
    """Take every parameter's part; a tensor is dropped when the last of it is taken.

    Args:
        tensors: {Megatron's key: whole tensor}; it is emptied.
        pieces: of `pieces_of`.
        source: where they were read, for messages.

    Returns:
        {the model's name: tensor}

    Raises:
        CheckpointError: a part does not exist in the tensor.
    """
    parts: Tree = {}
    by_key: dict[str, list[str]] = {}
    for name, piece in pieces.items():
        by_key.setdefault(piece.key, []).append(name)
    for key, names in by_key.items():
        tensor = tensors.pop(key)
        for name in names:
            piece = pieces[name]
            try:
                parts[name] = piece.cut(tensor if piece.layer is None else tensor[piece.layer])
            except (RuntimeError, IndexError, ValueError) as error:
                raise CheckpointError(
                    f"{source} holds {key!r} of shape {list(tensor.shape)}, of which no {name!r} can be cut: is it of "
                    f"another model?"
                ) from error
    return {name: parts[name] for name in pieces}


def pieces_of(model: Any, keys: Iterable[str], source: Any, whole: bool = True) -> dict[str, Piece]:
    """Find where each of a model's parameters lies in Megatron's tensors.

    Args:
        model: Hugging Face's, or one whose own names are Megatron's.
        keys: Megatron's keys.
        source: where they were read, for messages.
        whole: whether every parameter must be there; an optimizer has none of the frozen ones.

    Raises:
        ModelError: the model is of a type that is not known here, a parameter is nowhere, or something is left.
    """
    known = {*keys}
    shapes = {name: tuple(leaf.shape) for name, leaf in model.named_parameters()}
    options = _own(shapes) if any(name.startswith("decoder.") for name in shapes) else _of_hf(model, shapes)
    pieces: dict[str, Piece] = {}
    for name, places in options.items():
        piece = next((place for place in places if place.key in known), None)
        if piece is not None:
            pieces[name] = piece
    missing = [name for name in shapes if name not in pieces]
    if missing and whole:
        raise ModelError(
            f"{source} holds no {listing([options[name][0].key for name in missing])}, which {listing(missing)} would "
            f"be: it is of another model."
        )
    strange = sorted(known - {piece.key for piece in pieces.values()})
    if strange:
        raise ModelError(
            f"{source} holds {listing(strange)}, of which nothing is a parameter of the model: it is of another model."
        )
    return pieces


def _own(shapes: Iterable[str]) -> dict[str, list[Piece]]:
    """A model of Megatron's own: its layers may be stacked, and its norms named after what follows them."""
    renamed = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    options: dict[str, list[Piece]] = {}
    for name in shapes:
        match = LAYER.match(name)
        options[name] = [Piece(name, None, _all)]
        for old, new in renamed.items() if match else ():
            if match and match[3].startswith(old):
                options[name].append(Piece(f"{match[1]}.{match[2]}.{match[3].replace(old, new)}", None, _all))
        stacked = [(LAYER.match(place.key), place) for place in options[name]]
        options[name] += [Piece(f"{m[1]}.{m[3]}", int(m[2]), _all) for m, _ in stacked if m]
    return options


def _of_hf(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Piece]]:
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in KNOWN or config is None:
        raise ModelError(
            f"A checkpoint of Megatron's names its parameters in its own way, and which of them a {kind!r} has is not "
            f"known here; {', '.join(KNOWN)} are. Convert it with its own tools (megatron-bridge, mbridge), or give a "
            f"model= whose names are Megatron's."
        )
    return {name: _options(name, shape, config) for name, shape in shapes.items()}


def _options(name: str, shape: tuple[int, ...], config: Any) -> list[Piece]:
    top = {
        "model.embed_tokens.weight": ("embedding.word_embeddings.weight", _first(shape[0])),
        "model.norm.weight": ("decoder.final_layernorm.weight", _all),
        "lm_head.weight": ("output_layer.weight", _first(shape[0])),
    }
    if name in top:
        return [Piece(top[name][0], None, top[name][1])]
    match = LAYER.match(name)
    if match is None:
        raise ModelError(f"Megatron's checkpoints of {config.model_type!r} are known here without a {name!r}.")
    module, _, kind = match[3].rpartition(".")
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    qkv = f"{ATTENTION}linear_qkv.{kind}"
    places: dict[str, list[tuple[str, Cut]]] = {
        "self_attn.q_proj": [(qkv, _head(groups, heads, slice(0, heads // groups)))],
        "self_attn.k_proj": [(qkv, _head(groups, heads, slice(-2, -1)))],
        "self_attn.v_proj": [(qkv, _head(groups, heads, slice(-1, None)))],
        "self_attn.o_proj": [(f"{ATTENTION}linear_proj.{kind}", _all)],
        "self_attn.q_norm": [(f"{ATTENTION}q_layernorm.{kind}", _all)],
        "self_attn.k_norm": [(f"{ATTENTION}k_layernorm.{kind}", _all)],
        "mlp.gate_proj": [(f"{MLP}linear_fc1.{kind}", _half(0)), (f"{MLP}linear_fc1.{kind}_w", _all)],
        "mlp.up_proj": [(f"{MLP}linear_fc1.{kind}", _half(1)), (f"{MLP}linear_fc1.{kind}_v", _all)],
        "mlp.down_proj": [(f"{MLP}linear_fc2.{kind}", _all)],
        "input_layernorm": [
            (f"{ATTENTION}linear_qkv.layer_norm_{kind}", _all),
            ("decoder.layers.{}input_layernorm." + kind, _all),
        ],
        "post_attention_layernorm": [
            (f"{MLP}linear_fc1.layer_norm_{kind}", _all),
            ("decoder.layers.{}pre_mlp_layernorm." + kind, _all),
        ],
    }
    if module not in places:
        raise ModelError(f"Megatron's checkpoints of {config.model_type!r} are known here without a {name!r}.")
    layer = int(match[2])
    stacked = [Piece(key.format(""), layer, cut) for key, cut in places[module]]
    return stacked + [Piece(key.format(f"{layer}."), None, cut) for key, cut in places[module]]


def _all(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _first(rows: int) -> Cut:
    """The vocabulary's rows; Megatron pads it to a multiple of 128 and of its ranks."""

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        if len(tensor) < rows:
            raise ValueError
        return tensor[:rows]

    return cut


def _half(which: int) -> Cut:
    """The gate's rows, or the other half."""

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        if len(tensor) % 2:
            raise ValueError
        return tensor.chunk(2)[which]

    return cut


def _head(groups: int, heads: int, which: slice) -> Cut:
    """Some heads of each group: rows are [group, head in it, size of a head]."""

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        grouped = tensor.reshape(groups, heads // groups + 2, -1, *tensor.shape[1:])
        return grouped[:, which].reshape(-1, *tensor.shape[1:])

    return cut
