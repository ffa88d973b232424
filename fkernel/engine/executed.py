"""The gradient that the optimizer was given, computed as the training computed it: one plain pass, its own precision.

The exact gradient Jᵀw is that of real numbers (float32 here). A training under autocast, or with bfloat16 weights, gave
its optimizer another one,

    g_executed = Σ_b ∇_θ [ Σ_{u in b} w_u f_u(θ) ]     b: micro-batches, one backward pass each, added up in θ's dtype

whose difference the step's arithmetic column shows. No vmap, no copy in float32: the caller's module runs in a plain
batched pass under `torch.autocast`, with the attention and the padding that it was trained with.

Log-probabilities are computed as TRL computes them: logits in the training's dtype, then float32 for temperature,
log-softmax and entropy. TRL's language-model head adds the gradients of its weight and of its input up in float32; a
plain linear layer rounds them to the autocast dtype: `head` says which. The logits of one micro-batch are in memory.

Source: TRL 1.16, `GRPOTrainer._get_per_token_logps_and_entropies` and `kernels.ChunkedLogProbFunction`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from fkernel import tree
from fkernel.boundary import public
from fkernel.errors import BatchError, ModelError
from fkernel.func import Sequences
from fkernel.func.inputs import Function, Objective, arguments_of, check_weights, length, take, translate_errors
from fkernel.shapes import Tensor, Tree

HEADS = ("trl", "linear")


class Microbatch(NamedTuple):
    """Sequences of one backward pass, and how they were padded.

    Attributes:
        rows: their positions in the batch.
        prompt_width: tokens to which prompts were padded on their left, as TRL pads them; None where all padding is on
            the right.
        width: tokens in all; None for the longest sequence's.
    """

    rows: Sequence[int]
    prompt_width: int | None = None
    width: int | None = None


@public
def gradient_in(
    f: Function,
    params: Tree,
    batch: Any,
    weights: Tensor,
    *,
    autocast: str | None = None,
    microbatches: int | Sequence[Sequence[int] | Microbatch] | None = None,
    head: str = "trl",
    attention: str | None = None,
) -> Tree:
    """Compute Jᵀw in the arithmetic of a training.

    g = Σ_b ∇_θ Σ_{u in b} w_u Σ_{t in response} (ω_ut log π_θ(u_t) + η_ut H_ut)

    Args:
        f: `func.sequence_logprob` or `func.weighted_logprob` of a model of `func.make_functional`.
        params: θ, in the dtypes that were trained: bfloat16 weights stay bfloat16.
        batch: n sequences, as f takes them.
        weights: [n] w, as `func.vjp` takes them; ones where ω is the loss's own.
        autocast: "bfloat16" for a training under `torch.autocast`; None for one without.
        microbatches: the sequences of each backward pass, in their order, each a list of rows or a `Microbatch`; or how
            many sequences a pass takes, in the batch's order. None for all in one.
        head: "trl" adds the gradients of the head's weight and input up in float32, as TRL ≥ 1.16 does; "linear" rounds
            them to the autocast dtype, as a plain linear layer does. Without autocast on float32 weights they agree.
        attention: the implementation that was trained with, "sdpa" (transformers' default), "eager" or another; None
            for the one that the model has, which is "eager" of `checkpoint.load`. In bfloat16 they round otherwise.

    Returns:
        {name: [*shape]} in each parameter's dtype; zeros for a parameter that f never uses.

    Raises:
        ModelError: f is no such function, or autocast or head is unknown.
        BatchError: micro-batches leave a row out, take one twice, or do not fit their widths; or as f.
        NonFiniteError: a gradient is NaN or infinite.

    Example:
        >>> from fkernel import func
        >>> apply = lambda params, ids, mask: params["w"] * torch.ones(*ids.shape, 4)
        >>> f = func.sequence_logprob(apply)
        >>> gradient_in(f, {"w": torch.ones(4)}, func.pad([[0]], [[1, 2]]), torch.ones(1))
        {'w': tensor([-0.5000,  0.5000,  0.5000, -0.5000])}
    """
    if not isinstance(f, Objective) or f.tokens is None:
        raise ModelError("gradient_in needs func.sequence_logprob or func.weighted_logprob: it computes log π itself.")
    if autocast not in (None, "bfloat16") or head not in HEADS:
        raise ModelError(
            f"autocast is {autocast!r} and head {head!r}; expected None or 'bfloat16' (a training in float16 scales "
            f"its loss, which is not modelled), and one of {HEADS}."
        )
    n = length(batch)
    f.check(batch)
    check_weights(weights, n)
    module = _module(f.apply, attention)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
    device = next(iter(leaves.values())).device
    total: Tree = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
    for microbatch in _microbatches(microbatches, n):
        rows = [*microbatch.rows]
        sequences, ω, η = _padded(*f.tokens.of(take(batch, rows)), microbatch)
        with translate_errors(params):
            with nullcontext() if autocast is None else torch.autocast(device.type, torch.bfloat16):
                z = _logits(f.apply if module is None else module, leaves, sequences, head)
            value = _weighted_sum(z, f.tokens.temperature, sequences, ω, η)
            loss = (weights[rows].to(value) * value).sum()
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for name, g in zip(leaves, grads, strict=True):
            if g is not None:
                total[name] += g
    tree.check_finite(total, "the executed gradient")
    return total


def _microbatches(given: int | Sequence[Sequence[int] | Microbatch] | None, n: int) -> list[Microbatch]:
    """The passes, each with its rows; every row is in one of them."""
    if given is None or isinstance(given, int):
        size = n if given is None else given
        if size < 1:
            raise BatchError(f"microbatches is {given}; expected 1 or more sequences a pass.")
        return [Microbatch(range(start, min(start + size, n))) for start in range(0, n, size)]
    passes = [each if isinstance(each, Microbatch) else Microbatch(each) for each in given]
    rows = sorted(row for each in passes for row in each.rows)
    if rows != [*range(n)] or not all(len(each.rows) for each in passes):
        raise BatchError(
            f"The {len(passes)} micro-batches hold the rows {rows[:8]}{' …' if len(rows) > 8 else ''} of a batch of "
            f"{n}; expected each of 0 … {n - 1} in one of them, and none empty."
        )
    return passes


def _padded(
    sequences: Sequences, ω: Tensor, η: Tensor | None, microbatch: Microbatch
) -> tuple[Sequences, Tensor, Tensor | None]:
    """Pad as the training did: prompts on their left to one width, or everything on the right."""
    ids, attention, response = sequences
    length_of, prompt_of = attention.long().sum(1), response.long().argmax(1)
    widest = microbatch.prompt_width
    shift = torch.zeros_like(prompt_of) if widest is None else widest - prompt_of
    needed = int((shift + length_of).max())
    width = needed if microbatch.width is None else microbatch.width
    if bool((shift < 0).any()) or width < needed:
        raise BatchError(
            f"A micro-batch of {len(ids)} sequences is padded to prompt_width {widest} and width {microbatch.width}; "
            f"its longest prompt has {int(prompt_of.max())} tokens, and {needed} tokens are needed in all."
        )
    source = torch.arange(width, device=ids.device) - shift[:, None]  # [n width], where a column's token comes from
    inside = (source >= 0) & (source < length_of[:, None])

    def laid(values: Tensor, outside: float = 0) -> Tensor:
        moved = values.gather(1, source.to(values.device).clamp(0, ids.shape[1] - 1))
        return torch.where(inside.to(values.device), moved, outside)

    padding = int(ids[~attention.bool()][0]) if not bool(attention.all()) else 0
    batch = Sequences(laid(ids, padding), laid(attention), laid(response))
    return batch, laid(ω), None if η is None else laid(η)


def _module(apply: Any, attention: str | None) -> nn.Module | None:
    """The caller's own module, or a copy of its structure with another attention; None where f has no module."""
    module = getattr(apply, "original", None) or getattr(apply, "module", None)
    if module is None or attention is None:
        return module
    shared: dict[int, Any] = {id(leaf): leaf for leaf in (*module.parameters(), *module.buffers())}
    copied = copy.deepcopy(module, shared)
    for part in copied.modules():
        if hasattr(part, "set_attn_implementation"):
            part.set_attn_implementation(attention)  # pyright: ignore[reportCallIssue]
    return copied


def _logits(module: Any, params: Tree, batch: Sequences, head: str) -> Tensor:
    """Run a module, or a function that has none, in one plain pass: [n t v] in the training's dtype."""
    if not isinstance(module, nn.Module):
        return module(params, batch.input_ids, batch.attention_mask)
    inputs = arguments_of(module, batch.input_ids, batch.attention_mask.long())
    with _Float32Sums(module) if head == "trl" else nullcontext():
        out: Any = functional_call(module, params, *inputs)
    z = getattr(out, "logits", out)
    z = z[0] if isinstance(z, tuple | list) else z
    return z[:, -batch.input_ids.shape[1] :]


def _weighted_sum(z: Tensor, temperature: float, batch: Sequences, ω: Tensor, η: Tensor | None) -> Tensor:
    """Σ_t ω_t log π_t + η_t H_t of each sequence, [n], from logits [n t v]; in at least float32."""
    z = z[:, :-1].to(torch.promote_types(z.dtype, torch.float32)) * (1 / temperature)
    scored = batch.response_mask[:, 1:].bool()
    log_p = z.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1) - z.logsumexp(-1)
    each = ω[:, 1:].to(log_p) * log_p
    if η is not None:
        log_q = z.log_softmax(-1)
        entropy = -(log_q.exp() * torch.where(log_q == -torch.inf, 0.0, log_q)).sum(-1)
        each = each + η[:, 1:].to(entropy) * entropy
    return torch.where(scored, each, 0.0).sum(1)


