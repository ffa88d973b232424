"""Per-sequence gradients from one plain pass over the whole batch: every layer tells its sequences apart by itself.

    g_n = Σ over the uses of a parameter of (what went in, what came back to sequence n)

No sequence of a batch sees another, so what comes back to its rows is a derivative of f_n alone and one reverse pass of
Σ_m f_m has all of them: no copy of a parameter, no vmap over the model. The price is that every use of every parameter
must be one that `fkernel.func.taps.listening` lists. Where one is not, there is no plan, and gradients are taken by
vmap.

Three things are found out, not assumed, on copies of one sequence. That no path from the values to a parameter is
left beside the uses that are heard: autograd is asked. How an operation's rows belong to sequences: of 2 and of 3
copies the leading dimension is n or n·t, or it is 1, an operation done once for the whole batch (GPT-2's positions),
which is expanded; or the rows were gathered, and it is known from where. And that sequences are apart: what comes back
to one of two copies moves no gradient of the other.

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
    """Run fn(params, *inputs) over n sequences, every known use listened to; without a plan parameters are traced.

    Args:
        fn: (params, *inputs) -> [n, ...].
        params: {name: tensor}.
        inputs: what else fn takes.
        n: sequences.
        plan: how the parameters are used; None to find out.
    """
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
    like = next(leaf for leaf in pytree.tree_leaves((leaves, inputs)) if isinstance(leaf, Tensor))
    zeros = torch.zeros(n, dtype=torch.get_default_dtype(), device=like.device, requires_grad=True)
    watching = tap(leaves, zeros, n, plan)
    with torch.enable_grad(), watching:
        out = fn(leaves, *inputs)
    check_output(out, n, per_sequence=False)
    return Pass(out, {} if plan is not None else leaves, zeros, watching.uses, watching.loose)


def gradients(found: Pass, params: Tree, n: int) -> dict[str, Piece]:
    """Collect the handles of n sequences' gradients after a reverse pass; zero rows for what nothing came back to."""
    parts: dict[str, list[Any]] = {name: [] for name in params}
    computed: dict[int, tuple[Made, list[Any]]] = {}
    for use in found.uses:
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
    """Add up what several uses of one parameter leave behind."""
    touches = [part for part in parts if isinstance(part, Touch)]
    touched = touched_rows(touches, len(like)) if touches else None
    rows = [part for part in parts if isinstance(part, Tensor)]
    others = [part for part in parts if not isinstance(part, Tensor | Touch)]
    others += [] if touched is None else [touched]
    if not rows:
        return summed_up(others, like, n)
    total = sum(rows[1:], rows[0]).to(like.dtype)
    if others:  # what is dense in part is dense
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
    """Pull a cotangent back through a piece of a model, each sequence's by itself.

    g_n = ∂⟨fn(θ, x)_n, c_n⟩/∂θ,  dx = ∂⟨fn(θ, x), c⟩/∂x

    Args:
        fn: (params, *inputs) -> [n, ...], a decoder layer.
        params: {name: tensor}, those of the piece.
        inputs: what else it takes; floating-point tensors [n, ...] are differentiated.
        cotangent: c, of fn's shape.
        plan: as `piece_plan` makes it.

    Returns:
        {name: handle of n sequences}, and a cotangent for each input; None where it is no floating-point tensor.

    Raises:
        ModelError: fn uses a parameter in a way that the plan did not foresee, or returns another shape.

    Example:
        >>> fn = lambda p, x: torch.nn.functional.linear(x, p["w"], p["b"])
        >>> params, x = {"w": torch.ones(1, 3), "b": torch.zeros(1)}, torch.eye(3).reshape(3, 1, 3)
        >>> plan = piece_plan(fn, params, (x,))
        >>> handles, (dx,) = pull_rows(fn, params, (x,), torch.ones(3, 1, 1), plan)
        >>> handles["b"].flatten().tolist(), dx.shape
        ([1.0, 1.0, 1.0], torch.Size([3, 1, 3]))
    """
    n = len(cotangent)
    found, traced = _forward(fn, params, inputs, n, plan)
    if found.values.shape != cotangent.shape:
        raise ModelError(f"fn returned {list(found.values.shape)}, its cotangent is {list(cotangent.shape)}.")
    back = _backward(found, traced, cotangent)
    return gradients(found, params, n), tuple(back.get(str(i)) for i in range(len(inputs)))


