"""One row of the sweep: what fkernel says of a model, quantity by quantity, against what is true of it.

Every quantity is right, wrong (its error is beyond its bound), refused (an error that fkernel raises on purpose) or raw
(any other exception). The row's verdict follows from them:

    right                           every quantity is right
    right, without forward mode     jvp or curvature is refused, everything else is right
    right, held constant in         the model detaches something: its gradients and Jv are what backward() gives, not
    backward                        the derivative; fkernel says so, and `through_detach` has the derivative right
    refused                         values, gradients or what is made of them are refused
    wrong, raw                      some quantity is
    not built                       there is no such tiny model here
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import fkernel as fk
from benchmarks.sweep import oracle
from fkernel import func, precond

HELD = "right, held constant in backward"
VERDICTS = ("right", "right, without forward mode", HELD, "refused", "wrong", "raw", "not built")
FAILURES = ("wrong", "raw")
FORWARD_MODE = ("jvp", "curvature")

BOUNDS = {"values": 1e-5, "gradients": 1e-4, "vjp": 1e-4, "kernel": 1e-4, "jvp": 1e-3, "curvature": 0.01}
"""Largest relative error in float64; many models compute their softmax and norms in float32 all the same."""
FLOAT32 = 10.0
"""How much more is allowed of a model that runs in float32 only."""
DOUBT = 10.0
"""How many times the differences' own doubt an error may be, up to `LARGEST`."""
LARGEST = 0.1
STEP = 1e-3
"""What part of the direction is the step that fkernel is asked about."""
SEEDS = (1, 2, 3, 4)
"""Of weights and direction: the first whose differences are doubtful by less than `ENOUGH`, or the best of them."""
ENOUGH = 0.005

Row = dict[str, Any]


class Truth(NamedTuple):
    """What plain autograd and differences say of one model."""

    S: torch.Tensor
    J: oracle.Tree
    direction: oracle.Tree
    slope: oracle.Estimate
    bend: oracle.Estimate
    causal: bool


def judge(make: Callable[[], nn.Module], progress: Callable[[str], None] = lambda stage: None) -> Row:
    """Build a model and judge what fkernel says of it; `progress` hears of every stage before it begins."""
    start = time.perf_counter()
    progress("not built")
    try:
        model, truth, dtype = built(make)
    except Exception as error:
        return {"verdict": "not built", "reason": first_line(error), "seconds": round(time.perf_counter() - start, 1)}
    progress("raw")
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        quantities = judged(model, truth, FLOAT32 if dtype == torch.float32 else 1.0)
    return {
        "verdict": verdict(quantities),
        "reason": reason(quantities, truth),
        "class": type(model).__name__,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
        "quantities": quantities,
        "doubt": {"jvp": rounded(truth.slope.doubt), "curvature": rounded(truth.bend.doubt)},
        "backward_off": rounded(oracle.relative(oracle.times(truth.J, truth.direction), truth.slope.value)),
        "causal": truth.causal,
        "warnings": sorted({first_line(each.message) for each in raised if _is_ours(each)}),
        "seconds": round(time.perf_counter() - start, 1),
    }


def built(make: Callable[[], nn.Module]) -> tuple[nn.Module, Truth, torch.dtype]:
    """Build the model, with weights at which differences say something, and find out what is true of it.

    Where experts or keys are nearly tied, the smallest step goes over to another choice; other weights have other ties.
    """
    with _quiet():
        best = _attempt(make, SEEDS[0])
        for seed in SEEDS[1:]:
            if _doubt(best[1]) < ENOUGH:
                break
            best = min(best, _attempt(make, seed), key=lambda attempt: _doubt(attempt[1]))
    return best


