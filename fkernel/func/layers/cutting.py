"""Whether a model may be cut into layers, asked of the model itself.

Layers and head are found by `fkernel.func.layers.anatomy`. What a cut would miss (layers that see more than hidden
states, a parameter at work in two places) is not looked for in anybody's code but probed, on a window of the two
shortest sequences, which travel as one block:

    values      Σ ω log π by the pieces     against  f
    rows        Σ_n w_n J_n by the pieces   against  Jᵀw of f by one plain reverse pass, w random

Whoever is refused is told why, and f goes the way that any other function goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fkernel.errors import listing
from fkernel.func.functional import Apply, structural_copy
from fkernel.func.handles.forms import Handle, Handles, materialize_into, stack_handles
from fkernel.func.inputs.batch import Sequences, find_sequences, take, token_counts, trim
from fkernel.func.inputs.leaves import Leaves, leaves_of
from fkernel.func.inputs.objective import Objective, bare, own_width
from fkernel.func.inputs.source import plain, widened
from fkernel.func.inputs.validation import first_line
from fkernel.func.layers.anatomy import Anatomy, Refusal, observed
from fkernel.func.layers.cut import Cut, after, before, constants_of, layer
from fkernel.func.layers.walk import Walk
from fkernel.func.taps.batched import piece_plan
from fkernel.func.taps.plan import GradientPlan
from fkernel.func.trust.comparisons import FLOOR, GRADIENTS, VALUES, Certificate, shortest_pair
from fkernel.func.trust.memory import keep, known_of, runs
from fkernel.shapes import Tensor, Tree

CONTEXT, PROBED = 8, 24
"""Tokens before the first one that counts, and from it on, that a probe looks at."""
FUSED = 1024
"""Tokens of a sequence beyond which torch's fused attention is taken, where the model has it."""
FEW = 8
"""Tokens that a layer is planned on."""
TILE = 1 << 22
"""Floats of gradients that are compared at once."""


def cut_of(f: Any, params: Tree, batch: Any) -> Cut | str:
    """Cut f's model into pieces, or say why it cannot be cut. It is asked once for each f and kind of parameters.

    Args:
        f: (params, batch) -> [n].
        params: θ, those to differentiate.
        batch: what f takes; checked by its caller.

    Returns:
        The cut, or a sentence that says what stands against it.

    Example:
        >>> cut_of(lambda params, x: x @ params["w"], {"w": torch.zeros(2)}, torch.eye(2))
        'f is no weighted sum of token log-probabilities'
    """
    known = known_of(f, params, batch)
    # Eager attention holds [t, t] for every head; up to some hundred tokens that is little, and exactly what f does.
    fused = find_sequences(batch) != [] and max(token_counts(batch)) > FUSED
    if fused not in known.cuts:
        known.cuts[fused] = _asked(f, params, batch, fused)
    return known.cuts[fused]


def _asked(f: Any, params: Tree, batch: Any, fused: bool) -> Cut | str:
    try:
        with torch.random.fork_rng(devices={leaf.device for leaf in params.values() if leaf.is_cuda}):
            return _cut(f, params, batch, fused)
    except Refusal as refusal:
        # Fused attention may know nothing of what eager attention does.
        return _asked(f, params, batch, fused=False) if fused else str(refusal)


