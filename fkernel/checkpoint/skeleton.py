"""A model without its weights: what a kernel of it would take, from its configuration alone.

The module is built on PyTorch's meta device, where tensors have shapes and no storage, and the engine is run on it as
it would be on the model itself: the same operations are counted, so the counts are equal.
"""

from __future__ import annotations

import copy
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fkernel import tree
from fkernel.engine.planning import (
    LONG,
    Curve,
    Estimate,
    Walk,
    Work,
    Workload,
    counted,
    rates,
    usual_microbatch,
    walk_of,
    weighed,
)
from fkernel.errors import BatchError, FKernelError, ModelError, listing
from fkernel.func import make_functional, sequence_logprob, split
from fkernel.func.inputs import Objective, Sequences, bare, pad, translate_errors
from fkernel.func.layers import FUSED, cut_of
from fkernel.func.taps import ONE_AT_A_TIME, make_plan
from fkernel.io import parse_bytes
from fkernel.shapes import Tree

SHAPE = (
    "hidden_size=896,intermediate_size=4864,num_hidden_layers=24,num_attention_heads=14,num_key_value_heads=2,"
    "vocab_size=151936"
)
"""Qwen2.5-0.5B, as an example of a shape."""
FEW = 8
"""Tokens of the vocabulary that the first layer is counted with."""
LARGEST = 1 << 28
"""Parameters of a layer that is built, at most."""
NARROW = 8
"""What widths are divided by, of a larger one."""
WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
OPTIONAL = ("num_key_value_heads", "tie_word_embeddings")


class Skeleton(NamedTuple):
    """What the engine takes, without values.

    Attributes:
        logprob: S, (params, Sequences) -> [n].
        params: {name: tensor on the meta device}.
        one: one sequence, on the meta device.
    """

    logprob: Objective
    params: Tree
    one: Sequences


def skeleton_of(model: str | Path, tokens: int, dtype: torch.dtype = torch.float32) -> Skeleton:
    """Build a causal language model without weights, and a sequence without tokens.

    Args:
        model: a directory with a `config.json`, or a shape of Qwen2's architecture: `key=value,…` with hidden_size,
            intermediate_size, num_hidden_layers, num_attention_heads, vocab_size, and, where they are not the number of
            attention heads and 1 (true), num_key_value_heads and tie_word_embeddings.
        tokens: of the sequence, prompt and response together.
        dtype: of the parameters.

    Raises:
        ModelError: `model` is neither, or transformers builds no causal language model from it.
        BatchError: the model's context holds fewer tokens, or no response fits into so few.

    Example:
        >>> shape = "hidden_size=8,intermediate_size=16,num_hidden_layers=1,num_attention_heads=2,vocab_size=32"
        >>> logprob, params, one = skeleton_of(shape, tokens=5)
        >>> one.input_ids
        tensor(..., device='meta', size=(1, 5), dtype=torch.int64)
    """
    if tokens < 2:
        raise BatchError(f"tokens is {tokens}; expected at least 2, one of a prompt and one of a response.")
    from transformers import AutoModelForCausalLM

    config = _configuration(str(model))
    try:
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", dtype=dtype, trust_remote_code=False
            )
    except Exception as error:  # transformers and its models raise whatever they like
        raise ModelError(f"transformers builds no causal language model from {model}: {_first_line(error)}") from error
    apply, params = split(module.eval(), [name for name, _ in module.named_parameters()])
    if apply.max_length is not None and tokens > apply.max_length:
        raise BatchError(f"tokens is {tokens}, the model's context holds {apply.max_length}; estimate for fewer.")
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    return Skeleton(sequence_logprob(apply), params, Sequences(ids, ids.bool(), ids.bool()))


