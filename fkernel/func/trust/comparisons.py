"""Certificates: comparisons of the engine's results with independent computations, on the user's own model.

    rows         Σ_n w_n J_n           against  Jᵀw by one plain reverse pass, w random: with ones, errors may cancel
    values       S of `apply`          against  S of the caller's module, one sequence, unpadded
    company      f of a sequence       against  f of the same one beside a longer one, and J of both; and once more,
                                                since a model may keep state
    forward      Jv, vᵀHv by forward   against  the same by reverse passes alone
    derivative   Jv along the step     against  central differences of f along it

Each is a pure function that returns an error and its bound; `fkernel.func.trust.checks` decides when they run, and what
happens on failure. Errors are relative, with a floor where the compared quantity is nearly zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from fkernel.func.functional import Apply, logits_of
from fkernel.func.handles.forms import Handles, count
from fkernel.func.handles.reductions import weighted_sum
from fkernel.func.inputs.batch import Sequences, length, take
from fkernel.func.inputs.leaves import leaves_of
from fkernel.func.inputs.objective import Function, bare, name_of
from fkernel.func.inputs.source import moved
from fkernel.func.trust.directional import Order, row_by_row, value_on
from fkernel.shapes import Tensor, Tree

GRADIENTS = 1e-3
"""Largest difference of gradients, relative to their norm."""
FLOOR = 1e-2
"""Smallest scale of a parameter's gradient, relative to the norm of all: below it, rounding would be compared."""
VALUES = 1e-4
"""Largest difference of values, nats, relative to 1 + |S|."""
DIFFERENCES = 0.02
"""Largest relative difference of a derivative from central differences, plus the differences' own uncertainty."""
MOVES = (0.2, 0.05, 0.0125, 0.003)
"""Changes of f for central differences, nats: larger ones have curvature, smaller ones rounding."""
NAMES = ("rows", "values", "company", "forward", "derivative")
"""Names of certificates, in the order in which they usually run."""


class Certificate(NamedTuple):
    """The result of one comparison.

    Attributes:
        name: of `NAMES`; "state" is `fkernel.state_against_step`'s.
        passed: whether error ≤ bound; None where no comparison was possible.
        error: the relative error; NaN where there is none.
        bound: the largest error that passes.
        detail: the same in words.
    """

    name: str
    passed: bool | None
    error: float
    bound: float
    detail: str


class RowsFound(NamedTuple):
    """The result of `rows_against_sum`.

    Attributes:
        certificate: of the parameter with the largest error.
        failing: names of the parameters above the bound.
        size: ‖Jᵀw‖ over all parameters; 0 where f depends on none of them.
    """

    certificate: Certificate
    failing: list[str]
    size: float


def rows_against_sum(f: Function, params: Tree, batch: Any, J: Handles) -> RowsFound:
    """Compare per-sequence gradients with one plain reverse pass over all of their sequences.

    error = max over parameters of ‖Σ_n w_n J_n − Jᵀw‖ / (‖Jᵀw‖ + 0.01 ‖Jᵀw of all parameters‖), w standard normal

    Args:
        f: (params, batch) -> [n].
        params: θ.
        batch: n sequences.
        J: their gradients, dense or in handles.

    Returns:
        The certificate and failing names. One parameter's gradient is in memory at a time.

    Example:
        >>> f = lambda params, x: x @ params["w"]
        >>> J = {"w": torch.eye(2)}
        >>> rows_against_sum(f, {"w": torch.zeros(2)}, torch.eye(2), J).certificate.passed
        True
        >>> rows_against_sum(f, {"w": torch.zeros(2)}, torch.eye(2), {"w": 0.9 * torch.eye(2)}).failing
        ['w']
    """
    n, like = length(batch), next(iter(params.values()))
    w = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)
    sizes: dict[str, tuple[float, float]] = {}

    def compare(name: str, gradient: Tensor) -> None:
        own = weighted_sum({name: J[name]}, w)[name]
        sizes[name] = float((own - gradient).norm()), float(gradient.norm())

    for name, gradient in _streamed_gradients(f, params, batch, w, compare):
        compare(name, gradient)
    whole = sum(size * size for _, size in sizes.values()) ** 0.5
    errors = {name: apart / (size + FLOOR * whole or 1.0) for name, (apart, size) in sizes.items()}
    worst = max(errors, key=lambda name: errors[name])
    finite = all(error == error and error != float("inf") for error in errors.values())
    failing = [name for name, error in errors.items() if error > GRADIENTS] if finite else []
    detail = f"Σ w_n J_n and Jᵀw of {n} sequences, random w: {worst!r} is furthest apart, {errors[worst]:.1e}"
    passed = not failing if finite else None
    return RowsFound(Certificate("rows", passed, errors[worst], GRADIENTS, detail), failing, whole)