def _cut(f: Any, params: Tree, batch: Any, fused: bool) -> Cut:
    tokens, apply = (getattr(f, part, None) for part in ("tokens", "apply"))
    if not isinstance(f, Objective) or tokens is None:
        raise Refusal("f is no weighted sum of token log-probabilities")
    if not isinstance(apply, Apply) or apply.original is None:
        raise Refusal("its model is not one that `make_functional` made")
    if own_width(f):
        raise Refusal("the model scales its positions by the width of the batch")
    counting = _counting(*tokens.of(batch)).any(1)
    if not bool(counting.any()):
        raise Refusal("no token of the batch has a weight")
    batch = take(batch, counting.nonzero()[:, 0])
    pair = shortest_pair(batch, token_counts(batch))
    pair = _windows(pair, _counting(*tokens.of(pair)))
    (sequences,) = find_sequences(pair)
    module = structural_copy(apply.original)
    _put_right(module, next(iter(params.values())).dtype, fused)
    try:
        seen = observed(module, apply, params, sequences)
        cut = _of_parts(module, apply, params, tokens, seen)
        cut = _planned(_placed(cut, params, sequences), params, sequences)
        _probe(f, cut, params, pair)
    except (Refusal, MemoryError):
        raise
    except Exception as error:  # a model may fail in any way where it is run in pieces, and then it is not
        raise Refusal(f"the model fails in pieces: {type(error).__name__}: {first_line(error)}") from error
    return cut


def _counting(sequences: Sequences, omega: Tensor, eta: Tensor | None) -> Tensor:
    """Tell which tokens have a weight, [n t]."""
    weighed = omega != 0 if eta is None else (omega != 0) | (eta != 0)
    return weighed & sequences.response_mask.bool()


def _windows(batch: Any, counting: Tensor) -> Any:
    """Cut sequences down to the first token that counts, some before it and some more behind it."""
    t = counting.shape[1]
    starts = (counting.long().argmax(1) - CONTEXT).clamp(min=0)
    columns = starts[:, None] + torch.arange(min(t, CONTEXT + PROBED), device=starts.device)
    inside = columns < t

    def window(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim != 2 or leaf.shape[1] < t:
            return leaf
        return torch.where(inside, leaf.gather(1, columns.clamp(max=t - 1)), leaf.new_zeros(()))

    return trim(pytree.tree_map(window, batch))


def _put_right(module: nn.Module, dtype: torch.dtype, fused: bool) -> None:
    """Make a module fit for plain reverse passes; with torch's fused attention, where that is asked and it has one."""
    module.eval()
    for part in module.modules():
        config = getattr(part, "config", None)
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False  # pyright: ignore  # the balancing loss of experts is no part of log π
        for verb in ("activation", "gradient"):
            if hasattr(part, f"{verb}_checkpointing_disable"):
                getattr(part, f"{verb}_checkpointing_disable")()
                break
        if hasattr(part, "disable_input_require_grads"):
            part.disable_input_require_grads()  # pyright: ignore[reportCallIssue]
        if dtype == torch.float64 and getattr(config, "_experts_implementation", None) not in (None, "eager"):
            _set(part, "experts_implementation", "eager")
        attention = getattr(config, "_attn_implementation", None)
        wanted = fused and getattr(part, "_supports_sdpa", False)
        if isinstance(attention, str) and attention != "sdpa" and (attention != "eager" or wanted):
            _set(part, "attn_implementation", "sdpa")


def _set(part: nn.Module, setting: str, value: str) -> None:
    if hasattr(part, f"set_{setting}"):
        getattr(part, f"set_{setting}")(value)


def _of_parts(module: nn.Module, apply: Apply, params: Tree, tokens: Any, seen: Anatomy) -> Cut:
    """Name the parameters of every piece; until they are placed, `before` has all outside of layers and head."""
    named: Tree = dict(module.named_parameters())
    first = {id(leaf): name for name, leaf in named.items()}
    names = tuple(
        {first[id(leaf)]: local for local, leaf in part.named_parameters() if first[id(leaf)] in params}
        for part in seen.layers
    )
    inner = [name for own in names for name in own]
    table = first[id(seen.head.weight)]
    outside = {
        first[id(leaf)]
        for place, leaf in module.named_parameters(remove_duplicate=False)
        if not any(leaf is own for part in seen.layers for own in part.parameters())
    }
    shared = {name for name in inner if inner.count(name) > 1} | outside & {*inner}
    if shared or table in inner:
        raise Refusal(f"{listing(sorted(shared) or [table])} is shared between layers, or with what is outside of them")
    if unknown := [name for name in params if name not in named]:
        raise Refusal(f"the model has no parameter {listing(unknown)}")
    outer = [name for name in params if name not in inner and (name != table or table in seen.tables)]
    return Cut(
        module, seen.layers, seen.outputs, seen.head, names, tuple(outer), (), seen.tables, table, table in params,
        tokens, _frozen(module, seen, params), withholds=apply.withholds, through_detach=apply.through_detach,
    )  # fmt: skip


def _frozen(module: nn.Module, seen: Anatomy, params: Tree) -> tuple[dict[str, str], ...]:
    """Name what each layer, and last what is outside of them, has on the meta device and nobody trains."""
    first = {id(leaf): name for name, leaf in module.named_parameters() if leaf.is_meta and name not in params}
    layers = [
        {first[id(leaf)]: local for local, leaf in p.named_parameters() if id(leaf) in first} for p in seen.layers
    ]
    apart = {name for own in layers for name in own} | seen.tables.keys() | {first.get(id(seen.head.weight))}
    return (*layers, {name: name for name in first.values() if name not in apart})


def _placed(cut: Cut, params: Tree, sequences: Sequences) -> Cut:
    """Ask autograd which parameters work before the layers and which behind them; none may do both."""
    one = trim(take(sequences, slice(0, 1)))
    source = plain(params)
    constants = constants_of(cut, None, source)
    leaves = {name: source.leaf(name, None).detach().requires_grad_() for name in cut.before if name not in cut.tables}
    with torch.enable_grad():
        h, calls, made = before(cut, source, {**constants, **leaves}, one.input_ids, one.attention_mask)
        x = after(cut, source, {**constants, **leaves}, h.detach().requires_grad_(), one.input_ids, one.attention_mask)
    if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves([c[:2] for c in calls])):
        raise Refusal("its layers are given more than hidden states that depend on parameters")
    front = {name for name in leaves if h.requires_grad and _reaches(h, leaves[name])}
    back = {name for name in leaves if _reaches(x, leaves[name])}
    if front & back:
        raise Refusal(f"{listing(sorted(front & back))} works before the layers and behind them")
    looked_up = {use.name for use in made}
    first = tuple(name for name in cut.before if name in front or (name in cut.tables and name in looked_up))
    rest = tuple(name for name in cut.before if name not in first)
    return replace(cut, before=first, after=rest)


