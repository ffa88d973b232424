"""A run accounted for: its columns add up to what happened, and momentum is credited to the sequences that made it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fkernel as fk
from fkernel import func, precond, tree
from fkernel.engine import NODES, RunAccount, RunStep, account
from fkernel.errors import BatchError, OptimizerStateError, TreeError
from fkernel.func.inputs import length
from tests.laws import close
from tests.models import MODELS, VOCABULARY
from tests.oracle import gradient, inner, moved

T, CLIP, BETAS, BETA1_SLOW = 12, 0.5, (0.9, 0.95), 0.8
Tree = dict[str, Tensor]


class Run(NamedTuple):
    """A run of torch's AdamW, as a recorder would keep it: steps in its order, E, and S of E before and after."""

    S: Any
    E: Any
    steps: list[RunStep]
    model: Any
    pairs: list[Any]


@cache
def run(name: str = "own", lr: float = 3e-3, steps: int = T) -> Run:
    """Take steps on a loss with token weights of both signs, from a state with a past, in two groups, and clipped."""
    model, draw = MODELS[name](3), torch.Generator().manual_seed(7)
    apply, _ = func.make_functional(model)
    f = func.weighted_logprob(apply, 0.9)
    named = dict(model.named_parameters())
    slow = {each for each in named if "norm" in each or "ln" in each or each.endswith("bias")}
    groups = [
        {"params": [p for n, p in named.items() if n not in slow], "weight_decay": 0.05, "betas": BETAS},
        {"params": [p for n, p in named.items() if n in slow], "lr": lr / 2, "weight_decay": 0.0, "betas": (0.8, 0.9)},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    recorded: list[RunStep] = []
    for k in range(-3, steps):  # three steps before the first that is accounted for, so that there is something in m_0
        U = batch(draw, 2 + k % 3)
        rates = {id(g): g["lr"] for g in optimizer.param_groups}
        state, before = _state(optimizer, named), {n: p.detach().clone() for n, p in named.items()}
        optimizer.zero_grad()
        f({**named}, U).sum().backward()
        clip = torch.nn.utils.clip_grad_norm_(named.values(), CLIP)
        c = min(1.0, CLIP / (float(clip) + 1e-6))
        optimizer.step()
        delta = {n: p.detach() - before[n] for n, p in named.items()}
        recorded.append(RunStep(f, before, U, -torch.ones(length(U), dtype=torch.float64), state, c, delta))
        for g in optimizer.param_groups:
            g["lr"] = 0.97 * rates[id(g)]
    pairs = [pair(draw) for _ in range(4)]
    E = func.pad(*zip(*pairs, strict=True))
    return Run(func.sequence_logprob(apply), E, recorded[3:], MODELS[name](3), pairs)


def pair(draw: torch.Generator) -> tuple[list[int], list[int]]:
    sizes = torch.randint(1, 7, (2,), generator=draw).tolist()
    prompt, response = (torch.randint(VOCABULARY, (k,), generator=draw).tolist() for k in sizes)
    return prompt, response


def batch(draw: torch.Generator, n: int) -> func.Weighted:
    """Draw sequences with ω and η: shares of a loss."""
    sequences = func.pad(*zip(*(pair(draw) for _ in range(n)), strict=True))
    ω, η = (torch.randn(sequences.input_ids.shape, generator=draw, dtype=torch.float64) for _ in range(2))
    return func.Weighted(sequences, ω / n, 0.1 * η / n)


def _state(optimizer: torch.optim.Optimizer, named: dict[str, Any]) -> precond.AdamWState:
    of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    past = {name: optimizer.state.get(p, {}) for name, p in named.items()}
    zero = {name: torch.zeros_like(p) for name, p in named.items()}
    settings = {name: of[id(p)] for name, p in named.items()}
    return precond.AdamWState(
        step={name: int(past[name].get("step", 0)) for name in named},
        exp_avg={name: past[name].get("exp_avg", zero[name]).clone() for name in named},
        exp_avg_sq={name: past[name].get("exp_avg_sq", zero[name]).clone() for name in named},
        lr={name: each["lr"] for name, each in settings.items()},
        beta1={name: each["betas"][0] for name, each in settings.items()},
        beta2={name: each["betas"][1] for name, each in settings.items()},
        eps={name: each["eps"] for name, each in settings.items()},
        weight_decay={name: each["weight_decay"] for name, each in settings.items()},
    )


def accounted(taken: Run, **options: Any) -> RunAccount:
    return account(taken.S, taken.E, taken.steps[::-1], **options)


def error_of(result: RunAccount) -> float:
    return float(result.remainder.norm() / result.realised.norm())


if __name__ == "__main__":
    import time
    for name in MODELS:
        for lr in (3e-3, 1.5e-3):
            taken = run(name, lr)
            print([round(s.clip,2) for s in taken.steps])
            for path in NODES:
                t0=time.time()
                a = accounted(taken, path=path)
                print(name, lr, path, error_of(a), a.realised.tolist(), float((a.accounted - a.by_step.sum(1)).norm()), a.unexplained.norm().item(), a.before.norm().item(), a.decay.norm().item(), time.time()-t0)
