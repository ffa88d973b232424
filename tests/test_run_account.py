"""A run accounted for: its columns add up to what happened, and momentum is credited to the sequences that made it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fkernel as fk
from fkernel import func, precond, tree
from fkernel.engine import NODES, Executed, RunAccount, RunStep, Sweep, account, adjoint, step_gradients
from fkernel.engine import run as runs
from fkernel.errors import BatchError, TreeError
from fkernel.func.inputs import length
from tests.laws import close
from tests.models import MODELS, VOCABULARY
from tests.oracle import gradient, inner, log_distributions, logprobs, moved

STEPS, CLIP, TEMPERATURE = 12, 0.5, 0.9
Tree = dict[str, Tensor]


class Run(NamedTuple):
    """A run of torch's AdamW, as a recorder would keep it: steps in its order, E, and S of E before and after."""

    S: Any
    E: Any
    steps: list[RunStep]
    model: Any
    pairs: list[Any]


@cache
def run(name: str = "own", lr: float = 3e-3, rounded: bool = False) -> Run:
    """Take steps on a loss with token weights of both signs, from a state with a past, in two groups, and clipped."""
    model, draw = MODELS[name](3), torch.Generator().manual_seed(7)
    apply, _ = func.make_functional(model)
    f = func.weighted_logprob(apply, TEMPERATURE)
    named = dict(model.named_parameters())
    slow = {each for each in named if "norm" in each or "ln" in each or each.endswith("bias")}
    groups = [
        {"params": [p for n, p in named.items() if n not in slow], "weight_decay": 0.05, "betas": (0.9, 0.95)},
        {"params": [p for n, p in named.items() if n in slow], "lr": lr / 2, "weight_decay": 0.0, "betas": (0.8, 0.9)},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    recorded = list[RunStep]()
    for k in range(-3, STEPS):  # three steps before the first that is accounted for, so that there is something in m_0
        U = batch(draw, 2 + k % 3)
        state, before = _state(optimizer, named), {n: p.detach().clone() for n, p in named.items()}
        optimizer.zero_grad()
        f({**named}, U).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), CLIP)
        c = min(1.0, CLIP / (float(norm) + 1e-6))
        optimizer.step()
        if rounded:
            for p in named.values():
                p.data = _rounded(p.data, 12)
                optimizer.state[p]["exp_avg"] = _rounded(optimizer.state[p]["exp_avg"], 8)
        delta = {n: p.detach() - before[n] for n, p in named.items()}
        recorded.append(RunStep(f, before, U, -torch.ones(length(U), dtype=torch.float64), state, c, delta))
        for g in optimizer.param_groups:
            g["lr"] *= 0.97
    pairs = [pair(draw) for _ in range(4)]
    E = _padded(pairs)
    return Run(func.sequence_logprob(apply), E, recorded[3:], MODELS[name](3), pairs)