class _Float32Sums(TorchFunctionMode):
    """Replaces the head's linear layer by one whose backward pass adds up in float32."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        head = getattr(module, "get_output_embeddings", lambda: None)()
        self.head = head if isinstance(head, nn.Linear) else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and self.head is not None and len(args) > 1 and args[1] is self.head.weight:
            bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            return _Head.apply(args[0], args[1], bias)
        return func(*args, **(kwargs or {}))


class _Head(torch.autograd.Function):
    """z = h Wᵀ + b in the autocast dtype; ∂h = ∂z W and ∂W = ∂zᵀ h summed in float32, as TRL's fused head sums them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.save_for_backward(hidden, weight, bias)
        ctx.dtype = dtype
        z = hidden.to(dtype) @ weight.to(dtype).t()
        return z if bias is None else z + bias.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        hidden, weight, bias = ctx.saved_tensors
        wide = torch.promote_types(ctx.dtype, torch.float32)
        g = grads[0].to(ctx.dtype).flatten(0, -2).to(wide)
        h = hidden.to(ctx.dtype).flatten(0, -2).to(wide)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad
        of_hidden = (g @ weight.to(ctx.dtype).to(wide)).view(hidden.shape).to(hidden.dtype) if needs_hidden else None
        of_weight = (g.t() @ h).to(weight.dtype) if needs_weight else None
        return of_hidden, of_weight, g.sum(0).to(bias.dtype) if needs_bias else None