def lively(model: nn.Module, seed: int) -> nn.Module:
    """Give the model weights that matter: small matrices are drawn anew, all else is moved by noise.

    Initial weights of 0.02 make every layer nearly linear and every gradient look alike; zeros hide whole branches.
    """
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in model.parameters():
            noise = torch.randn(leaf.shape, generator=source).to(leaf.dtype)
            leaf.nan_to_num_(0.0)
            if leaf.ndim > 1 and float(leaf.square().mean()) < 0.01:
                leaf.copy_(0.7 * noise / leaf.shape[-1] ** 0.5)
            else:
                leaf.add_(noise, alpha=0.1)
    return model


def truth_of(model: nn.Module, seed: int) -> Truth:
    """Ask plain autograd and differences, on a copy."""
    exact = oracle.oracle_of(model)
    S, J = oracle.gradients(exact)
    if not all(bool(torch.isfinite(leaf).all()) for leaf in (S, *J.values())):
        raise ValueError("plain autograd itself is not finite on this model")
    source = torch.Generator().manual_seed(-seed)
    v = {name: 0.1 * torch.randn(leaf.shape[1:], generator=source).to(leaf.dtype) for name, leaf in J.items()}
    return Truth(S, J, v, *oracle.along(exact, v), oracle.is_causal(exact))


def _attempt(make: Callable[[], nn.Module], seed: int) -> tuple[nn.Module, Truth, torch.dtype]:
    """Build the model in float64, or in float32 where it cannot run in float64."""
    torch.manual_seed(seed)
    model = lively(make().eval(), seed)
    try:
        return model.double(), truth_of(model, seed), torch.float64
    except Exception:
        return model.float(), truth_of(model, seed), torch.float32


def _doubt(truth: Truth) -> float:
    return max(truth.slope.doubt, truth.bend.doubt)


def judged(model: nn.Module, truth: Truth, slack: float) -> dict[str, Row]:
    """Compute every quantity and compare it."""
    try:
        apply, params = func.make_functional(model)
    except Exception as error:
        return {name: failure(error) for name in BOUNDS}
    S, batch = func.sequence_logprob(apply), func.pad(oracle.PROMPTS, oracle.RESPONSES, pad_id=0)
    E, J = func.Sequences(*(leaf[1:3] for leaf in batch)), oracle.flat(truth.J)
    w = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=next(iter(params.values())).dtype)
    spec: dict[str, tuple[Callable[[], torch.Tensor], torch.Tensor, float]] = {
        "values": (lambda: S(params, batch), truth.S, 0.0),
        "gradients": (lambda: oracle.flat(func.per_sequence_grad(S)(params, batch)), J, 0.0),
        "vjp": (lambda: _flat(func.vjp(S)(params, batch, w)), w.double() @ J, 0.0),
        "kernel": (lambda: fk.kernel(S, params, E, batch, precond.identity()), J[1:3] @ J.T, 0.0),
        "jvp": (lambda: func.jvp(S)(params, batch, truth.direction), truth.slope.value, truth.slope.doubt),
        "curvature": (lambda: func.curvature(S)(params, batch, truth.direction), truth.bend.value, truth.bend.doubt),
    }
    quantities = {
        name: compared(compute, expected, allowed(name, slack, doubt))
        for name, (compute, expected, doubt) in spec.items()
    }
    if quantities["jvp"]["verdict"] == "wrong":
        with suppress(Exception):  # then it is wrong
            quantities |= held_constant(model, batch, truth, slack)
    return quantities


def allowed(name: str, slack: float, doubt: float = 0.0) -> float:
    """How far a quantity may be off, relative."""
    return min(max(BOUNDS[name] * slack, DOUBT * doubt), LARGEST)


