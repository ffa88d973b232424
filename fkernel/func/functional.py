"""module → (apply, params): a language model as a pure function of its parameters.

The caller's module is never changed. A copy of its structure (not of its tensors) is put right for differentiation
(eager attention, eval mode, no activation checkpointing), and its parameters are handed in by
`torch.func.functional_call`. Why eager attention: SDPA has no forward-mode derivative, and its masking breaks vmap.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.func import functional_call

from fkernel.errors import BatchError, ModelError, listing
from fkernel.func.objective import is_readable
from fkernel.shapes import Tensor, Tree


@dataclass(frozen=True, eq=False)
class Apply:
    """apply(params, input_ids [n t], attention_mask [n t]) -> logits [n t v], with what is known of the model.

    Attributes:
        vocab_size: rows of the input embedding, or None where the module does not tell.
        max_length: rows of a learned position table, or None (rotary positions have no end).
        padding_idx: the id whose embedding row a training run withholds the gradient of, or None.
    """

    module: nn.Module = field(repr=False)
    vocab_size: int | None
    max_length: int | None
    padding_idx: int | None = None

    def __call__(self, params: Tree, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Run the module with `params` in place of its own."""
        if not hasattr(self.module, "config"):
            return functional_call(self.module, params, (input_ids, attention_mask))
        _refuse_left_padding(attention_mask)
        # After right-padding a causal model cannot see the padding. A mask of ones says the same, and spares the rows
        # of padding that lie outside of every sliding window, whose softmax over nothing is NaN in float64.
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(attention_mask), "use_cache": False}
        return functional_call(self.module, params, (), inputs).logits


def make_functional(
    model: nn.Module, select: Iterable[str] | Callable[[str], bool] | None = None
) -> tuple[Apply, Tree]:
    """Split a module into a pure function and its parameters.

    Args:
        model: a Hugging Face causal language model (a PEFT model too), or any module called as
            `module(input_ids, attention_mask) -> logits [n t v]`.
        select: which parameters to differentiate: names, or a predicate on names. None takes those with
            `requires_grad`. The others are captured as constants.

    Returns:
        apply: (params, input_ids [n t], attention_mask [n t]) -> logits [n t v].
        params: {name: detached tensor}. Tied weights appear once, under the first of their names. The tensors share
            storage with the model: `fkernel.tree.map(torch.clone, params)` keeps them across an optimizer step.

    Raises:
        ModelError: nothing to differentiate, an unknown name in `select`, parameters on the meta device, or a model
            that cannot be given eager attention.

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
    meta = [name for name, parameter in named.items() if parameter.is_meta]
    if meta:
        raise ModelError(f"{listing(meta)} lie on the meta device and hold no values; load the weights first.")
    return split(model, chosen)


def split(model: nn.Module, chosen: Iterable[str]) -> tuple[Apply, Tree]:
    """Split without `make_functional`'s checks; the parameters may lie on the meta device, where nothing has a value.

    Example:
        >>> with torch.device("meta"):
        ...     layer = nn.Linear(2, 3)
        >>> split(layer, ["bias"])[1]
        {'bias': tensor(..., device='meta', size=(3,))}
    """
    named = dict(model.named_parameters())
    module = structural_copy(model)
    _put_right(module)
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # pyright: ignore
    vocab_size = getattr(embedding, "num_embeddings", None)
    trained = any(parameter is getattr(embedding, "weight", None) for parameter in map(named.get, chosen))
    padding_idx = getattr(embedding, "padding_idx", None) if trained else None
    apply = Apply(module, vocab_size, _max_length(module), padding_idx)
    return apply, {name: named[name].detach() for name in chosen}


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
    """Rows of a learned position table; rotary positions have no end."""
    config = getattr(module, "config", None)
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)
    return None if rotary else getattr(config, "max_position_embeddings", None)


def structural_copy(model: nn.Module) -> nn.Module:
    """Copy modules and configuration, share tensors; parameters become constants (ties stay ties)."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def _put_right(module: nn.Module) -> None:
    module.eval()
    for part in module.modules():
        config = getattr(part, "config", None)
        if isinstance(part, nn.Embedding):
            # padding_idx withholds a row's gradient in reverse mode only, so J and Jv would disagree; see check_tokens.
            part.padding_idx = None
        if _keeps(part, "_experts_implementation", "batched_mm"):
            part.set_experts_implementation("batched_mm")  # pyright: ignore[reportCallIssue]
        for verb in ("activation", "gradient"):  # transformers ≥ 5.20 and before
            if hasattr(part, f"{verb}_checkpointing_disable"):
                getattr(part, f"{verb}_checkpointing_disable")()
                break
        if hasattr(part, "disable_input_require_grads"):  # a hook that checkpointing leaves on the embedding
            part.disable_input_require_grads()  # pyright: ignore[reportCallIssue]
        if _keeps(part, "_attn_implementation", "eager"):
            part.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
        if getattr(config, "_attn_implementation", "eager") != "eager":
            raise ModelError(
                f"{type(part).__name__} keeps {config._attn_implementation!r} attention, which cannot be "  # pyright: ignore
                f"differentiated forward; build the model with attn_implementation='eager'."
            )


def _keeps(part: nn.Module, setting: str, wanted: str) -> bool:
    """Tell whether a Hugging Face module is set otherwise and can be reset (eager expert layers fail under vmap)."""
    value = getattr(getattr(part, "config", None), setting, None)
    return value not in (None, wanted) and hasattr(part, f"set{setting}")
