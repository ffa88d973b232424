"""Is the recorded loss the one whose gradient the optimizer was given?

    g_optimizer = c · Σ_u Σ_t ( ω_ut ∇log π(u_t) + η_ut ∇H(u_t) ),      c the clipping factor

The right side is computed again from the record alone, one plain backward pass a micro-batch, padded as it was
(`fkernel.engine.gradient_in`). c is fitted; what is left is the error. Beside it, at every step, ‖∇L‖ as backward left
it and the norms that the optimizer saw: clipping multiplies every parameter's gradient by the same c.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fkernel import tree
from fkernel.engine import Microbatch, gradient_in
from fkernel.errors import listing
from fkernel.func import Weighted, make_functional, pad, weighted_logprob, with_masked_padding_grad
from fkernel.record.layout import RecordedMicrobatch, Row, unpadded
from fkernel.shapes import Tensor, Tree

TOLERANCE, ROUNDED = 1e-4, 0.02
"""Relative errors up to which a gradient is taken for the recorded one: in float32, and under autocast or with weights
in half precision, where another sum of rounded terms is another gradient."""
ROW = 1 << 14
"""Numbers that are added up in float32 one by one, at most."""
SAME_FACTOR = 1e-3
"""By which parameters' clipping factors may differ."""


class GradientCheck(NamedTuple):
    """The gradient that the optimizer was given against that of the record.

    Attributes:
        relative_error: ‖g − c ĝ‖ / ‖g‖, c fitted.
        factor: c, clipping and whatever else scaled the whole gradient.
        norm: ‖ĝ‖, of the record.
        worst: the parameter with the largest part of the error.
        tolerance: that the error is held to.
    """

    relative_error: float
    factor: float
    norm: float
    worst: str
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.relative_error <= self.tolerance


def compare_gradients(recorded: Tree, seen: Tree, tolerance: float = TOLERANCE) -> GradientCheck:
    """Hold the optimizer's gradient against the record's, up to one factor.

    c = ⟨g, ĝ⟩ / ⟨ĝ, ĝ⟩

    Args:
        recorded: {name: [*shape]} ĝ = Σ ω ∇log π + η ∇H.
        seen: {name: [*shape]} g; a parameter that it lacks has none.
        tolerance: largest relative error.

    Example:
        >>> compare_gradients({"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([1.0, 0.0])}).factor
        0.5
    """
    both = [name for name in recorded if name in seen]
    square = sum(_dot(recorded[name], recorded[name]) for name in both)
    factor = sum(_dot(seen[name], recorded[name]) for name in both) / (square or 1.0)
    apart = {name: _square(seen[name].double() - factor * recorded[name].double()) for name in both}
    apart |= {name: factor**2 * _square(leaf) for name, leaf in recorded.items() if name not in seen}
    apart |= {name: _square(leaf) for name, leaf in seen.items() if name not in recorded}
    norm = sum(_square(leaf) for leaf in seen.values()) ** 0.5
    error = sum(apart.values()) ** 0.5 / (norm or 1.0)
    return GradientCheck(error, factor, float(tree.norm(recorded)), max(apart, key=lambda n: apart[n]), tolerance)


def _dot(x: Tensor, y: Tensor) -> float:
    return float((x.double() * y.double()).sum())


def _square(x: Tensor) -> float:
    return float(x.double().square().sum())


def mismatch(number: int, check: GradientCheck, dropout: Sequence[str], temperature: float) -> str:
    """Say what differs, and what it may come from.

    Args:
        number: of the step.
        check: one that did not pass.
        dropout: names of modules that drop something out in training.
        temperature: that log-probabilities are believed to be at.

    Example:
        >>> mismatch(3, GradientCheck(0.5, 1.0, 1.0, "w", 1e-4), [], 1.0)[:60]
        'Step 3: the optimizer was given another gradient than that o'
    """
    dropped = (
        f" {listing(dropout, 2)} drop(s) activations out, which no recording repeats: set it to 0." if dropout else ""
    )
    return (
        f"Step {number}: the optimizer was given another gradient than that of the recorded token weights; they differ "
        f"by {check.relative_error:.2g} of its norm (up to {check.tolerance:.0e} is rounding), most in "
        f"{check.worst!r}. Something beside log π and entropy has a gradient (an auxiliary loss, a value head on the "
        f"same weights), a micro-batch was not tapped, log-probabilities are not at temperature {temperature:g}, or "
        f"the gradient was changed after the backward pass.{dropped}"
    )


