"""What is true of a model: plain autograd and central differences, one unpadded sequence at a time.

Nothing here is fkernel's. The gradient comes from `torch.autograd.grad`; the derivatives along a direction v come from
Richardson's central differences of values and of gradients, at falling steps h:

    d/dε S(θ + εv)      ≈ (8 (S₁ − S₋₁) − (S₂ − S₋₂)) / 12h       S_k = S(θ + k h v)
    d²/dε² S(θ + εv)    ≈ the same of k ↦ ⟨∇S(θ + k h v), v⟩
                        ≈ (16 (S₁ + S₋₁) − (S₂ + S₋₂) − 30 S₀) / 12h²       where ∇S is not the derivative of S

Many models compute partly in float32, which a small step drowns in, and many choose (experts, keys), which a large step
changes: no step is right for all. For every sequence the three neighbouring steps that agree best are taken, for two
agree by luck now and then, and how far the three disagree is the estimate's doubt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import nn

PROMPTS = [[5, 6, 7, 18, 9], [8, 9], [10, 11, 12, 13, 4, 6], [14]]
RESPONSES = [[15, 16, 17, 18, 5, 3, 21], [5, 19, 6, 22, 7], [3, 11, 23], [20, 21, 22, 3, 4, 17, 9, 8, 10, 12, 5, 7, 13]]
"""Ragged, and longer than the tiny models' windows and chunks."""

STEPS = (0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5)

Tree = dict[str, torch.Tensor]


class Estimate(NamedTuple):
    """A value of differences [n], and how far the steps that agree best disagree (relative)."""

    value: torch.Tensor
    doubt: float


def oracle_of(model: nn.Module) -> nn.Module:
    """Copy the model, as it is given but for three things.

    Dropout is off. Expert layers are eager, since their fused kernels lack float64. And an embedding's padding row has
    its true derivative, which `torch.nn.Embedding(padding_idx=…)` withholds from gradients and from nothing else.
    """
    oracle = copy.deepcopy(model).eval()
    for part in oracle.modules():
        if type(part) is nn.Embedding:
            part.padding_idx = None
        if hasattr(part, "set_experts_implementation"):
            cast(Any, part).set_experts_implementation("eager")
    return oracle


def logits(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """Logits [t v] of one sequence."""
    tokens = torch.tensor([ids])
    return model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[0]


def log_probability(model: nn.Module, row: int) -> torch.Tensor:
    """Σ log π(x_t | x_<t) over the response of one sequence; logits before it (of soft prompts, say) are dropped."""
    prompt, response = PROMPTS[row], RESPONSES[row]
    ids = [*prompt, *response]
    log_p = logits(model, ids)[-len(ids) :].double().log_softmax(-1)
    return log_p[torch.arange(len(prompt) - 1, len(ids) - 1), torch.tensor(response)].sum()


def values(model: nn.Module) -> torch.Tensor:
    """S of every sequence, [n]."""
    with torch.no_grad():
        return torch.stack([log_probability(model, row) for row in range(len(PROMPTS))])


def gradients(model: nn.Module) -> tuple[torch.Tensor, Tree]:
    """S of every sequence, [n], and its gradient, {name: [n, *shape]}; zero where no path leads."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    S, rows = [], []
    for row in range(len(PROMPTS)):
        value = log_probability(model, row)
        S.append(value.detach())
        rows.append(torch.autograd.grad(value, list(named.values()), allow_unused=True))
    columns = zip(named.items(), zip(*rows, strict=True), strict=True)
    J = {name: torch.stack([torch.zeros_like(p) if g is None else g for g in column]) for (name, p), column in columns}
    return torch.stack(S), J


def is_causal(model: nn.Module) -> bool:
    """Tell whether a sequence's last token leaves what is predicted before it alone."""
    ids = [*PROMPTS[0], *RESPONSES[0]]
    with torch.no_grad():
        both = [logits(model, [*ids[:-1], last])[-len(ids) : -1] for last in (ids[-1], ids[-1] - 1)]
    return relative(*both) < 1e-6


def along(model: nn.Module, direction: Tree) -> tuple[Estimate, Estimate]:
    """First and second derivative of every S along a direction, by differences."""
    slopes, bends = [], []
    for h in STEPS:
        moved = {}
        for k in (-2, -1, 1, 2):
            with displaced(model, direction, k * h):
                S, J = gradients(model)
            moved[k] = S, times(J, direction)
        slopes.append(_richardson(lambda k, moved=moved: moved[k][0], h))
        bends.append(_richardson(lambda k, moved=moved: moved[k][1], h))
    return _agreed(slopes), _agreed(bends)


def bend_of_values(model: nn.Module, direction: Tree) -> Estimate:
    """Second derivative of every S along a direction, by differences of values alone."""
    bends = []
    for h in STEPS:
        S = {}
        for k in (-2, -1, 0, 1, 2):
            with displaced(model, direction, k * h):
                S[k] = values(model)
        bends.append((16 * (S[1] + S[-1]) - (S[2] + S[-2]) - 30 * S[0]) / (12 * h * h))
    return _agreed(bends)


@contextmanager
def displaced(model: nn.Module, direction: Tree, step: float) -> Iterator[None]:
    """Move the parameters by step · direction, and put them back."""
    named = dict(model.named_parameters())
    before = {name: named[name].detach().clone() for name in direction}
    with torch.no_grad():
        for name, leaf in direction.items():
            named[name].add_(leaf, alpha=step)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, leaf in before.items():
                named[name].copy_(leaf)


def times(J: Tree, direction: Tree) -> torch.Tensor:
    """Jv, [n]."""
    return torch.stack([(J[name] * v).flatten(1).double().sum(1) for name, v in direction.items()]).sum(0)


def flat(J: Tree) -> torch.Tensor:
    """J as a matrix [n p], in float64."""
    return torch.cat([leaf.double().flatten(1) for leaf in J.values()], 1)


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    """‖x − y‖ / ‖y‖, and the worst over rows where there are several."""
    x, y = x.double(), y.double()
    if y.ndim > 1:
        return max(relative(a, b) for a, b in zip(x, y, strict=True))
    return float((x - y).norm() / y.norm().clamp_min(1e-300))


def _richardson(at: Callable[[int], torch.Tensor], h: float) -> torch.Tensor:
    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)


def _agreed(estimates: list[torch.Tensor]) -> Estimate:
    """Of every sequence's estimates, take the one that both its neighbours are nearest to."""
    stacked = torch.stack(estimates)
    apart = (stacked[1:] - stacked[:-1]).abs()
    nearest, best = torch.maximum(apart[1:], apart[:-1]).min(0)
    value = stacked[1:-1].gather(0, best[None])[0]
    return Estimate(value, float(nearest.norm() / value.norm().clamp_min(1e-300)))