def workload_of(bones: Skeleton, n_U: int, n_E: int, whole: bool = True) -> Workload:
    """Count what a kernel of n_U × n_E such sequences has to do.

    Args:
        bones: the model.
        n_U: update sequences.
        n_E: evaluation sequences.
        whole: whether whole gradients of short sequences are counted, too, and not the walk by layers alone.

    Raises:
        BatchError: a side has no sequence.
        ModelError: the model asks for values on its way.
    """
    for name, n in (("n_U", n_U), ("n_E", n_E)):
        if n < 1:
            raise BatchError(f"{name} is {n}; expected at least one sequence.")
    f, params, one = bones
    T = one.input_ids.shape[1]
    tokens = {"E": [T] * n_E, "U": [T] * n_U}
    if (T > LONG or not whole) and not (isinstance(walk := _walk(f.apply.module, T), str) and whole):
        leaf = next(iter(params.values()))
        return Workload(tokens, tree.size(params), leaf.element_size(), 0.0, None, walk=walk)
    try:
        plan = make_plan(bare(f), params, one)
    except FKernelError:
        raise
    except RuntimeError:  # vmap cannot follow the model: gradients are taken one sequence at a time
        plan = ONE_AT_A_TIME
    try:
        with translate_errors(params):
            found = counted(f, params, one, tokens, plan)
            found.walk = _walk(f.apply.module, T)
            return found
    except RuntimeError as error:
        raise ModelError(
            f"The model cannot be counted without its weights: {_first_line(error)} Load it, and use fkernel.estimate."
        ) from error


def estimate_model(
    model: str | Path,
    n_U: int,
    n_E: int,
    tokens: int,
    *,
    memory: int | str | None = None,
    store: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Estimate:
    """Predict memory, disk and time of a kernel, from a model's configuration: no weights are read or allocated.

    Args:
        model: as in `skeleton_of`.
        n_U: update sequences.
        n_E: evaluation sequences.
        tokens: of each sequence.
        memory: as in `fkernel.kernel`.
        store: whether a directory to store gradients in will be given.
        dtype: of the parameters.

    Returns:
        What `fkernel.estimate` returns for the model itself, all its parameters and a diagonal preconditioner.

    Raises:
        ModelError, BatchError: as `skeleton_of`; or `memory` is no size. A grant that nothing fits is no error here.

    Example:
        >>> shape = "hidden_size=8,intermediate_size=16,num_hidden_layers=1,num_attention_heads=2,vocab_size=32"
        >>> found = estimate_model(shape, n_U=4, n_E=2, tokens=8, memory="100MB")
        >>> found.workload.size, [option.name for option in found.options]
        (944, ['sequences', 'layers', 'store'])
    """
    budget = None if memory is None else parse_bytes(memory)
    load = workload_of(skeleton_of(model, tokens, dtype), n_U, n_E)
    microbatch = usual_microbatch(None, pad([[0]], [[0] * (tokens - 1)]))
    return weighed(load, rates(dtype), budget, microbatch, store)


def _walk(module: Any, T: int) -> Walk | str:
    """Count the model layer by layer on its first layer, which alone is built, with a vocabulary of a few tokens."""
    try:
        return _first_layer_deepened(module, T)
    except Exception as error:  # a model of one layer may fail in any way
        return f"its first layer cannot be counted by itself ({_first_line(error)})"


def _first_layer_deepened(module: Any, T: int) -> Walk | str:
    config = copy.deepcopy(module.config)
    depth, table = config.num_hidden_layers, module.get_output_embeddings()
    large = (sum(leaf.numel() for leaf in module.parameters()) - table.weight.numel()) / depth > LARGEST
    changes = {"num_hidden_layers": 1, "vocab_size": FEW, "layer_types": getattr(config, "layer_types", None)}
    for name, value in changes.items():
        if value is not None:
            setattr(config, name, value[:1] if isinstance(value, list) else value)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, None)
    attention, dtype, wide = "sdpa" if T > FUSED else "eager", table.weight.dtype, None
    if large:
        with torch.device("meta"):
            wide = _with_attention(attention, config, dtype)
        config = _narrow(config)
    with torch.random.fork_rng(devices=[]):
        model = _with_attention(attention, config, dtype)
    apply, params = make_functional(model)
    cut = cut_of(sequence_logprob(apply), params, pad([[0, 1]], [[2, 3, 0]]))
    if isinstance(cut, str):
        return cut
    if wide is not None and (why := _unlike(wide, model)):
        return why
    one = walk_of(cut, params, {"E": [T], "U": [T]}, wide)
    forward, backward = (_deeper(curve, depth) for curve in (one.forward, one.backward))
    looked_up = sum(module.get_parameter(name).numel() for name in cut.tables if name != cut.table)
    sizes = {"head": table.weight.numel(), "looked_up": looked_up}
    return one._replace(depth=depth, forward=forward, backward=backward, **sizes)


