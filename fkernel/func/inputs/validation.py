"""Input validation before transforms, and translation of their errors.

Inside `torch.func` transforms values cannot be read and errors mention internals. So inputs are checked here, once a
call, with errors in the user's own names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fkernel import tree
from fkernel.distributed import ShardedTree
from fkernel.errors import BatchError, FKernelError, ModelError, NonFiniteError, TreeError, listing
from fkernel.func.inputs.batch import check_batch
from fkernel.func.inputs.objective import Function, Objective
from fkernel.func.inputs.source import HALF
from fkernel.shapes import Tensor, Tree

_TWICE = (
    "f computes activations again in backward (torch.utils.checkpoint), which torch.func cannot follow; call those "
    "layers directly, which changes no value and no gradient"
)
_ADVICE = (
    (
        "called random operation",
        "f draws random numbers (dropout?); put the model in eval mode: model.eval()",
    ),
    (
        "data-dependent control flow",
        "f branches on values, which vmap cannot follow; use torch.where instead of if, or make_functional, which sets "
        "eager attention (its masks do not branch)",
    ),
    (
        "inplace arithmetic",
        "f changes a tensor in place that is the same for all sequences, which vmap cannot follow; let it make a new "
        "one (x = x + y instead of x += y)",
    ),
    (
        "in-place",
        "f changes a tensor in place in a way that autograd cannot follow; let it make a new one",
    ),
    (
        "dynamic shape",
        "f makes a tensor whose shape depends on values (a boolean index, nonzero, unique), which vmap cannot follow; "
        "use torch.where",
    ),
    (
        "forward AD",
        "an operation in f has neither a forward-mode derivative nor a second backward rule; use make_functional, "
        "which sets eager attention, or plain torch operations",
    ),
    (
        "setup_context",
        "f calls a custom autograd.Function without setup_context, which torch.func cannot transform",
    ),
    (
        "doesn't have storage",
        "f looks at the storage of a tensor (data_ptr, a custom kernel, DLPack), which there is none of inside of "
        "torch.func transforms; use plain torch operations",
    ),
    (
        "escaped from inside a function being vmapped",
        "f keeps tensors of one call for the next (a cache?), or computes activations again in backward (torch.utils."
        "checkpoint); switch that off, or let it be a pure function",
    ),
    ("torch.utils.checkpoint", _TWICE),
    ("maybe_level.has_value()", _TWICE),  # vmap's rule of an operation that runs when vmap has ended
    ("nn.DataParallel", "the model is wrapped for several devices; give make_functional the one inside: model.module"),
)
"""(torch's message, advice), used only where the slower exact methods, which are tried first, fail as well."""


def advice_on(error: BaseException) -> str:
    """Return advice on an error of torch; empty where there is none."""
    return next((advice for sign, advice in _ADVICE if sign in str(error)), "")


def first_line(error: BaseException) -> str:
    """Return the first line of an error message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def validated(f: Function, params: Tree, batch: Any) -> Iterator[None]:
    """Check the inputs, run the body, and translate errors of torch.func.

    Raises:
        BatchError, TreeError, NonFiniteError: invalid input; see `check_batch` and `check_params`.
        ModelError: f draws random numbers, or cannot be transformed.
    """
    check_inputs(f, params, batch)
    with translate_errors(params):
        yield


@contextmanager
def translate_errors(params: Tree) -> Iterator[None]:
    """Run transforms of f; translate errors of torch.func, and refuse random numbers."""
    before = _random_state(params)
    try:
        yield
    except FKernelError:
        raise
    except IndexError as error:
        raise BatchError(
            f"f looked up a row that does not exist ({error}); is a token id outside of the model's vocabulary, or the "
            f"batch wider than its context?"
        ) from error
    except (RuntimeError, NotImplementedError) as error:
        if advice := advice_on(error):
            raise ModelError(f"{advice}. ({first_line(error)})") from error
        raise
    if any(not torch.equal(x, y) for x, y in zip(before, _random_state(params), strict=True)):
        raise ModelError(
            "f draws random numbers (dropout?), so two evaluations differ and no derivative of it means anything; "
            "put the model in eval mode: model.eval()."
        )


def check_inputs(f: Function, params: Tree, batch: Any, half: bool = False) -> None:
    """Check params and batch, also by f's own check; `half` allows half precision."""
    check_values_are_there(f, params)
    check_params(params, half)
    check_batch(batch)
    if isinstance(f, Objective):
        f.check(batch)


def check_params(params: Tree, half: bool = False) -> None:
    """Raise unless params is a non-empty tree of finite float32 or float64 tensors (or of `HALF`, if allowed)."""
    if not isinstance(params, dict) or not params:
        given = "an empty dict" if isinstance(params, dict) else type(params).__name__
        raise TreeError(f"params is {given}; expected {{name: tensor}}, as make_functional returns it.")
    for name, leaf in params.items():
        if leaf.dtype not in (torch.float32, torch.float64, *(HALF if half else ())):
            raise TreeError(
                f"params[{name!r}] is {leaf.dtype}. fkernel differentiates in float32 or float64: at half precision "
                f"rounding exceeds what one optimizer step changes. Convert: fkernel.tree.cast(params, torch.float32)."
            )
    tree.check_finite(params.shards if isinstance(params, ShardedTree) else params, "params")


def check_values_are_there(f: Function, params: Tree) -> None:
    """Raise ModelError where the model, or the tree of its parameters, has shapes without values.

    Raises:
        ModelError: parameters or buffers lie on the meta device; the message names them.
        TreeError: a parameter has another shape than the model's.
    """
    if not isinstance(params, ShardedTree):
        tree.check_tensors(params, "params")
    without = [name for name, leaf in params.items() if leaf.is_meta]
    module = getattr(getattr(f, "apply", None), "module", None)
    given = params.shards if isinstance(params, ShardedTree) else params
    if not without and module is not None:
        without = [name for name, leaf in module.named_parameters() if leaf.is_meta and name not in given]
    if without:
        raise ModelError(
            f"{listing(without)} lie on the meta device and hold no values; load the weights first, or give this "
            f"rank's shards of them among params, with mesh=."
        )
    shapes = {} if module is None else {name: leaf.shape for name, leaf in module.named_parameters()}
    for name, leaf in params.items():
        if leaf.shape != shapes.get(name, leaf.shape):
            raise TreeError(
                f"params[{name!r}] has shape {list(leaf.shape)}, the model's is {list(shapes[name])}: is it of another "
                f"model, or this rank's shard of it? Then say over which ranks: mesh=."
            )
    if module is not None and (lost := [name for name, leaf in module.named_buffers() if leaf.is_meta]):
        raise ModelError(
            f"The buffers {listing(lost)} lie on the meta device and hold no values, and are in no checkpoint. Make "
            f"the model within fkernel.func.without_weights(), which leaves buffers their values."
        )


def check_direction(direction: Tree, params: Tree) -> None:
    """Raise unless `direction` is a finite vector of the parameters' space: same names, shapes and dtypes."""
    tree.check_same(direction, params, "direction", "params")
    tree.check_finite(direction, "direction")


def check_weights(weights: Tensor, n: int) -> None:
    """Raise unless there is one finite weight a sequence."""
    if weights.ndim != 1 or weights.shape[0] != n:
        raise BatchError(f"weights has shape {list(weights.shape)}; the batch holds {n} sequences, so expected [{n}].")
    if not tree.all_finite(weights):
        row = int((~torch.isfinite(weights)).nonzero()[0])
        raise NonFiniteError(f"weights[{row}] is {float(weights[row])}; every sequence needs a finite weight.", row=row)


def check_output(value: Any, n: int, per_sequence: bool) -> None:
    """Raise ModelError unless f returned one value (or one row) a sequence; shapes can be read under any transform."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        given = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ModelError(f"f returned {given}; expected a floating-point tensor [n], one value a sequence.")
    if value.ndim == 0 or value.shape[0] != n or (per_sequence and value.ndim != 1):
        expected = "[n]" if per_sequence else "[n] or [n, ...]"
        raise ModelError(
            f"f returned shape {list(value.shape)} for a batch of {n}; expected {expected}, one a sequence."
        )


def check_rows(rows: Tree) -> None:
    """Raise NonFiniteError naming the sequence and the parameter of the first non-finite per-sequence gradient."""
    for name, leaf in rows.items():
        if not tree.all_finite(leaf):
            bad = (~torch.isfinite(leaf)).reshape(len(leaf), -1).any(1).nonzero()
            row = int(bad[0])
            raise NonFiniteError(
                f"The gradient of sequence {{row}} with respect to {name!r} is not finite ({len(bad)} of {len(leaf)} "
                f"sequences); a log-probability of −inf or an overflow inside the model is the usual cause.",
                row=row,
                parameter=name,
            )


def _random_state(params: Tree) -> list[Tensor]:
    devices = {leaf.device for leaf in params.values() if leaf.is_cuda}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
