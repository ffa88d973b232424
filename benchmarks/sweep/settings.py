"""Tiny models of every causal language model in transformers.

Most configurations share their fields' names, so one table of small sizes (`sizes.SMALL`) builds most model types: each
size is set where the type's default configuration has a field of that name, in sub-configurations (text, vision, audio)
too. Lists of layer types are cut to one layer of each. `sizes.PARTICULAR` holds what single types need beyond that.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.sweep.sizes import LAYERS, PARTICULAR, SMALL

KINDS: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Every model type that `AutoModelForCausalLM` knows."""


def tiny_config(kind: str) -> PreTrainedConfig:
    """Make the type's configuration with small sizes."""
    return AutoConfig.for_model(kind, **small_fields(AutoConfig.for_model(kind)))


def build(kind: str) -> nn.Module:
    """Make a model of the type with transformers' own initial weights."""
    return AutoModelForCausalLM.from_config(tiny_config(kind))


def small_fields(default: PreTrainedConfig) -> dict[str, Any]:
    """Choose the fields of a default configuration that have to be smaller, and say how small."""
    written = default.to_dict()
    known = {**{name: name for name in written}, **type(default).attribute_map}
    fields = {name: SMALL[name] for name, own in known.items() if name in SMALL and written.get(own) is not None}
    if {"kv_lora_rank", "num_key_value_heads"} <= set(fields):
        fields["num_key_value_heads"] = fields["num_attention_heads"]  # latent attention has as many
    for name in default.sub_configs:
        nested = getattr(default, name, None)
        if isinstance(nested, PreTrainedConfig):
            fields[name] = {"model_type": nested.model_type, **small_fields(nested)}
    return {**fields, **_layer_types(written), **PARTICULAR.get(default.model_type, {})}


def _layer_types(fields: dict[str, Any]) -> dict[str, Any]:
    """Keep one layer of each kind in every list of layers' kinds, and as many layers."""
    kinds = {name: list(dict.fromkeys(value)) for name, value in fields.items() if _is_list_of_kinds(name, value)}
    if not kinds:
        return {}
    layers = max(LAYERS, *(len(listed) for listed in kinds.values()))
    cut = {name: (listed * layers)[:layers] for name, listed in kinds.items()}
    return {**cut, "num_hidden_layers": layers}


def _is_list_of_kinds(name: str, value: Any) -> bool:
    return name.endswith(("layer_types", "block_type")) and isinstance(value, list) and bool(value)
