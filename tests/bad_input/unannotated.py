"""What public functions refuse where annotations are not executed, as users run them: `python -m` this.

Each case is a call that must raise, the kind of its error, and pieces of the message.
"""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fkernel
from fkernel import analysis, engine, func, precond
from fkernel.boundary import public
from fkernel.errors import ArgumentError, BatchError, NonFiniteError, OptimizerStateError
from tests.torture.examples import public_functions

Case = tuple[Callable[[], Any], type[Exception], tuple[str, ...]]
anything: Any = getattr
"""`anything(room, name)` is a function without a type, so that it may be given what it does not take."""
ENTERED = ("func.made_certificates", "func.skip_certificates", "func.without_weights")
ENTERED = (*ENTERED, "engine.listening", "engine.reuse_memory")
"""Context managers: what fails within them is not theirs."""
W = {"w": torch.ones(2)}
GROUPS = torch.tensor([0, 0, 1, 1])


def _raising(params: Any, batch: Any) -> Any:
    raise KeyError("mine")


_LIBRARY: dict[str, Any] = {"torch": torch}
exec("def full(n): raise torch.OutOfMemoryError", _LIBRARY)  # as generated code of a library: not a user's function
_full = public(_LIBRARY["full"])
_BESIDE: dict[str, Any] = {}
exec(compile("def mine(n): return {}[n]", f"{Path(fkernel.__file__).parent}-runs/mine.py", "exec"), _BESIDE)
_mine = public(_BESIDE["mine"])


NAMES: dict[str, Case] = {
    "function, argument, signature": (
        lambda: anything(analysis, "by_part")(torch.ones(2, 3)),
        ArgumentError,
        (
            "fkernel.analysis.parts.by_part cannot use what it was given (TypeError: ",
            "Given: name: torch.float32 [2, 3].",
            "It takes by_part(name: 'str') -> 'str'.",
        ),
    ),
    "several arguments": (
        lambda: anything(analysis, "kernel_pca")(torch.eye(2), "many"),
        ArgumentError,
        ("kernel_pca", "K: torch.float32 [2, 2]; components: 'many'"),
    ),
    "containers": (
        lambda: anything(func, "squared_sum")({"w": [1.0, 2.0], "b": None}),
        ArgumentError,
        ("{'w': [1.0, 2.0], 'b': None}",),
    ),
    "kinds of tensors": (
        lambda: anything(analysis, "group_sums")(torch.eye(2).to_sparse(), torch.ones(2, device="meta"), 2),
        ArgumentError,
        ("x: torch.float32 [2, 2] torch.sparse_coo, on cpu; place: torch.float32 [2] torch.strided, on meta",),
    ),
    "an argument too many": (lambda: anything(precond, "identity")(3), ArgumentError, ("identity", "Given: 0: 3.")),
    "an unknown argument": (
        lambda: anything(precond, "clip_factor")(W, norm=1.0),
        ArgumentError,
        ("clip_factor", "norm: 1.0"),
    ),
    "what a function returned": (
        lambda: anything(func, "jvp")(lambda params, x: x @ params["w"])(W, torch.ones(1, 2), 3),
        ArgumentError,
        ("product cannot use", "direction: 3"),
    ),
    "what yields": (
        lambda: list(anything(engine, "contraction")(None, None, "none")),
        ArgumentError,
        ("contraction", "spec: 'none'"),
    ),
    "the user's own error": (lambda: func.evaluate(_raising)(W, torch.ones(1, 2)), KeyError, ("mine",)),
    "the user's own, in a folder that is named like ours": (lambda: _mine("mine"), KeyError, ("mine",)),
    "a full memory": (lambda: _full(1), torch.OutOfMemoryError, ()),
    "no function": (lambda: anything(func, "through_detach")([]), ArgumentError, ("f is []; expected a function",)),
}