def leaf_norm(x: Tensor) -> Tensor:
    """‖x‖ of one tensor, a scalar in at least float32, on its device.

    torch's norm of a large float32 tensor on a CPU is added up one by one, and is 1 % short for 10⁸ numbers: rows are
    added up first, then their norms.

    Args:
        x: [*shape].

    Example:
        >>> leaf_norm(torch.full((1000, 1000), 0.5))
        tensor(500.)
    """
    flat, wide = x.detach().reshape(-1), torch.promote_types(x.dtype, torch.float32)
    whole = flat.numel() // ROW * ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1, dtype=wide)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=wide)
    return torch.linalg.vector_norm(torch.cat([rows, rest[None]]))


class Norms:
    """‖∇L‖ as the backward passes left it, before anything clips: hooks on the parameters' accumulated gradients.

    Where processes average their gradients, they do so after those hooks, as the backward pass ends. Norms are then
    taken at its very end: DDP averages in a callback there, and a callback that another one adds comes after them all.

    Args:
        params: {name: parameter}.
        averaged: whether DistributedDataParallel averages gradients.
    """

    def __init__(self, params: Mapping[str, Tensor], averaged: bool = False) -> None:
        self._squares, self._params, self._waiting = dict[str, Tensor](), params, False
        keep = self._keep_all_later if averaged else self._keep
        self._handles = [
            leaf.register_post_accumulate_grad_hook(lambda leaf, name=name: keep(name, leaf))
            for name, leaf in params.items()
        ]

    def _keep(self, name: str, leaf: Tensor) -> None:
        if leaf.grad is not None:
            self._squares[name] = leaf_norm(leaf.grad)

    def _keep_all_later(self, *_: Any) -> None:
        if not self._waiting:
            self._waiting = True
            at_end: Any = torch.autograd.Variable._execution_engine.queue_callback  # pyright: ignore
            at_end(lambda: at_end(self._keep_all))

    def _keep_all(self) -> None:
        self._waiting = False
        for name, leaf in self._params.items():
            self._keep(name, leaf)

    def clear(self) -> None:
        """Forget the step before."""
        self._squares.clear()
        self._waiting = False

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def taken(self, scale: float = 1.0) -> dict[str, float]:
        """{name: ‖∇L_name‖}, the loss's scale divided out."""
        if not self._squares:
            return {}
        values = torch.stack([norm.cpu() for norm in self._squares.values()]).double() / scale
        return dict(zip(self._squares, values.tolist(), strict=True))


def norm_of(norms: Mapping[str, float]) -> float:
    """‖∇L‖ of the parameters' norms.

    Example:
        >>> norm_of({"a": 3.0, "b": 4.0})
        5.0
    """
    return sum(norm**2 for norm in norms.values()) ** 0.5


def uneven_factor(before: Mapping[str, float], after: Mapping[str, float]) -> str | None:
    """Name the parameter whose gradient was not multiplied by the factor of all, or None.

    Args:
        before: {name: ‖∇L_name‖} as backward left it.
        after: {name: norm} as the optimizer saw it.

    Example:
        >>> uneven_factor({"a": 1.0, "b": 1.0}, {"a": 0.5, "b": 1.0})
        'a'
    """
    whole = norm_of(before)
    if not whole:
        return None
    c = norm_of(after) / whole
    apart = {name: abs(after.get(name, 0.0) - c * norm) for name, norm in before.items()}
    worst = max(apart, key=lambda name: apart[name])
    return worst if apart[worst] > SAME_FACTOR * c * whole else None


