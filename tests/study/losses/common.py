"""Losses as papers write them, and a run whose batch is used twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from fkernel import checkpoint, func
from fkernel.rollout import load_batch
from fkernel.study import (
    FisherKernelRunner,
)
from tests.study.conftest import MAX_NORM, Run, saved

LOW, HIGH, BETA = 0.1, 0.15, 0.3
FAR, NEAR = 1e-3, 1e-4
"""Learning rates: of the step that takes the policy away from U's, and of the one that is explained."""


def by_bytes(prompt: Any, response: str) -> float:
    """A reward that no two responses share."""
    return sum(response.encode()) / 1000


class Second(NamedTuple):
    """A run whose batch is used twice.

    Attributes:
        first: its first step's files; U was sampled at `first.before`.
        one: after a step on U that was far too long.
        pairs: two responses to each of some prompts, sampled at `first.before`.
        place: where steps from `one` are kept.
    """

    first: Run
    one: Path
    pairs: Path
    place: Path

    def step(self, name: str, loss: Callable[[Any], torch.Tensor], start: Path | None = None) -> Path:
        """Take the step from `one`, or another start, by torch, on a loss of the model; once a name."""
        if not (self.place / name).exists():
            model, optimizer, tokenizer = restored(start or self.one)
            taken(model, optimizer, loss, NEAR)
            saved(self.place / name, model, tokenizer)
        return self.place / name

    def plan(self, out: Path, after: Path | None, loss: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
        step = {"max_norm": MAX_NORM, "after": None if after is None else {"path": str(after)}, "loss": loss}
        requests = [
            {"kind": "evaluation", "name": "held_out", "batch_size_prompts": 4},
            {"kind": "update", "name": "self"},
        ]
        given = {"checkpoint": {"path": str(self.one)}, "step": step, "requests": requests}
        return self.first.plan(out, **{**given, **changes})

    @property
    def reference(self) -> dict[str, Any]:
        """The policy that sampled; also what penalties and preferences refer to."""
        return {"path": str(self.first.before)}

    def foreign(self) -> dict[str, Any]:
        """U as if `one` had sampled it: what a plan without a loss would have to be given."""
        fingerprint = checkpoint.load(self.one).provenance.fingerprint
        return {"kind": "payload", "batch": replace(self.first.batch, checkpoint=fingerprint)}


def restored(place: Path) -> tuple[Any, torch.optim.AdamW, Any]:
    loaded = checkpoint.load(place)
    optimizer = torch.optim.AdamW(loaded.model.named_parameters(), weight_decay=0.1)
    optimizer.load_state_dict(torch.load(place / "optimizer.pt", weights_only=True))
    return loaded.model, optimizer, loaded.tokenizer


def taken(model: Any, optimizer: torch.optim.AdamW, loss: Callable[[Any], torch.Tensor], lr: float) -> None:
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    loss(model).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()


def token_logp(model: Any, U: func.Sequences) -> torch.Tensor:
    """[n t−1], of the tokens that follow."""
    return model(U.input_ids).logits[:, :-1].log_softmax(-1).gather(-1, U.input_ids[:, 1:, None])[..., 0]


def surrogate(second: Second, sequences: bool = False, beta: float = 0.0, corrected: bool = True) -> Callable[..., Any]:
    """−Σ w Σ_t min(r A, clip(r) A) + β Σ w Σ_t k3 (times r), of U, with its own old log-probabilities."""
    batch, U = second.first.batch, second.first.batch.sequences
    mask, A = U.response_mask[:, 1:].bool(), batch.advantages[:, None]
    w = torch.tensor([record.weight for record in batch])[:, None]
    with torch.no_grad():
        old = token_logp(checkpoint.load(second.first.before).model, U)

    def loss(model: Any, only: Any = slice(None)) -> torch.Tensor:
        now = token_logp(model, U)
        log_r = torch.where(mask, now - old, 0.0)
        r = (log_r.sum(1, keepdim=True) / mask.sum(1, keepdim=True) if sequences else log_r).exp()
        each = -torch.min(r * A, r.clamp(1 - LOW, 1 + HIGH) * A)
        if beta:
            d = torch.where(mask, old - now, 0.0)  # the reference is the old policy
            k3 = d.exp() - d - 1
            each = each + beta * k3 * (log_r.exp() if corrected else 1)
        return (w * torch.where(mask, each, 0.0))[only].sum()

    return loss


def preferred(second: Second, beta: float) -> Callable[[Any], Any]:
    """−mean log σ(m), of pairs whose higher reward was chosen."""
    batch = load_batch(second.pairs)
    rewards = batch.rewards.view(-1, 2)
    chosen = torch.arange(0, len(batch), 2) + rewards.argmax(1)
    rejected = torch.arange(0, len(batch), 2) + rewards.argmin(1)
    U, mask = batch.sequences, batch.sequences.response_mask[:, 1:]
    with torch.no_grad():
        base = (token_logp(checkpoint.load(second.first.before).model, U) * mask).sum(1)

    def loss(model: Any) -> torch.Tensor:
        s = (token_logp(model, U) * mask).sum(1) - base
        return -logsigmoid(beta * (s[chosen] - s[rejected])).mean()

    return loss


def executed(plan: dict[str, Any]) -> Any:
    return FisherKernelRunner(plan).run()


def error(result: Any) -> float:
    """Relative error of the prediction."""
    assert result.realised is not None
    return float(np.linalg.norm(result.predicted - result.realised) / np.linalg.norm(result.realised))


def at_start(plan: dict[str, Any]) -> dict[str, Any]:
    """The same plan with all gradients at the checkpoint: the first order."""
    return {**plan, "step": {**plan["step"], "path": "start"}}


RATIO = {"kind": "clipped_ratio", "low": LOW, "high": HIGH}
STRENGTH = 2.0
"""β of the preferences."""
QUIET: dict[str, Any] = {"self_kernel": False, "storage": {"persist": False, "pictures": False}}


def kl(second: Second, corrected: bool = True) -> dict[str, Any]:
    return {"beta": BETA, "reference": second.reference, "corrected": corrected}


def preference(second: Second) -> dict[str, Any]:
    return {"kind": "preference", "beta": STRENGTH, "reference": second.reference}


CASES: dict[str, tuple[Callable[[Second], Any], Callable[[Second], dict[str, Any]]]] = {
    "ratio": (surrogate, lambda s: RATIO),
    "old": (surrogate, lambda s: {**RATIO, "old": s.reference}),
    "sequences": (lambda s: surrogate(s, True), lambda s: {**RATIO, "kind": "sequence_ratio"}),
    "kl": (lambda s: surrogate(s, beta=BETA), lambda s: {**RATIO, "kl": kl(s)}),
    "plain kl": (lambda s: surrogate(s, beta=BETA, corrected=False), lambda s: {**RATIO, "kl": kl(s, False)}),
}
