"""module → (apply, params): a language model as a pure function of its parameters.

The caller's module is never changed. A copy of its structure (not of its tensors) is configured for differentiation
(eager attention, eval mode, no activation checkpointing), and parameters are passed by `torch.func.functional_call`.
Eager attention, because SDPA has no forward-mode derivative and its masking breaks vmap.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fkernel.boundary import public
from fkernel.errors import BatchError, ModelError, listing
from fkernel.func.constants import seen_through
from fkernel.func.inputs.called import arguments_of
from fkernel.func.inputs.objective import is_readable
from fkernel.func.padding import padding_rows, trained_padding
from fkernel.shapes import Tensor, Tree


@dataclass(frozen=True, eq=False)
class Apply:
    """apply(params, input_ids [n t], attention_mask [n t]) -> logits [n t v], with what is known of the model.

    Attributes:
        module: the structural copy, configured for differentiation.
        vocab_size: rows of the input embedding, or None if unknown.
        max_length: rows of a learned position table, or None (rotary positions are unlimited).
        padding_idx: the id whose embedding row gets no gradient in training, or None.
        own_width: whether log π of a sequence depends on the width of its batch, so that sequences of different lengths
            may not share one (dynamic and long rotary scaling).
        original: the caller's module in eval mode, with which `fkernel.func.trust.comparisons` compares values.
        withholds: whether padding rows get no gradient, as in training; None without such rows. See
            `fkernel.func.padding`.
        through_detach: whether detached values are differentiated as well; see `fkernel.func.detach`.
    """

    module: nn.Module = field(repr=False)
    vocab_size: int | None
    max_length: int | None
    padding_idx: int | None = None
    own_width: bool = False
    original: nn.Module | None = field(default=None, repr=False)
    withholds: bool | None = None
    through_detach: bool = False

    def __call__(self, params: Tree, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Run the module with `params` in place of its own."""
        rows = nullcontext() if self.withholds is None else padding_rows(self.withholds)
        detached = seen_through() if self.through_detach else nullcontext()
        with rows, detached, sdpa_kernel(SDPBackend.MATH), unchanged(self.module if self.own_width else None):
            return logits_of(self.module, params, input_ids, attention_mask)


