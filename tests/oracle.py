"""What everything is, by plain autograd and plain loops. Imports nothing from the library.

A sequence is (prompt, response), two lists of token ids, and the model sees it alone and unpadded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

Pair = tuple[list[int], list[int]]


def log_distributions(model: nn.Module, pair: Pair, temperature: float) -> Tensor:
    """[len(response), v]: log of the distribution that each response token was drawn from."""
    prompt, response = pair
    ids = torch.tensor([[*prompt, *response]])
    output = model(ids, attention_mask=torch.ones_like(ids))
    logits = getattr(output, "logits", output)[0]
    return torch.stack(
        [torch.log_softmax(logits[len(prompt) + i - 1] / temperature, dim=0) for i in range(len(response))]
    )


def logprob(model: nn.Module, pair: Pair, temperature: float = 1.0) -> Tensor:
    """S(x) = Σ_t log π(x_t | x_<t), a scalar with its graph."""
    log_p = log_distributions(model, pair, temperature)
    return torch.stack([log_p[i, token] for i, token in enumerate(pair[1])]).sum()


def entropies(model: nn.Module, pair: Pair, temperature: float = 1.0) -> Tensor:
    """[len(response)]: entropy of each of the distributions."""
    log_p = log_distributions(model, pair, temperature)
    return -(log_p.exp() * log_p).sum(1)


def gradient(model: nn.Module, pair: Pair, temperature: float = 1.0) -> dict[str, Tensor]:
    """∇S(x) by one backward pass."""
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(logprob(model, pair, temperature), list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), grads, strict=True)}


def inner(x: dict[str, Tensor], y: dict[str, Tensor]) -> float:
    """⟨x, y⟩ by a loop over names."""
    return float(sum((x[name] * y[name]).sum() for name in x))


def kernel(rows: list[dict[str, Tensor]], columns: list[dict[str, Tensor]], P: dict[str, Tensor]) -> Tensor:
    """K[e, u] = Σ_α g_e,α P_α g_u,α by a double loop."""
    return torch.tensor([[inner(e, {k: P[k] * u[k] for k in u}) for u in columns] for e in rows], dtype=torch.float64)


def moved(model: nn.Module, direction: dict[str, Tensor], amount: float) -> nn.Module:
    """A copy of the model at θ + amount · direction."""
    import copy

    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.add_(direction[name], alpha=amount)
    return other


def logprobs(model: nn.Module, pairs: list[Pair], temperature: float = 1.0) -> Tensor:
    """[n] log-probabilities, without a graph."""
    with torch.no_grad():
        return torch.stack([logprob(model, pair, temperature) for pair in pairs])