STEPS: dict[str, Case] = {
    f"a step of {str(step)[:20]}": (
        lambda step=step: precond.AdamWState(**{**vars(precond.adamw_init(W, lr=0.1)), "step": {"w": step}}),
        OptimizerStateError,
        ("step['w'] is ", "expected a whole number of steps"),
    )
    for step in (math.inf, math.nan, -1, 10**400, "é", [1], None, torch.ones(2))
}
MOMENTS: dict[str, Case] = {
    f"a moment of {str(moment)[:20]!r} of {kind}": (
        lambda kind=kind, moment=moment: anything(precond, "state_from")(
            kind, W, {"w": {"step": 1, "exp_avg": moment, "exp_avg_sq": W["w"]}}, {"w": GROUP}
        ),
        OptimizerStateError,
        ("exp_avg['w'] is ", "expected a dense tensor of real numbers"),
    )
    for kind in ("adamw", "lion", "adam")
    for moment in ("x", [1.0, 2.0], True, torch.ones(2).to_sparse(), torch.ones(2) * 1j)
}
GROUP = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
SETTINGS: dict[str, Case] = {
    f"a weight decay of {str(value)[:20]} of {kind}": (
        lambda kind=kind, value=value: precond.fresh_state(kind, W, lr=0.1, weight_decay=value),
        OptimizerStateError,
        ("weight_decay['w'] is ", "expected"),
    )
    for kind in ("adamw", "adam", "sgd", "lion", "muon")
    for value in (math.nan, math.inf, 1e305, 10**400)
}
DRAWS: dict[str, Case] = {
    "a thousand million permutations": (
        lambda: analysis.permutations(GROUPS, 10**9),
        BatchError,
        ("1000000000 draws of 4 sequences are 4e+09 numbers", "fewer"),
    ),
    "a thousand million resamplings": (lambda: analysis.resamplings(GROUPS, 10**9), BatchError, ("4e+09 numbers",)),
    "a negative seed": (lambda: analysis.permutations(GROUPS, 2, seed=-1), BatchError, ("seed is -1",)),
    "clip by infinity": (lambda: precond.clip_gradient(W, clip=math.inf), OptimizerStateError, ("clip is inf",)),
    "clip by text": (lambda: anything(precond, "clip_gradient")(W, clip="x"), OptimizerStateError, ("clip is 'x'",)),
}


def _no_number(bad: torch.Tensor) -> dict[str, Callable[[], Any]]:
    zero = torch.zeros(2)
    whole: Any = {"batch": zero, "momentum": zero, "realised": zero, "floor": zero}
    return {
        "pearson": lambda: engine.pearson(bad, torch.tensor([1.0, 2.0])),
        "state_against_step": lambda: engine.state_against_step(W, {"w": bad}, W),
        "shares": lambda: analysis.shares({"MLP": bad}),
        "missed": lambda: analysis.missed({"MLP": bad}),
        "summed": lambda: analysis.summed({"layer 0 · MLP": bad}, ["h.0.mlp.up_proj"], func.by_kind),
        "floor_from": lambda: analysis.floor_from(bad, bad, torch.float32),
        "floor_scale": lambda: analysis.floor_scale(bad, bad, bad),
        "recurrences": lambda: analysis.recurrences(["a", "a"], [0, 1], bad.tolist()),
        "turning_points": lambda: analysis.turning_points(bad.tolist()),
        "cancellation": lambda: precond.cancellation(W, W, {"w": bad}),
        "executed_step": lambda: precond.executed_step({"w": bad}, {**W}, precond.adamw_init(W, lr=0.1)),
        "ledger": lambda: analysis.ledger(**whole, decay=bad),
    }


NO_NUMBERS: dict[str, Case] = {
    f"{value} in {name}": (call, NonFiniteError, ("non-finite",))
    for value in (math.nan, math.inf)
    for name, call in _no_number(torch.tensor([1.0, value])).items()
}
CASES = NAMES | STEPS | MOMENTS | SETTINGS | DRAWS | NO_NUMBERS


def outcome(case: Case) -> str:
    """Make a call; say what is wrong with its error, or that it is as expected."""
    call, kind, pieces = case
    try:
        call()
    except kind as error:
        missing = [piece for piece in pieces if piece not in str(error)]
        return f"the message lacks {missing}: {error}" if missing else "as expected"
    except Exception:
        return traceback.format_exc()
    return "it is taken"


def without_boundary() -> list[str]:
    """Public functions that lack `@public`."""
    files = {name: function.__code__.co_filename for name, function in public_functions().items()}
    return [name for name, file in files.items() if not file.endswith("boundary.py") and name not in ENTERED]


if __name__ == "__main__":
    outcomes = {name: outcome(case) for name, case in CASES.items()}
    print("\n".join(f"{name}: {said}" for name, said in outcomes.items()))
    print(f"without: {without_boundary()}")
    sys.exit(any(said != "as expected" for said in outcomes.values()))