def _rounded(x: Tensor, bits: int) -> Tensor:
    """Keep so many bits of a mantissa."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)


def pair(draw: torch.Generator) -> tuple[list[int], list[int]]:
    sizes = torch.randint(1, 7, (2,), generator=draw).tolist()
    prompt, response = (torch.randint(VOCABULARY, (k,), generator=draw).tolist() for k in sizes)
    return prompt, response


def _padded(pairs: list[Any]) -> func.Sequences:
    prompts, responses = zip(*pairs, strict=True)
    return func.pad(prompts, responses)


def batch(draw: torch.Generator, n: int) -> func.Weighted:
    """Draw sequences with ω and η: shares of a loss."""
    sequences = _padded([pair(draw) for _ in range(n)])
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
    """Account for a run, its steps handed over from the last to the first."""
    return account(taken.S, taken.E, taken.steps[::-1], **options)


@cache
def whole_run(name: str, lr: float, path: Any) -> RunAccount:
    return accounted(run(name, lr), path=path)


def delta_of(step: RunStep) -> Tree:
    assert step.delta is not None
    return step.delta


def relative_error(result: RunAccount) -> float:
    return float(result.remainder.norm() / result.realised.norm())


@pytest.mark.parametrize("name", MODELS)
def test_the_columns_add_up_to_the_change_that_happened(name):
    taken = run(name)
    first, last = taken.steps[0].params, taken.steps[-1]
    before, after = (_at(taken.model, params) for params in (first, tree.axpy(1.0, delta_of(last), last.params)))
    happened = logprobs(after, taken.pairs) - logprobs(before, taken.pairs)
    for path, bound in (("start", 0.05), ("midpoint", 3e-3), ("gauss2", 2e-4)):
        result = whole_run(name, 3e-3, path)
        close(result.realised, happened)
        columns = sum(C.sum(1) for C in result.contributions) + result.before + result.decay
        assert float((columns - happened).norm() / happened.norm()) <= bound, path
        assert float(result.unexplained.norm()) <= 1e-12 * float(happened.norm())
        close(result.accounted, result.by_step.sum(1), 1e-12)
        assert min(float(C.sum(1).norm()) for C in result.contributions) > 0
        assert float(result.before.norm()) > 0.01 * float(happened.norm())


@pytest.mark.turns(6)
def test_the_error_falls_with_the_order_of_the_path():
    for path, order in (("start", 1.8), ("midpoint", 3.5), ("gauss2", 12.0)):
        large, small = (relative_error(whole_run("own", lr, path)) for lr in (3e-3, 1.5e-3))
        assert large / small >= order, f"{path}: half the steps divide the error by {large / small:.2f}"


@pytest.mark.parametrize("path", NODES)
def test_the_run_of_one_step_is_the_step(path):
    taken = run()
    step = replace(taken.steps[4], delta=None)
    result = account(taken.S, taken.E, [step], path=path)
    effect, _ = fk.explain_step(
        step.f, step.params, taken.E, step.U, step.weights, step.state, path=path, max_norm=CLIP, rows=taken.S
    )
    close(result.contributions[0], effect.contributions)
    close(result.own[:, 0], effect.batch)
    close(result.before, effect.momentum)
    close(result.momentum[:, 0], effect.momentum)
    close(result.decay, effect.decay)


def test_momentum_of_a_step_is_what_earlier_sequences_are_credited_with_in_it():
    taken = run()
    results = [accounted(taken._replace(steps=taken.steps[:t])) for t in (5, 6)]
    earlier, later = results
    credited = later.before - earlier.before
    for C, shorter in zip(later.contributions, earlier.contributions, strict=False):
        credited += (C - shorter).sum(1)
    close(later.momentum[:, 5], credited)
    close(later.own[:, 5], later.contributions[5].sum(1))


def test_contributions_are_those_of_the_unrolled_run():
    """Against plain autograd: every gradient of every step, followed through the momentum of every later step."""
    taken = run()
    T, names = 4, list(taken.steps[0].params)
    steps, result = taken.steps[:T], accounted(taken._replace(steps=taken.steps[:4]))
    at = [_at(taken.model, tree.axpy(0.5, delta_of(step), step.params)) for step in steps]
    rows = [[gradient(model, pair) for pair in taken.pairs] for model in at]
    for k, step in enumerate(steps):
        for u, g in enumerate(_shares(_at(taken.model, step.params), step.U)):
            expected = torch.zeros(len(taken.pairs), dtype=torch.float64)
            for t in range(k, T):
                after, number = taken.steps[t + 1].state, steps[t].number
                moves = {}
                for name in names:
                    β1, β2, lr = after.beta1[name], after.beta2[name], steps[t].state.lr[name]
                    root = (after.exp_avg_sq[name] / (1 - β2**number)).sqrt() + after.eps[name]
                    m = (1 - β1) * β1 ** (t - k) * step.clip * g[name]
                    moves[name] = -lr / (1 - β1**number) * m / root
                expected += torch.tensor([inner(row, moves) for row in rows[t]], dtype=torch.float64)
            close(result.contributions[k][:, u], expected, 1e-9)


def _at(model: Any, params: Tree) -> Any:
    return moved(model, tree.axpy(-1.0, {n: p.detach() for n, p in model.named_parameters()}, params), 1.0)


def _shares(model: Any, U: func.Weighted) -> Iterator[Tree]:
    """Each sequence's share of the loss, differentiated by plain autograd."""
    assert U.entropy_weights is not None
    for ids, mask, response, ω, η in zip(*U.sequences, U.token_weights, U.entropy_weights, strict=True):
        n, start = int(mask.sum()), int(response.long().argmax())
        pair = ids[:start].tolist(), ids[start:n].tolist()
        log_p = log_distributions(model, pair, TEMPERATURE)
        tokens = log_p.gather(1, ids[start:n, None])[:, 0]
        share = (ω[start:n] * tokens - η[start:n] * (log_p.exp() * log_p).sum(1)).sum()
        named = dict(model.named_parameters())
        yield dict(zip(named, torch.autograd.grad(share, [*named.values()]), strict=True))