def held_constant(model: nn.Module, batch: func.Sequences, truth: Truth, slack: float) -> dict[str, Row]:
    """Judge Jv and vᵀHv of a model that holds something constant in its backward pass; {} if it is not such a one.

    It is one if its Jv is what backward() gives, fkernel warns that this is not what happens, and the derivative
    through what is held constant is what happens.
    """
    apply, params = func.make_functional(model)
    S, v = func.sequence_logprob(apply), truth.direction
    whole, trained = func.through_detach(S), oracle.times(truth.J, v)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        backward = compared(lambda: func.jvp(S)(params, batch, v), trained, allowed("jvp", slack))
        other = func.true_derivative(S, params, batch, {name: STEP * leaf for name, leaf in v.items()})
    _again(raised)
    jvp = compared(
        lambda: func.jvp(whole)(params, batch, v), truth.slope.value, allowed("jvp", slack, truth.slope.doubt)
    )
    if backward["verdict"] != "right" or jvp["verdict"] != "right" or not (other is not S or is_noticed(raised)):
        return {}
    bend = oracle.bend_of_values(oracle.oracle_of(model), v)
    curvature = compared(
        lambda: func.curvature(whole)(params, batch, v), bend.value, allowed("curvature", slack, bend.doubt)
    )
    held = {"backward": backward["error"], "by_true_derivative": other is not S}
    return {"jvp": {**jvp, "held": held}, "curvature": curvature}


def is_noticed(raised: Sequence[warnings.WarningMessage]) -> bool:
    """Tell whether a warning says that the model holds something constant in its backward pass."""
    told = [str(each.message) for each in raised if issubclass(each.category, fk.ModelWarning)]
    return any("hold" in message and "backward" in message for message in told)


def _again(raised: Sequence[warnings.WarningMessage]) -> None:
    """Pass warnings on that were caught."""
    for each in raised:
        warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def compared(compute: Callable[[], torch.Tensor], expected: torch.Tensor, bound: float) -> Row:
    """Compute one quantity and hold it against the truth."""
    try:
        error = oracle.relative(compute().detach(), expected)
    except Exception as raised:
        return failure(raised)
    return {"verdict": "right" if error <= bound else "wrong", "error": rounded(error), "bound": rounded(bound)}


def failure(error: Exception) -> Row:
    """Tell an error that fkernel raises on purpose from any other."""
    return {"verdict": "refused" if isinstance(error, fk.FKernelError) else "raw", "reason": first_line(error)}


def verdict(quantities: dict[str, Row]) -> str:
    """Sum the quantities' verdicts up."""
    verdicts = {name: quantity["verdict"] for name, quantity in quantities.items()}
    for worst in ("raw", "wrong"):
        if worst in verdicts.values():
            return worst
    if any(each == "refused" for name, each in verdicts.items() if name not in FORWARD_MODE):
        return "refused"
    if "refused" in verdicts.values():
        return "right, without forward mode"
    return HELD if "held" in quantities.get("jvp", {}) else "right"


def reason(quantities: dict[str, Row], truth: Truth) -> str:
    """Say what is not right, and why."""
    parts: dict[str, list[str]] = {}
    for name, quantity in quantities.items():
        if quantity["verdict"] == "wrong":
            parts.setdefault(f"off by more than {quantity['bound']:.0e}: {quantity['error']:.1e}", []).append(name)
        elif quantity["verdict"] != "right":
            parts.setdefault(quantity["reason"], []).append(name)
    words = [f"{', '.join(names)}: {why}" for why, names in parts.items()]
    return "; ".join(words if truth.causal else [*words, "the model is not causal: earlier logits see the last token"])


def first_line(error: object) -> str:
    """Class and first line of an exception or warning."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {text}".replace(str(Path.home()), "~")[:300]


def rounded(value: float) -> float:
    """Keep two digits: more would be noise."""
    return float(f"{value:.2g}")


def _flat(tree: oracle.Tree) -> torch.Tensor:
    return torch.cat([leaf.double().flatten() for leaf in tree.values()])


def _is_ours(raised: warnings.WarningMessage) -> bool:
    """Tell what fkernel warns of from what torch and transformers do while it runs."""
    if "Triggered internally" in str(raised.message):  # torch's C++, which gives the nearest Python file as its own
        return False
    return raised.category.__module__.startswith("fkernel") or "fkernel" in Path(raised.filename).parts


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