def _forward(
    fn: Piecewise, params: Tree, inputs: tuple[Any, ...], n: int, plan: GradientPlan | None
) -> tuple[Pass, dict[str, Tensor]]:
    """Run fn with traced inputs, {place: tensor}."""
    traced = {
        str(i): leaf.detach().requires_grad_()
        for i, leaf in enumerate(inputs)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }
    return tapped(fn, params, tuple(traced.get(str(i), leaf) for i, leaf in enumerate(inputs)), n, plan), traced


def _backward(found: Pass, traced: dict[str, Tensor], cotangent: Tensor) -> Tree:
    """Pull a cotangent back: every tap hears its own, and those of the inputs return."""
    with torch.enable_grad():
        values = (found.values * cotangent).reshape(len(cotangent), -1).sum(1)
    return backward(found._replace(values=values, traced=traced))


def piece_plan(fn: Piecewise, params: Tree, inputs: tuple[Any, ...]) -> GradientPlan | None:
    """Find out whether one plain pass tells the gradients of sequences apart in a piece of a model.

    Arguments as in `pull_rows`; the first sequence of the inputs is looked at. None where it does not.

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
    except Exception:  # whatever goes wrong here goes wrong in the simpler way too, where it is said
        return None


def batch_plan(f: Piecewise, params: Tree, one: Any) -> GradientPlan | None:
    """Find out the same of f(params, batch) -> [n], on a batch of one sequence.

    Example:
        >>> f = lambda p, x: torch.nn.functional.linear(x, p["w"]).sum((1, 2))
        >>> batch_plan(f, {"w": torch.eye(2)}, torch.ones(1, 3, 2)).batched
        True
    """

    def copies(k: int) -> tuple[Any, ...]:
        def each(node: Any) -> Any:
            if isinstance(node, Sequences):  # masks say where padding is, which stays on the right
                return Sequences(_copied(node.input_ids, k), *(torch.cat([leaf[:1]] * k) for leaf in node[1:]))
            return _copied(node, k) if isinstance(node, Tensor) else node

        return (pytree.tree_map(each, one, is_leaf=lambda node: isinstance(node, Sequences)),)

    try:
        return _probe(f, params, copies)
    except Exception:  # as above
        return None


def _copied(leaf: Tensor, k: int) -> Tensor:
    """Make k sequences of one, the second back to front: between equal ones some couplings (a variance) are flat."""
    first = leaf[:1]
    copies = [first] * k
    copies[1:2] = [first.flip(1) if leaf.ndim > 1 else first] * len(copies[1:2])
    return torch.cat(copies)


def _probe(fn: Piecewise, params: Tree, copies: Callable[[int], tuple[Any, ...]]) -> GradientPlan | None:
    two, three = copies(2), copies(3)
    found, traced = _forward(fn, params, two, 2, None)
    known = explained(found) == frozenset(params)
    if not known or not _same_layout(found.uses, tapped(fn, params, three, 3).uses):
        return None
    if is_readable((two, found.values)) and not _apart(found, traced):
        return None
    return GradientPlan(frozenset(found.loose), batched=True)


def _apart(found: Pass, traced: dict[str, Tensor]) -> bool:
    """Tell whether what comes back to the first of two sequences moves nothing of the second."""
    cotangent = torch.randn(found.values.shape, generator=torch.Generator().manual_seed(0))
    cotangent[1] = 0.0
    back = [g for g in _backward(found, traced, cotangent.to(found.values)).values() if len(g) == 2]
    back += [use.cotangent for use in found.uses if use.cotangent is not None]
    return not any(bool((leaf[1] != 0).any()) for leaf in back)


def _same_layout(two: Sequence[LayerCall], three: Sequence[LayerCall]) -> bool:
    """Tell whether leading dimensions grow as sequences do, or are 1, and all others stay."""
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