@pytest.mark.turns(6)
def test_e_in_parts_gives_the_same_account(monkeypatch):
    taken = run()._replace(steps=run().steps[:4])
    whole, sweeps = accounted(taken), []
    sweep = runs._sweep
    monkeypatch.setattr(runs, "_sweep", lambda *args: sweeps.append(args) or sweep(*args))
    parts = accounted(taken, memory=_enough(taken, 2))
    assert len(sweeps) == 2
    for own, expected in zip(parts.contributions, whole.contributions, strict=True):
        close(own, expected)
    for own, expected in zip(parts[1:-1], whole[1:-1], strict=True):
        close(own, expected, floor=1e-5)  # what is unexplained here is rounding


def _enough(taken: Run, n: int) -> int:
    """A budget for n of E's sequences, by what the smallest is said to be."""
    with pytest.raises(BatchError, match="give at least") as error:
        accounted(taken, memory=1)
    P = sum(leaf.numel() * leaf.element_size() for leaf in taken.steps[0].params.values())
    return int(str(error.value).split("at least ")[1].split()[0]) + int((n - 1) * P / 0.95) + 2


@pytest.mark.turns(6)
@pytest.mark.parametrize("blocks", [1, 2])
def test_an_account_goes_on_from_where_it_was_stopped(blocks):
    taken, kept = run()._replace(steps=run().steps[:4]), list[Sweep]()
    memory = None if blocks == 1 else _enough(taken, 2)

    def keep(sweep: Sweep) -> None:
        kept.append(sweep._replace(rows={name: leaf.clone() for name, leaf in sweep.rows.items()}))

    whole = account(taken.S, taken.E, taken.steps[::-1], memory=memory, on_step=keep)
    assert [(len(sweep.done), sweep.taken) for sweep in kept] == [(b, t) for b in range(blocks) for t in (1, 2, 3, 4)]
    for sweep in kept:
        again = account(taken.S, taken.E, taken.steps[::-1], memory=memory, resume=sweep)
        for own, expected in zip(
            [*again.contributions, *again[1:-1]], [*whole.contributions, *whole[1:-1]], strict=True
        ):
            assert torch.equal(own, expected)


@pytest.mark.turns(6)
def test_long_sequences_are_walked_layer_by_layer(monkeypatch):
    taken = run("gpt2")._replace(steps=run("gpt2").steps[:3])
    whole = {path: accounted(taken, path=path) for path in ("midpoint", "gauss2")}
    monkeypatch.setattr(step_gradients, "LONG", 1)
    for module in (adjoint, step_gradients):
        monkeypatch.setattr(module, "computed", None)
    for path, expected in whole.items():
        result = accounted(taken, path=path)
        for own, other in zip(result.contributions, expected.contributions, strict=True):
            close(own, other)
        close(result.by_step, expected.by_step)
        close(result.before, expected.before)