def _planned(cut: Cut, params: Tree, sequences: Sequences) -> Cut:
    """Find out how each layer tells the sequences of a block apart, on a few tokens of one."""
    ids, mask = (leaf[:1, :FEW] for leaf in trim(take(sequences, slice(0, 1)))[:2])
    source = plain(params)
    outer = {**constants_of(cut, None, source), **source(name for name in cut.before if name not in cut.tables)}
    plans: list[GradientPlan | None] = []
    with torch.no_grad():
        h, calls, _ = before(cut, source, outer, ids, mask)
    for i, call in enumerate(calls):
        leaves, spec = pytree.tree_flatten(call[:2])
        constants = constants_of(cut, i, source)

        def fn(own: Tree, h: Tensor, *given: Any, i: int = i, spec: Any = spec, constants: Tree = constants) -> Tensor:
            args, kwargs = pytree.tree_unflatten([*given], spec)
            return layer(cut, i, {**constants, **own}, h, calls[i]._replace(args=args, kwargs=kwargs))

        own = {local: source.leaf(name, None) for name, local in cut.names[i].items()}
        plans.append(piece_plan(fn, own, (h, *leaves)))
    return replace(cut, plans=tuple(plans))


def _reaches(value: Tensor, leaf: Tensor) -> bool:
    (gradient,) = torch.autograd.grad(value.sum(), [leaf], allow_unused=True, retain_graph=True)
    return gradient is not None