def _narrow(config: Any) -> Any:
    """Return a configuration with narrower layers, of heads of the same size: what calls the layers stays the same."""
    narrow = copy.deepcopy(config)
    for name in WIDTHS:
        if (width := getattr(config, name, None)) is not None:
            setattr(narrow, name, max(1, width // NARROW))
    return narrow


def _unlike(wide: Any, narrow: Any) -> str:
    """Say why a narrow model does not stand for a wide one; empty where it does."""
    heads = [model.config.hidden_size // model.config.num_attention_heads for model in (wide, narrow)]
    names = [[name for name, _ in model.named_parameters()] for model in (wide, narrow)]
    buffers = [name for name, _ in wide.named_buffers() if "0" in name.split(".")]  # a layer's, which has no values
    alike = heads[0] == heads[1] and names[0] == names[1] and not buffers
    return "" if alike else f"a layer of more than {LARGEST:,} parameters is not built, and no narrower one is like it"


def _with_attention(attention: str, config: Any, dtype: torch.dtype) -> Any:
    """Build a model with fused attention, as long sequences are computed; with eager one, where it knows no other."""
    from transformers import AutoModelForCausalLM

    try:
        given = {"attn_implementation": attention, "dtype": dtype, "trust_remote_code": False}
        return AutoModelForCausalLM.from_config(config, **given)
    except ValueError:
        if attention == "eager":
            raise
        return _with_attention("eager", config, dtype)


def _deeper(curve: Curve, depth: int) -> Curve:
    def deeper(work: Work) -> Work:
        peak, kept = depth * work.peak, depth * work.kept
        return work.times(depth)._replace(weights=depth * work.weights, calls=depth * work.calls, peak=peak, kept=kept)

    return Curve(tuple((t, deeper(work)) for t, work in curve.points))


def _configuration(model: str) -> Any:
    """Read config.json, or a shape."""
    from transformers import AutoConfig

    if os.path.isfile(os.path.join(model, "config.json")):
        try:
            return AutoConfig.from_pretrained(model, trust_remote_code=False, local_files_only=True)
        except Exception as error:
            raise ModelError(f"{model}/config.json is no configuration of a model: {_first_line(error)}") from error
    if "=" not in model:
        found = "which holds no config.json" if os.path.isdir(model) else "no such directory"
        raise ModelError(f"MODEL is {model!r} ({found}); expected a directory with config.json, or a shape: {SHAPE}")
    shape = _shape(model)
    shape.setdefault("num_key_value_heads", shape["num_attention_heads"])
    for whole, part in (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads")):
        if shape[whole] % shape[part]:
            raise ModelError(f"{whole}={shape[whole]} is no multiple of {part}={shape[part]}.")
    shape["tie_word_embeddings"] = bool(shape.get("tie_word_embeddings", True))
    return AutoConfig.for_model("qwen2", **shape)


def _shape(text: str) -> dict[str, int]:
    """Read key=value,…; every mistake is named."""
    shape: dict[str, int] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        key, _, value = map(str.strip, part.partition("="))
        valid = [*REQUIRED, *OPTIONAL]
        if key not in valid:
            near = " or ".join(map(repr, get_close_matches(key, valid, n=2)))
            hint = f"did you mean {near}?" if near else f"expected one of {', '.join(valid)}."
            raise ModelError(f"The shape knows no {key!r}; {hint}")
        if key in shape:
            raise ModelError(f"The shape gives {key!r} twice.")
        shape[key] = _number(key, value)
    missing = [key for key in REQUIRED if key not in shape]
    if missing:
        raise ModelError(f"The shape lacks {listing(missing, len(missing))}; a whole one is {SHAPE}")
    return shape


def _number(key: str, value: str) -> int:
    flag = key == "tie_word_embeddings"
    try:
        number = int({"true": "1", "false": "0"}.get(value.lower(), value) if flag else value)
    except ValueError:
        number = -1
    if number not in (0, 1) if flag else number < 1:
        expected = "0 or 1" if flag else "a whole number of at least 1"
        raise ModelError(f"{key} is {value!r}; expected {expected}.")
    return number


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