@pytest.mark.turns(6)
def test_what_arithmetic_did_has_its_column_and_the_columns_still_add_up():
    """Moments and weights that are rounded after every step, as half precision does."""
    taken = run(rounded=True)
    result = accounted(taken, path="gauss2")
    close(result.accounted, result.by_step.sum(1), 1e-12)
    assert float(result.unexplained.norm()) > 1e-3 * float(result.realised.norm())
    assert float(result.arithmetic.norm()) == 0
    assert relative_error(result) <= 2e-4
    following = [step.state.exp_avg for step in taken.steps[1:]]
    steps = [
        replace(step, executed=Executed(delta_of(step), m))
        for step, m in zip(taken.steps, [*following, following[-1]], strict=True)  # the last step's m goes nowhere
    ]
    told_apart = accounted(taken._replace(steps=steps), path="gauss2")
    close(told_apart.arithmetic, result.unexplained)
    assert float(told_apart.unexplained.norm()) == 0
    close(told_apart.accounted, result.accounted)


def test_a_parameter_that_a_step_does_not_use_keeps_its_momentum_for_later():
    """torch skips it: no move, no decay, its moments and its count of steps as they were."""
    draw = torch.Generator().manual_seed(0)
    params = {n: torch.nn.Parameter(torch.randn(3, generator=draw, dtype=torch.float64)) for n in ("w", "b")}
    both = lambda p, x: (x @ p["w"]).tanh() + (x @ p["b"]).sin()  # noqa: E731
    one = lambda p, x: (x @ p["w"]).tanh()  # noqa: E731
    optimizer, steps = torch.optim.AdamW(params.values(), lr=0.05, weight_decay=0.1), []
    E = torch.randn(5, 3, generator=draw, dtype=torch.float64)
    for f in (both, one, both, one, one, both):
        U, w = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((4, 3), (4,)))
        state, before = _state(optimizer, params), {n: p.detach().clone() for n, p in params.items()}
        optimizer.zero_grad()
        (-w @ f(params, U)).backward()
        optimizer.step()
        delta = {n: p.detach() - before[n] for n, p in params.items()}
        steps.append(RunStep(f, before, U, w, state, delta=delta))
    result = account(both, E, steps[::-1], path="gauss2")
    assert float(result.unexplained.norm()) <= 1e-12
    close(result.accounted, result.by_step.sum(1), 1e-12)
    assert relative_error(result) <= 1e-4


def test_one_step_is_held_at_a_time():
    taken, alive = run()._replace(steps=run().steps[:4]), []

    def backwards() -> Iterator[RunStep]:
        for step in taken.steps[::-1]:
            assert not [ref for ref in alive if ref() is not None]
            fresh = replace(step, params={**step.params})
            alive.append(weakref.ref(fresh))
            yield fresh
            del fresh

    close(account(taken.S, taken.E, backwards()).accounted, accounted(taken).accounted)


@pytest.mark.turns(6)
def test_what_is_no_run_is_refused():
    taken = run()
    S, E, steps = taken.S, taken.E, taken.steps
    with pytest.raises(BatchError, match="the run's last first"):
        account(S, E, [])
    with pytest.raises(BatchError, match=r"In step 5: before it .* had taken 4 steps .* from the last to the first"):
        account(S, E, steps[:2])
    with pytest.raises(BatchError, match=r"In step 5: .* had taken 4 steps .* next one 6; expected 5"):
        account(S, E, [steps[3], steps[1]])
    with pytest.raises(BatchError, match=r"In step 5: it ends at parameters .* away"):
        account(S, E, [replace(steps[2], params=steps[5].params), steps[1]])
    with pytest.raises(BatchError, match="swept over 4 times, but steps is an iterator"):
        account(S, E, iter(steps[::-1]), memory=_enough(taken, 1))
    with pytest.raises(BatchError, match="In step 5: In U: "):
        account(S, E, [steps[2], replace(steps[1], U=E)])
    with pytest.raises(BatchError, match="weights has shape"):
        account(S, E, [replace(steps[2], weights=torch.ones(1))])
    with pytest.raises(TreeError, match="delta"):
        account(S, E, [replace(steps[2], delta={})])