def _probe(f: Objective, cut: Cut, params: Tree, pair: Any) -> None:
    """Hold values and gradients of the pieces against f's own, in the dtype that is computed in."""
    constants = {name: widened(leaf.detach()) for name, leaf in cut.module.named_parameters()}
    constants |= {name: widened(leaf) for name, leaf in cut.module.named_buffers()}
    leaves = leaves_of(params)
    known = known_of(f, params, pair)

    def whole(own: Tree, batch: Any) -> Tensor:
        return bare(f)({**constants, **own}, batch)

    walk = Walk(cut, plain(params), pair, tokens=None)
    if runs("values"):
        with torch.no_grad():
            theirs = leaves.value(whole, pair)
        error = float(((walk.values - theirs).abs() / (1 + theirs.abs())).max())
        detail = f"f of {len(theirs)} sequences layer by layer and whole: {error:.1e} apart"
        if not error <= VALUES:
            raise Refusal(f"its pieces do not compute what it computes ({detail})")
        keep(known, Certificate("values", True, error, VALUES, detail))
    if runs("rows"):
        certificate = _gradients(whole, leaves, pair, walk)
        if not certificate.passed:
            raise Refusal(f"its pieces have other gradients: {certificate.detail}")
        keep(known, certificate)


def _gradients(f: Any, leaves: Leaves, pair: Any, walk: Walk) -> Certificate:
    """Hold a walk's gradients against one plain reverse pass, as `rows_against_sum` does, and hold neither whole.

    error = max over parameters of ‖Σ_n w_n J_n − Jᵀw‖ / (‖Jᵀw‖ + 0.01 ‖Jᵀw of all parameters‖), w standard normal

    The reverse pass hands over a parameter's gradient as soon as it has it, from the last layer to the first; the walk
    is asked for the same one then, and both are let go. A head's is compared by ranges of its rows.
    """
    w = torch.randn(len(walk.values), generator=torch.Generator().manual_seed(0)).to(
        next(iter(leaves.trained.values()))
    )
    sizes: dict[str, tuple[float, float]] = {}
    shards, here = _shards(walk), dict[str, Handle]()

    def compare(name: str, gradient: Tensor) -> None:
        while name not in here:
            here.update(next(shards))
        handle = here.pop(name)
        sizes[name] = _distance(handle, w, gradient), float(gradient.norm())

    def arrived(leaf: Tensor, name: str) -> None:
        assert leaf.grad is not None
        compare(name, leaf.grad)
        leaf.grad = None

    for name, leaf in leaves.trained.items():
        leaf.register_post_accumulate_grad_hook(partial(arrived, name=name))
    with torch.enable_grad():
        value = leaves.value(f, pair)
    torch.autograd.backward(value, w.to(value), inputs=[*leaves.trained.values()])
    for name in [name for name in leaves.trained if name not in sizes]:  # what the pass did not reach
        compare(name, torch.zeros_like(leaves.trained[name]))
    whole = sum(size * size for _, size in sizes.values()) ** 0.5
    errors = {name: apart / (size + FLOOR * whole or 1.0) for name, (apart, size) in sizes.items()}
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    detail = f"Σ w_n J_n layer by layer and Jᵀw, random w: {worst!r} is furthest apart, {errors[worst]:.1e}"
    return Certificate("rows", errors[worst] <= GRADIENTS, errors[worst], GRADIENTS, detail)


def _distance(handle: Handle, w: Tensor, gradient: Tensor) -> float:
    """‖Σ_n w_n g_n − gradient‖, a range of rows at a time."""
    total, rows = 0.0, len(gradient) if gradient.ndim else 1
    step = max(1, TILE * rows // (len(w) * max(1, gradient.numel())))
    for start in range(0, rows, step):
        part = gradient[start : start + step] if gradient.ndim else gradient
        tile = part.new_empty(len(w), *part.shape)
        materialize_into(handle, tile, start)
        total += float((torch.tensordot(w, tile, 1) - part).square().sum())
    return total**0.5


def _shards(walk: Walk) -> Iterator[Handles]:
    yield walk.last()
    for i in reversed(range(len(walk.cut.layers))):
        yield stack_handles(handles for _, handles in walk.layer(i))
    yield walk.first()
