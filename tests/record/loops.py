"""Training loops of our own, with a recorder: a tiny GPT-2, two micro-batches a step, clipping."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fkernel.record import Recorder
from fkernel.shapes import Tensor, Tree

PASSES = [
    ([[2, 3, 4, 3, 4, 1], [5, 6, 9, 5, 1, 0]], [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]], [1.0, -0.5]),
    ([[0, 7, 8, 6, 7], [2, 2, 9, 11, 12], [0, 3, 3, 4, 1]], [[0, 0, 0, 1, 1]] * 3, [0.7, -1.0, 0.3]),
]
"""Micro-batches (tokens, response mask, advantages): one padded on its right, one on its left, as 0s tell."""
MAX_NORM, β = 0.3, 0.05


class Given(NamedTuple):
    """One micro-batch as the loop saw it: its inputs, and what autograd says of log π and H."""

    ids: Tensor
    attention: Tensor
    response: Tensor
    ω: Tensor
    η: Tensor


def gpt2(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 15, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    shape |= {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=1)).train()


def adamw(model: Any, lr: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)


def statistics(model: Any, ids: Tensor, attention: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log π and H of tokens 1 … t − 1."""
    z = model(ids, attention_mask=attention).logits[:, :-1] / temperature
    log_p = z.log_softmax(-1)
    return log_p.gather(-1, ids[:, 1:, None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def loss_of(log_p: Tensor, entropy: Tensor, response: Tensor, advantages: Tensor) -> Tensor:
    """A loss that is linear in neither: a ratio, and an entropy bonus."""
    mask = response[:, 1:]
    ratio = (log_p - 0.9 * log_p.detach()).exp()
    return (-(ratio * advantages[:, None]) * mask).sum() / mask.sum() - β * (entropy * mask).sum() / mask.sum()


def tensors(i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, attention mask, response mask and advantages of a micro-batch."""
    ids, response = torch.tensor(PASSES[i][0]), torch.tensor(PASSES[i][1])
    return ids, (ids != 0).long(), response, torch.tensor(PASSES[i][2])


def backward(recorder: Recorder, model: Any, scale: float = 1.0, **others: Any) -> list[Given]:
    """Both micro-batches' passes; returns what each was given and what autograd says of it."""
    given = []
    for i in range(len(PASSES)):
        ids, attention, response, advantages = tensors(i)
        log_p, entropy = statistics(model, ids, attention)
        both = recorder.tap(
            log_p,
            input_ids=ids,
            attention_mask=attention,
            response_mask=response,
            entropy=entropy,
            advantage=advantages,
            **others,
        )
        loss = loss_of(both[0], both[1], response, advantages) / len(PASSES)
        apart = [leaf.detach().requires_grad_() for leaf in both]
        ω, η = torch.autograd.grad(loss_of(apart[0], apart[1], response, advantages) / len(PASSES), apart)
        given.append(Given(ids, attention, response, ω, η))
        (loss * scale).backward()
    return given


def take(recorder: Recorder, model: Any, optimizer: Any, between: Callable[[], Any] = lambda: None) -> None:
    """One recorded step; `between` is called between its backward passes and the optimizer's step."""
    with recorder.step():
        backward(recorder, model)
        between()
        optimizer.step()
    optimizer.zero_grad()


def train(directory: Path, steps: range, model: Any, optimizer: Any, **options: Any) -> list[tuple[list[Given], Tree]]:
    """Take steps, each recorded; returns what each step was given, and its gradient before clipping."""
    taken = []
    with Recorder(directory, model, optimizer, **options) as recorder:
        for number in steps:
            with recorder.step(number, seed=7) as step:
                given = backward(recorder, model)
                g = {name: leaf.grad.clone() for name, leaf in model.named_parameters()}
                torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
                step.note(epoch=0.5)
            optimizer.zero_grad()
            taken.append((given, g))
    return taken
