"""Per-sequence gradients from one plain pass over the whole batch, from each layer's inputs and cotangents.

    g_n = Σ over the uses of a parameter of (input, cotangent of sequence n)

Sequences of a batch are independent, so the cotangents of a sequence's rows are derivatives of f_n alone, and one
reverse pass of Σ_m f_m has all of them, without copies of parameters and without vmap over the model. This requires
that every use of every parameter is one of those in `fkernel.func.taps.listening`; otherwise there is no plan, and
gradients are computed by vmap.

Three conditions are checked on copies of one sequence. No path in the autograd graph leads from the values to a
parameter other than through the taps. Rows of an operation can be assigned to sequences: with 2 and 3 copies the
leading dimension is n or n·t; or it is 1, an operation done once for the whole batch (GPT-2's positions), which is
expanded; or the rows were gathered from known sequences. And sequences are independent: a cotangent of one of two
copies changes no gradient of the other.

Source: I. Goodfellow, "Efficient per-example gradient computations" (2015), for linear layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fkernel.errors import ModelError
from fkernel.func.handles.forms import Piece, add, count, materialize_into, summed_up
from fkernel.func.handles.touched import Touch, touched_rows
from fkernel.func.inputs.batch import Sequences
from fkernel.func.inputs.objective import is_readable
from fkernel.func.inputs.validation import check_output
from fkernel.func.taps.listening import Tap, tap
from fkernel.func.taps.made import Made, pulled_back
from fkernel.func.taps.plan import GradientPlan, Pass, backward, explained
from fkernel.func.taps.uses import LayerCall
from fkernel.shapes import Tensor, Tree

Piecewise = Callable[..., Tensor]
"""(params, *inputs) -> [n, ...], such as a decoder layer."""


def tapped(fn: Piecewise, params: Tree, inputs: tuple[Any, ...], n: int, plan: GradientPlan | None = None) -> Pass:
    """Run fn(params, *inputs) over n sequences, with a tap at every known use; without a plan, trace parameters.

    Args:
        fn: (params, *inputs) -> [n, ...].
        params: {name: tensor}.
        inputs: fn's other arguments.
        n: sequences.
        plan: how the parameters are used; None to determine it.
    """
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
    like = next(leaf for leaf in pytree.tree_leaves((leaves, inputs)) if isinstance(leaf, Tensor))
    zeros = torch.zeros(n, dtype=torch.get_default_dtype(), device=like.device, requires_grad=True)
    watching = tap(leaves, zeros, n, plan)
    with torch.enable_grad(), watching:
        out = fn(leaves, *inputs)
    check_output(out, n, per_sequence=False)
    return Pass(out, {} if plan is not None else leaves, zeros, watching.uses, watching.loose)


def gradients(tape: Pass, params: Tree, n: int) -> dict[str, Piece]:
    """Collect the handles of n sequences' gradients after a reverse pass; zeros for parameters without cotangents."""
    parts: dict[str, list[Any]] = {name: [] for name in params}
    computed: dict[int, tuple[Made, list[Any]]] = {}
    for use in tape.uses:
        assert isinstance(use, Tap)
        if (gradient := use.gradient()) is None:
            continue
        if use.made.whole is None:
            computed.setdefault(id(use.made.value), (use.made, []))[1].append(gradient)
        else:
            parts[use.made.whole].append(gradient)
    rows = [(made, _written(_sum(own, made.value.detach(), n), made.value.detach())) for made, own in computed.values()]
    for name, row in pulled_back(rows).items():
        parts[name].append(row)
    return {name: _sum(parts[name], leaf, n) for name, leaf in params.items()}


def _sum(parts: list[Any], like: Tensor, n: int) -> Piece:
    """Sum the gradients of several uses of one parameter."""
    touches = [part for part in parts if isinstance(part, Touch)]
    touched = touched_rows(touches, len(like)) if touches else None
    rows = [part for part in parts if isinstance(part, Tensor)]
    others = [part for part in parts if not isinstance(part, Tensor | Touch)]
    others += [] if touched is None else [touched]
    if not rows:
        return summed_up(others, like, n)
    total = sum(rows[1:], rows[0]).to(like.dtype)
    if others:  # a sum with a dense part is dense
        total = total.clone(memory_format=torch.contiguous_format)
    for other in others:
        add(other, total)
    return total


def _written(handle: Piece, like: Tensor) -> Tensor:
    if isinstance(handle, Tensor):
        return handle
    out = like.new_empty(count(handle), *like.shape)
    materialize_into(handle, out)
    return out


def pull_rows(
    fn: Piecewise, params: Tree, inputs: tuple[Any, ...], cotangent: Tensor, plan: GradientPlan
) -> tuple[dict[str, Piece], tuple[Tensor | None, ...]]:
    """Compute a vjp through a part of a model, with per-sequence gradients of its parameters.

    g_n = ∂⟨fn(θ, x)_n, c_n⟩/∂θ,  dx = ∂⟨fn(θ, x), c⟩/∂x

    Args:
        fn: (params, *inputs) -> [n, ...], a decoder layer.
        params: {name: tensor}, those of fn.
        inputs: its other arguments; floating-point tensors [n, ...] are differentiated.
        cotangent: c, of fn's shape.
        plan: from `piece_plan`.

    Returns:
        {name: handle of n sequences}, and a cotangent for each input; None where it is not a floating-point tensor.

    Raises:
        ModelError: fn uses a parameter in a way that is not in the plan, or returns another shape.

    Example:
        >>> fn = lambda p, x: torch.nn.functional.linear(x, p["w"], p["b"])
        >>> params, x = {"w": torch.ones(1, 3), "b": torch.zeros(1)}, torch.eye(3).reshape(3, 1, 3)
        >>> plan = piece_plan(fn, params, (x,))
        >>> handles, (dx,) = pull_rows(fn, params, (x,), torch.ones(3, 1, 1), plan)
        >>> handles["b"].flatten().tolist(), dx.shape
        ([1.0, 1.0, 1.0], torch.Size([3, 1, 3]))
    """
    n = len(cotangent)
    tape, traced = _forward(fn, params, inputs, n, plan)
    if tape.values.shape != cotangent.shape:
        raise ModelError(f"fn returned {list(tape.values.shape)}, its cotangent is {list(cotangent.shape)}.")
    back = _backward(tape, traced, cotangent)
    return gradients(tape, params, n), tuple(back.get(str(i)) for i in range(len(inputs)))