def logits_of(module: nn.Module, params: Tree, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Run a module and return its logits of the input tokens, [n t v].

    Hugging Face modules return them as an attribute; some, with a value head, first in a tuple; prompt tuning prepends
    virtual tokens, whose logits are dropped.

    Raises:
        ModelError: there are no logits, or fewer than tokens.
        BatchError: the batch is padded on the left.
    """
    args, named = arguments_of(module, input_ids, attention_mask)
    if named:
        _refuse_left_padding(attention_mask)
        # With right-padding a causal model does not attend to padding, so a mask of ones is equivalent. It avoids
        # padding rows outside of every sliding window, whose softmax over nothing is NaN in float64. It is not derived
        # from the mask, since models may not branch on a vmapped tensor; int64 as a tokenizer's, since some compute
        # with it.
        named["attention_mask"] = torch.ones(attention_mask.shape, dtype=torch.int64, device=attention_mask.device)
    with _differentiable_layers():
        out: Any = functional_call(module, params, args, named)
    z = getattr(out, "logits", out)
    z = z[0] if isinstance(z, (tuple, list)) and z else z
    t = input_ids.shape[-1]
    if not isinstance(z, Tensor) or z.ndim != 3 or z.shape[1] < t:
        given = list(z.shape) if isinstance(z, Tensor) else type(out).__name__
        raise ModelError(
            f"{type(module).__name__} returned {given} for input_ids of {list(input_ids.shape)}; expected logits "
            f"[n t v], as a tensor, as the attribute `logits`, or first in a tuple."
        )
    return z[:, -t:]


@contextmanager
def _differentiable_layers() -> Iterator[None]:
    """In eval mode `nn.TransformerEncoderLayer` and `nn.MultiheadAttention` may take kernels without a derivative."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def unchanged(module: nn.Module | None) -> Iterator[None]:
    """Restore module state after a forward pass: dynamic rotary scaling remembers the longest width."""
    parts = [] if module is None else [part for part in module.modules() if hasattr(part, "rope_type")]
    before = [(part, dict(part.__dict__), dict(part._buffers)) for part in parts]
    try:
        yield
    finally:
        for part, attributes, buffers in before:
            part.__dict__.clear()
            part.__dict__.update(attributes | {"_buffers": buffers})


@public
def make_functional(
    model: nn.Module,
    select: Iterable[str] | Callable[[str], bool] | None = None,
    *,
    own_width: bool | None = None,
) -> tuple[Apply, Tree]:
    """Split a module into a pure function and its parameters.

    Args:
        model: a Hugging Face causal language model (a PEFT model too), or any module called as
            `module(input_ids, attention_mask) -> logits [n t v]`.
        select: which parameters to differentiate: names, or a predicate on names. None takes those with
            `requires_grad`. The others are captured as constants.
        own_width: whether a sequence's log π depends on the width of its batch, so that only sequences of one length
            may share a batch. None: True for dynamic and long rotary scaling, as configured.

    Returns:
        apply: (params, input_ids [n t], attention_mask [n t]) -> logits [n t v].
        params: {name: detached tensor}. Tied weights appear once, under the first of their names. The tensors share
            storage with the model: `fkernel.tree.map(torch.clone, params)` keeps them across an optimizer step.
            Of a module without weights (`without_weights`) they are on the meta device, and have no values: give this
            rank's shards of them instead, with a mesh.

    Raises:
        ModelError: nothing to differentiate, or an unknown name in `select`.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> shape = {"vocab_size": 11, "n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 1}
        >>> model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
        >>> apply, params = make_functional(model, select=lambda name: "ln_f" in name)
        >>> sorted(params)
        ['transformer.ln_f.bias', 'transformer.ln_f.weight']
    """
    named = dict(model.named_parameters())
    chosen = _choose(named, select)
    apply, params = split(model, chosen)
    original = structural_copy(model).eval()
    return replace(apply, original=original, own_width=apply.own_width if own_width is None else own_width), params


@public
def split(model: nn.Module, chosen: Collection[str]) -> tuple[Apply, Tree]:
    """Split without `make_functional`'s checks; the parameters may be on the meta device.

    Args:
        model: a module.
        chosen: names of the parameters to differentiate; the others are constants.

    Example:
        >>> with torch.device("meta"):
        ...     layer = nn.Linear(2, 3)
        >>> split(layer, ["bias"])[1]
        {'bias': tensor(..., device='meta', size=(3,))}
    """
    named = dict(model.named_parameters())
    module = structural_copy(model)
    _configure(module)
    padded = any(getattr(part, "padding_idx", None) is not None for part in module.modules())
    apply = Apply(
        module,
        vocab_size=_vocab_size(module),
        max_length=_max_length(module),
        padding_idx=trained_padding(module, chosen),
        own_width=_own_width(module),
        withholds=False if padded else None,
    )
    return apply, {name: named[name].detach() for name in chosen}


def _vocab_size(module: nn.Module) -> int | None:
    """Return the rows of the input embedding, also if wrapped."""
    embedding = module.get_input_embeddings() if hasattr(module, "get_input_embeddings") else None  # pyright: ignore
    tables = [part for part in embedding.modules() if isinstance(part, nn.Embedding)] if embedding is not None else []
    return tables[0].num_embeddings if tables else getattr(embedding, "num_embeddings", None)


def _own_width(module: nn.Module) -> bool:
    """Return whether rotary positions are scaled by the width of the batch."""
    types = [getattr(part, "rope_type", None) for part in module.modules()]
    kinds = [kind for entry in types for kind in (entry.values() if isinstance(entry, dict) else [entry])]
    return any(kind in ("dynamic", "longrope") for kind in kinds)


def _refuse_left_padding(attention_mask: Tensor) -> None:
    if is_readable(attention_mask) and bool((attention_mask[:, :-1].bool() < attention_mask[:, 1:].bool()).any()):
        raise BatchError("attention_mask is padded on the left or has a hole; apply takes right-padded batches only.")


def _choose(named: dict[str, nn.Parameter], select: Iterable[str] | Callable[[str], bool] | None) -> list[str]:
    if select is None:
        chosen = [name for name, parameter in named.items() if parameter.requires_grad]
        if not chosen:
            raise ModelError(
                f"None of the model's {len(named)} parameters requires a gradient, so there is nothing to "
                f"differentiate; thaw some (parameter.requires_grad_(True)) or name them with select=."
            )
    elif callable(select):
        chosen = [name for name in named if select(name)]
        if not chosen:
            raise ModelError(f"select accepted none of the {len(named)} parameter names, such as {listing([*named])}.")
    else:
        wanted = [select] if isinstance(select, str) else list(select)
        unknown = [name for name in wanted if name not in named]
        if unknown or not wanted:
            raise ModelError(
                f"select names {listing(unknown) if unknown else 'no parameter'}; the model has {listing([*named])}. "
                f"A tied weight goes by the first of its names."
            )
        chosen = [name for name in named if name in set(wanted)]
    return chosen


def _max_length(module: nn.Module) -> int | None:
    """Return the rows of a learned position table; None for rotary positions."""
    config = getattr(module, "config", None)
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)
    rows = None if rotary else getattr(config, "max_position_embeddings", None)
    return rows if rows is not None and rows > 0 else None  # −1 means unlimited


def structural_copy(model: nn.Module) -> nn.Module:
    """Copy modules and configuration, share tensors; parameters become constants (ties stay ties)."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def _configure(module: nn.Module) -> None:
    module.eval()
    for part in module.modules():
        config = getattr(part, "config", None)
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False  # pyright: ignore  # log π excludes the load-balancing loss of experts
        if _keeps(part, "_experts_implementation", "batched_mm"):
            part.set_experts_implementation("batched_mm")  # pyright: ignore[reportCallIssue]
        for verb in ("activation", "gradient"):  # transformers ≥ 5.20 and before
            if hasattr(part, f"{verb}_checkpointing_disable"):
                getattr(part, f"{verb}_checkpointing_disable")()
                break
        if hasattr(part, "disable_input_require_grads"):  # checkpointing leaves a hook on the embedding
            part.disable_input_require_grads()  # pyright: ignore[reportCallIssue]
        if _keeps(part, "_attn_implementation", "eager"):
            part.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
        if getattr(config, "_attn_implementation", None) not in (None, "eager"):
            config._attn_implementation = "eager"  # pyright: ignore  # some cannot be set, but read it at every call


def _keeps(part: nn.Module, setting: str, wanted: str) -> bool:
    """Return whether a Hugging Face module has another setting and can be reset (eager experts fail under vmap)."""
    value = getattr(getattr(part, "config", None), setting, None)
    return value not in (None, wanted) and hasattr(part, f"set{setting}")