class Repeater:
    """Computes the gradient of a record again: ĝ = Σ ω ∇log π + η ∇H at the model's present weights.

    Args:
        model: that is trained.
        temperature: τ of log-probabilities.
        autocast: "bfloat16" for a training under autocast, or None.
        head: as `fkernel.engine.gradient_in` takes it.
    """

    def __init__(self, model: nn.Module, temperature: float, autocast: str | None, head: str) -> None:
        self.model, self.temperature, self.autocast, self.head = model, temperature, autocast, head
        apply, params = make_functional(plain_copy(model))
        self.f, self.names = weighted_logprob(with_masked_padding_grad(apply), temperature), list(params)

    def gradient(self, microbatches: Sequence[RecordedMicrobatch]) -> Tree:
        """Compute ĝ of a step's micro-batches, {name: [*shape]}."""
        named = dict(self.model.named_parameters())
        params = {name: named[name].detach() for name in self.names}
        rows, passes = passes_of(microbatches)
        if not rows:
            return tree.map(torch.zeros_like, params)
        device = next(iter(params.values())).device
        batch = weighted(rows)
        batch = pytree.tree_map_only(torch.Tensor, lambda leaf: leaf.to(device), batch)
        ones = torch.ones(len(rows), device=device)
        how: dict[str, Any] = {"autocast": self.autocast, "head": self.head}
        try:
            return gradient_in(self.f, params, batch, ones, microbatches=passes, **how)
        except torch.OutOfMemoryError:  # a fused head held no logits; those of one sequence at a time may fit
            alone = [each._replace(rows=[row]) for each in passes for row in each.rows]
            return gradient_in(self.f, params, batch, ones, microbatches=alone, **how)

    @property
    def tolerance(self) -> float:
        """What rounding is allowed."""
        named = dict(self.model.named_parameters())
        half = any(named[name].dtype in (torch.bfloat16, torch.float16) for name in self.names)
        return ROUNDED if half or self.autocast else TOLERANCE


def passes_of(microbatches: Sequence[RecordedMicrobatch]) -> tuple[list[Row], list[Microbatch]]:
    """Take the padding off, and say how each pass was padded; rows without a response are left out.

    Args:
        microbatches: of one step.

    Returns:
        The sequences, and for each pass its rows among them and its widths, as `gradient_in` takes them.
    """
    rows, passes = list[Row](), list[Microbatch]()
    for each in microbatches:
        own = [unpadded(each, row) for row in each.answered]
        if own:
            passes.append(Microbatch(range(len(rows), len(rows) + len(own)), each.prompt_width, each.width))
            rows += own
    return rows, passes


def weighted(rows: Sequence[Row]) -> Weighted:
    """Lay sequences and their token weights out as `func.weighted_logprob` takes them: [n t], padded on the right.

    Args:
        rows: of `passes_of`.
    """
    sequences = pad([row.prompt_ids for row in rows], [row.response_ids for row in rows])
    mask, laid = sequences.response_mask.bool(), list[Tensor | None]()
    for kind in ("token_weights", "entropy_weights"):
        values = [value for row in rows for value in getattr(row, kind) or [0.0] * len(row.response_ids)]
        whole = torch.zeros(mask.shape, dtype=torch.float64)
        whole[mask] = torch.tensor(values, dtype=torch.float64)
        laid.append(whole)
    ω, η = laid
    return Weighted(sequences, ω, η if any(row.entropy_weights for row in rows) else None)  # pyright: ignore


def plain_copy(model: nn.Module) -> nn.Module:
    """Copy a module's structure, its tensors shared; a `forward` that a trainer hung on it becomes the class's."""
    shared: dict[int, Any] = {id(leaf): leaf for leaf in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)
    for part in copied.modules():
        part.__dict__.pop("forward", None)
    return copied.eval()


def dropping(model: nn.Module) -> list[str]:
    """Names of modules that are training and drop something out."""
    kinds = (nn.modules.dropout._DropoutNd,)
    return [name for name, part in model.named_modules() if isinstance(part, kinds) and part.p > 0 and part.training]