def _forward(
    fn: Piecewise, params: Tree, inputs: tuple[Any, ...], n: int, plan: GradientPlan | None
) -> tuple[Pass, dict[str, Tensor]]:
    """Run fn with traced inputs, {position: tensor}."""
    traced = {
        str(i): leaf.detach().requires_grad_()
        for i, leaf in enumerate(inputs)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }
    return tapped(fn, params, tuple(traced.get(str(i), leaf) for i, leaf in enumerate(inputs)), n, plan), traced


def _backward(tape: Pass, traced: dict[str, Tensor], cotangent: Tensor) -> Tree:
    """Run the reverse pass from a cotangent: taps record theirs, and those of the inputs are returned."""
    with torch.enable_grad():
        values = (tape.values * cotangent).reshape(len(cotangent), -1).sum(1)
    return backward(tape._replace(values=values, traced=traced))


def piece_plan(fn: Piecewise, params: Tree, inputs: tuple[Any, ...]) -> GradientPlan | None:
    """Plan per-sequence gradients of a part of a model by one plain pass; None where that is impossible.

    Arguments as in `pull_rows`; the plan is determined on the first sequence of the inputs.

    Example:
        >>> x = torch.ones(4, 3, 2)
        >>> plan = piece_plan(lambda p, x: torch.nn.functional.linear(x, p["w"]), {"w": torch.eye(2)}, (x,))
        >>> plan.batched
        True
        >>> piece_plan(lambda p, x: (x - x.mean(0)) @ p["w"], {"w": torch.eye(2)}, (x,)) is None
        True
    """
    n = next((len(leaf) for leaf in inputs if isinstance(leaf, Tensor) and leaf.ndim), 0)

    def copies(k: int) -> tuple[Any, ...]:
        return tuple(
            _copied(leaf, k) if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == n else leaf for leaf in inputs
        )

    try:
        return _probe(fn, params, copies)
    except Exception:  # the simpler method raises the same error, with its explanation
        return None


def batch_plan(f: Piecewise, params: Tree, one: Any) -> GradientPlan | None:
    """Plan the same for f(params, batch) -> [n], on a batch of one sequence.

    Example:
        >>> f = lambda p, x: torch.nn.functional.linear(x, p["w"]).sum((1, 2))
        >>> batch_plan(f, {"w": torch.eye(2)}, torch.ones(1, 3, 2)).batched
        True
    """

    def copies(k: int) -> tuple[Any, ...]:
        def each(node: Any) -> Any:
            if isinstance(node, Sequences):  # masks are not reversed: padding stays on the right
                return Sequences(_copied(node.input_ids, k), *(torch.cat([leaf[:1]] * k) for leaf in node[1:]))
            return _copied(node, k) if isinstance(node, Tensor) else node

        return (pytree.tree_map(each, one, is_leaf=lambda node: isinstance(node, Sequences)),)

    try:
        return _probe(f, params, copies)
    except Exception:  # as above
        return None


def _copied(leaf: Tensor, k: int) -> Tensor:
    """Make k copies of a sequence, the second reversed: between equal ones some couplings (a variance) vanish."""
    first = leaf[:1]
    copies = [first] * k
    copies[1:2] = [first.flip(1) if leaf.ndim > 1 else first] * len(copies[1:2])
    return torch.cat(copies)


def _probe(fn: Piecewise, params: Tree, copies: Callable[[int], tuple[Any, ...]]) -> GradientPlan | None:
    two, three = copies(2), copies(3)
    tape, traced = _forward(fn, params, two, 2, None)
    known = explained(tape) == frozenset(params)
    if not known or not _same_layout(tape.uses, tapped(fn, params, three, 3).uses):
        return None
    if is_readable((two, tape.values)) and not _apart(tape, traced):
        return None
    return GradientPlan(frozenset(tape.loose), batched=True)


def _apart(tape: Pass, traced: dict[str, Tensor]) -> bool:
    """Return whether a cotangent of the first of two sequences leaves all gradients of the second 0."""
    cotangent = torch.randn(tape.values.shape, generator=torch.Generator().manual_seed(0))
    cotangent[1] = 0.0
    back = [g for g in _backward(tape, traced, cotangent.to(tape.values)).values() if len(g) == 2]
    back += [use.cotangent for use in tape.uses if use.cotangent is not None]
    return not any(bool((leaf[1] != 0).any()) for leaf in back)


def _same_layout(two: Sequence[LayerCall], three: Sequence[LayerCall]) -> bool:
    """Return whether leading dimensions are proportional to the number of sequences, or 1, and all others equal."""
    if len(two) != len(three):
        return False
    for a, b in zip(two, three, strict=True):
        assert isinstance(a, Tap)
        assert isinstance(b, Tap)
        leading = a.shape[0], b.shape[0]
        if (a.parameter, a.layer, a.made.chosen, a.shape[1:]) != (b.parameter, b.layer, b.made.chosen, b.shape[1:]):
            return False
        if a.owners is None and leading != (1, 1) and 3 * leading[0] != 2 * leading[1]:
            return False
    return True