def _streamed_gradients(
    f: Function, params: Tree, batch: Any, w: Tensor, take_one: Any
) -> Iterable[tuple[str, Tensor]]:
    """Call `take_one` with Jᵀw of one parameter at a time during the reverse pass; return zeros of unused ones."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
    with torch.enable_grad():
        value = bare(f)(leaves, batch)
    done = set[str]()

    def hook(name: str) -> Any:
        def arrived(leaf: Tensor) -> None:
            assert leaf.grad is not None
            take_one(name, leaf.grad)
            leaf.grad = None
            done.add(name)

        return arrived

    for name, leaf in leaves.items():
        leaf.register_post_accumulate_grad_hook(hook(name))
    if value.requires_grad:
        torch.autograd.backward(value, w.to(value), inputs=[*leaves.values()])
    return [(name, torch.zeros_like(leaf)) for name, leaf in params.items() if name not in done]


def values_against_module(apply: Apply, params: Tree, one: Sequences) -> Certificate:
    """Compare log π of one sequence with the caller's module, with its own attention and configuration.

    error = |S of apply − S of the module| / (1 + |S|), over all tokens of the sequence but the first

    Args:
        apply: as `make_functional` returns it.
        params: θ.
        one: a batch of one sequence without padding.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from fkernel.func import make_functional, pad
        >>> shape = {"vocab_size": 11, "n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 1}
        >>> apply, params = make_functional(GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)))
        >>> values_against_module(apply, params, pad([[1, 2]], [[3]])).passed
        True
    """
    detail = "log π from `apply` and from the module as it was given, one sequence"
    if apply.original is None:
        return Certificate("values", None, float("nan"), VALUES, f"{detail}: there is no module to compare with")
    try:
        with torch.no_grad():
            theirs = _whole_logprob(logits_of(apply.original, params, one.input_ids, one.attention_mask), one)
    except Exception as error:  # the caller's own module may raise anything
        return Certificate("values", None, float("nan"), VALUES, f"{detail}: the module fails by itself ({error})")
    with torch.no_grad():
        ours = _whole_logprob(apply(params, one.input_ids, one.attention_mask), one)
    error = abs(ours - theirs) / (1 + abs(theirs))
    passed = None if error != error else error <= VALUES
    return Certificate("values", passed, error, VALUES, f"{detail}: {ours:.6g} and {theirs:.6g} nats")


def _whole_logprob(logits: Tensor, one: Sequences) -> float:
    """log π of a sequence given its first token, nats."""
    log_p = logits[:, :-1].double().log_softmax(-1)
    return float(log_p.gather(-1, one.input_ids[:, 1:, None]).sum())


def company(f: Function, alone: Tensor, beside: Tensor, again: Tensor) -> Certificate:
    """Compare f of a sequence alone with f of it beside a longer one, and alone once more.

    error = max(|beside − alone|, |again − alone|) / (1 + |alone|)

    Args:
        f: the function, for its name.
        alone: a scalar.
        beside: a scalar, of the same sequence padded to the width of a longer one.
        again: a scalar, of the same sequence alone after that.

    Example:
        >>> company(lambda params, batch: batch, torch.tensor(-2.0), torch.tensor(-2.3), torch.tensor(-2.0)).passed
        False
    """
    moved = max(float((beside - alone).abs().max()), float((again - alone).abs().max()))
    error = moved / (1 + float(alone.abs().max()))
    detail = f"{name_of(f)} of a sequence alone, beside a longer one, and alone again: {moved:.2g} apart"
    return Certificate("company", None if error != error else error <= VALUES, error, VALUES, detail)


def gradients_in_company(J_alone: Handles, J_beside: Handles) -> Certificate:
    """Compare the gradient of a sequence alone with its gradient padded to a longer one's width.

    error = ‖J_beside − J_alone‖ / ‖J_alone‖

    Args:
        J_alone: of one sequence.
        J_beside: of several, the same sequence first.

    Example:
        >>> gradients_in_company({"w": torch.ones(1, 2)}, {"w": torch.ones(3, 2)}).error
        0.0
    """
    apart = size = 0.0
    for name in J_alone:
        like = weighted_sum({name: J_alone[name]}, torch.ones(1))[name]
        first = torch.zeros(count(J_beside[name]), dtype=like.dtype)
        first[0] = 1.0
        beside = weighted_sum({name: J_beside[name]}, first)[name]
        apart, size = apart + float((beside - like).square().sum()), size + float(like.square().sum())
    error = (apart / size) ** 0.5 if size else 0.0
    detail = f"the gradient of a sequence alone and padded to another's width: {error:.1e} apart"
    return Certificate("company", None if error != error else error <= GRADIENTS, error, GRADIENTS, detail)


def forward_against_reverse(forward: Tensor, reverse: Tensor, size: float, order: Order) -> Certificate:
    """Compare a derivative by forward mode with reverse passes: nested forward rules may be wrong.

    error = |forward − reverse| / Σ_α |g_α v_α|, g the gradient (or, of the second derivative, Hv)

    Args:
        forward: the derivative of one sequence by forward mode.
        reverse: the same by reverse passes.
        size: Σ_α |g_α v_α|.
        order: the first or the second derivative.

    Example:
        >>> from fkernel.func.trust.directional import FIRST
        >>> forward_against_reverse(torch.tensor([1.0]), torch.tensor([1.1]), 2.0, FIRST).passed
        False
    """
    error = float((forward.detach() - reverse).abs().sum()) / (size + torch.finfo(reverse.dtype).tiny)
    detail = f"the {order.name} by forward mode and by reverse passes, one sequence: {error:.1e} apart"
    return Certificate("forward", None if error != error else error <= order.bound, error, order.bound, detail)


Values = Callable[[Function, Any, Sequence[float]], Iterable[Tensor]]
"""(f, batch, scales) -> f at θ + s v for each s, [n] float64."""


def derivative_against_difference(
    f: Function, params: Tree, batch: Any, direction: Tree, values: Values | None = None
) -> Certificate:
    """Compare the derivative along a step with central differences, to detect what f holds constant.

    The derivative is by reverse passes, as E's gradients are: forward mode differentiates through `torch.no_grad`.

    D(s) = (f(θ + s v) − f(θ − s v)) / 2s for several s, for which f changes by `MOVES`; the two neighbours that agree
    best are used, with their difference as uncertainty. error = ‖Jv − D‖ / ‖D‖. It stops at the first sufficient pair.

    It detects `detach()`, `torch.no_grad`, straight-through estimators and custom backward rules that differ from the
    derivative.

    Args:
        f: (params, batch) -> [n].
        params: θ.
        batch: some sequences.
        direction: v, the step.
        values: another way to evaluate f along the step; by default whole, one s after the other.

    Example:
        >>> f = lambda params, x: (x @ params["w"]) * (x @ params["w"]).detach()
        >>> theta, v = {"w": torch.ones(2).double()}, {"w": torch.full((2,), 0.1).double()}
        >>> derivative_against_difference(f, theta, torch.eye(2).double(), v).passed
        False
    """
    value_at = value_on(f, batch)
    value, slope = (each.double() for each in row_by_row(value_at, params, direction))
    size = min(1.0, float(value.abs().max())) or 1.0  # below one nat, relative to f
    steepest = float(slope.abs().max()) or 1.0
    scales = [move * size / steepest for move in MOVES]
    doubt, D = math.inf, slope
    error = own = math.nan
    both = [way * s for s in scales for way in (1, -1)]
    at = iter(_values(value_at, params, direction, both) if values is None else values(f, batch, both))
    for wider, narrower in pairwise((next(at) - next(at)) / (2 * s) for s in scales):
        apart = float((wider - narrower).norm())
        if apart < doubt:
            doubt, D, size = apart, narrower, float(narrower.norm())
            error, own = (float((slope - D).norm()) / size, doubt / size) if size else (0.0, 0.0)
        if max(error, own) <= DIFFERENCES:
            break
    if doubt == math.inf:
        return Certificate("derivative", None, math.nan, DIFFERENCES, "f is not finite along the step")
    bound = DIFFERENCES + own
    detail = (
        f"{name_of(f)} of {len(D)} sequences along the step: its derivative and central differences are {error:.1e} "
        f"apart, the differences among themselves {own:.1e}"
    )
    settled = own < 0.25 and error == error
    return Certificate("derivative", error <= bound if settled else None, error, bound, detail)


def _values(
    value_at: Callable[[Tree], Tensor], params: Tree, direction: Tree, scales: Iterable[float]
) -> Iterator[Tensor]:
    for s in scales:
        with torch.no_grad():
            leaves = leaves_of(params, moved(params, direction, s))
            value = leaves.run(value_at, {**leaves.constants, **leaves.trained}).double()
            del leaves  # before the next are made
        yield value


def shortest_pair(batch: Any, lengths: list[int]) -> Any:
    """Take the shortest sequence and the next longer one, or any other; one where there is only one."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    longer = [row for row in order[1:] if lengths[row] > lengths[order[0]]] or order[1:]
    return take(batch, torch.tensor([order[0], *longer[:1]]))


def shortest_few(batch: Any, lengths: list[int], one_width: bool = False, most: int = 2) -> Any:
    """Take the shortest sequences; of equal length if `one_width`."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    chosen = [row for row in order[:most] if not one_width or lengths[row] == lengths[order[0]]]
    return take(batch, torch.tensor(chosen))
