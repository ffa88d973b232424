"""Token weights of dumped batches against autograd of the losses as the trainers' sources write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fkernel.errors import PlanError, RolloutError
from fkernel.func import pad
from fkernel.rollout import GeneratedBatch, SampleGenerator, Sampling, score
from fkernel.study.config.dump import TrainerDump
from tests.checkpoint.writers import TOKENIZER
from tests.record import dumped
from tests.record.dumped import TOKENS, Row
from tests.study.trl_run import policy as made_policy

CLIPPED: dict[str, Any] = {"loss": {"kind": "clipped_ratio"}, "weights": "dapo"}


@pytest.fixture(scope="module")
def policy() -> SampleGenerator:
    return SampleGenerator(made_policy().eval(), TOKENIZER, sampling=Sampling(), template="bare")


def masked_rows(policy: SampleGenerator, n: int = 8) -> list[Row]:
    """Rows with masks, advantages of tokens, and log-probabilities of the policy itself and of an engine near it."""
    rows = dumped.some_rows(n, seed=3)
    known = score(policy.model, pad([r.prompt for r in rows], [r.response for r in rows]), Sampling())
    g = torch.Generator().manual_seed(1)
    made = []
    for row, one in zip(rows, known, strict=True):
        noise = (0.1 * torch.randn(len(row.response), generator=g)).tolist()
        noise[0] -= 0.8 * (row.group == 0)  # far enough to be truncated
        sampler = [a + b for a, b in zip(one.logprobs, noise, strict=True)]
        made.append(row._replace(trainer=[*one.logprobs], sampler=sampler))
    return made


def nemo_loss(rows: list[Row], ℓ: list[torch.Tensor], token_level: bool) -> torch.Tensor:
    """ClippedPGLossFn with token-level truncated importance sampling at 2."""
    masks = [torch.tensor(row.mask, dtype=torch.float64) for row in rows]
    whole, n = sum(float(mask.sum()) for mask in masks), len(rows)
    total = torch.zeros((), dtype=torch.float64)
    for row, curr, mask in zip(rows, ℓ, masks, strict=True):
        A, prev, gen = (
            torch.tensor(values, dtype=torch.float64) for values in (row.advantages, row.trainer, row.sampler)
        )
        ratios = (curr - prev).exp()
        loss = torch.max(-A * ratios, -A * ratios.clamp(0.8, 1.28)) * (prev - gen).exp().clamp(max=2.0)
        total = total + ((loss * mask).sum() / whole if token_level else (loss * mask).sum() / mask.sum() / n)
    return total


def slime_loss(rows: list[Row], ℓ: list[torch.Tensor]) -> torch.Tensor:
    """policy_loss_function with sum_of_sample_mean, divided by the step's samples."""
    total = torch.zeros((), dtype=torch.float64)
    for row, log_probs in zip(rows, ℓ, strict=True):
        A, old, mask = (torch.tensor(values, dtype=torch.float64) for values in (row.advantages, row.trainer, row.mask))
        ratio = (-(old - log_probs)).exp()
        loss = torch.maximum(-ratio * A, -ratio.clamp(0.8, 1.2) * A)
        total = total + (loss * mask).sum() / mask.sum().clamp(min=1)
    return total / len(rows)


def prime_loss(rows: list[Row], ℓ: list[torch.Tensor]) -> torch.Tensor:
    """default_loss_fn, divided by rl_scale."""
    total, scale = torch.zeros((), dtype=torch.float64), sum(sum(row.mask) for row in rows)
    for row, trainer in zip(rows, ℓ, strict=True):
        A, inference = (torch.tensor(values, dtype=torch.float64) for values in (row.advantages, row.sampler))
        mask = torch.tensor(row.mask).bool()
        log_ratio = trainer - inference
        moved = (trainer.exp() - inference.exp()).detach()
        invalid = torch.where(A > 0, moved > 0.01, moved < -0.005)
        loss = -(mask & ~invalid).double() * (2.0 * A) * log_ratio.exp() + 0.01 * mask * log_ratio**2
        total = total + loss.sum()
    return total / scale


def open_instruct_loss(rows: list[Row], ℓ: list[torch.Tensor]) -> torch.Tensor:
    """compute_grpo_loss of the first epoch, with ρ clamped to 2 and a constant denominator."""
    total = torch.zeros((), dtype=torch.float64)
    for row, new in zip(rows, ℓ, strict=True):
        old, vllm = new.detach(), torch.tensor(row.sampler, dtype=torch.float64)
        rho = (old - vllm).clamp(-10, 10).exp().clamp(0.0, 2.0)
        ratio = (new - old).exp()
        A = torch.full_like(new, row.advantages[0])
        total = total + (torch.max(-A * ratio, -A * ratio.clamp(0.8, 1.272)) * rho).sum() / 100.0
    return total


TRUNCATED = {"correction": {"mode": "truncate", "level": "token", "high": 2.0}}
LOSSES: dict[str, tuple[str, Callable[..., torch.Tensor], dict[str, Any]]] = {
    "NeMo-RL, tokens": (
        "nemo_rl",
        lambda rows, ℓ: nemo_loss(rows, ℓ, token_level=True),
        {"loss": {"kind": "clipped_ratio", "high": 0.28, **TRUNCATED}, "weights": "dapo", "batch_size": 8},
    ),
    "NeMo-RL, sequences": (
        "nemo_rl",
        lambda rows, ℓ: nemo_loss(rows, ℓ, token_level=False),
        {"loss": {"kind": "clipped_ratio", "high": 0.28, **TRUNCATED}, "weights": "grpo", "batch_size": 8},
    ),
    "slime": ("slime", slime_loss, {"loss": {"kind": "clipped_ratio"}, "weights": "grpo"}),
    "prime-rl": (
        "prime_rl",
        prime_loss,
        {"loss": {"kind": "dppo", "low": 0.005, "high": 0.01, "adv_tau": 2.0, "kl_tau": 0.01}},
    ),
    "open-instruct": (
        "open_instruct",
        open_instruct_loss,
        {"loss": {"kind": "policy_gradient", **TRUNCATED}, "weights": 0.01, "batch_size": 8},
    ),
}


@pytest.mark.parametrize("case", LOSSES)
def test_token_weights_are_autograds_of_the_trainers_loss(policy, tmp_path, case):
    name, loss, settings = LOSSES[case]
    rows = masked_rows(policy)
    path = TOKENS[name](tmp_path, 7, rows)
    update = TrainerDump.model_validate(
        {"kind": "trainer_dump", "path": str(path), "step": 7, "trainer": name, **settings}
    )
    batch = update.generate(policy)
    leaves = [torch.tensor(row.trainer, dtype=torch.float64, requires_grad=True) for row in rows]
    expected = torch.autograd.grad(loss(rows, leaves), leaves)
    meant = {(*row.prompt, *row.response): ω for row, ω in zip(rows, expected, strict=True)}
    largest = max(float(ω.abs().max()) for ω in expected)
    for record in batch:
        ours = torch.tensor([*record.token_weights.values()], dtype=torch.float64).sum(0)
        theirs = meant[(*record.prompt_ids, *record.response_ids)]
        assert float((ours - theirs).abs().max()) < 1e-5 * largest
    assert {*batch.token_weights} == ({"advantage", "kl"} if name == "prime_rl" else {"advantage"})
    assert all("per_token" not in record.metadata for record in batch)
    assert all(len(record.logprobs) == len(record.entropies) == len(record.response_ids) for record in batch)


def test_rows_that_the_loss_left_out_count_where_they_count(policy, tmp_path):
    """NeMo-RL divides by the rows that are left, TRL and slime by all."""
    rows = masked_rows(policy)
    rows[2] = rows[2]._replace(mask=[0] * len(rows[2].response))
    path = dumped.slime(tmp_path / "slime", 7, rows)
    common = {"kind": "trainer_dump", "step": 7, "loss": {"kind": "clipped_ratio"}, "weights": "grpo"}
    slime = TrainerDump.model_validate({**common, "path": str(path), "trainer": "slime"}).generate(policy)
    meant = torch.autograd.grad(
        slime_loss(
            rows, leaves := [torch.tensor(row.trainer, dtype=torch.float64, requires_grad=True) for row in rows]
        ),
        leaves,
    )
    assert len(slime) == 7
    assert slime.records[-1].token_weights["advantage"] == pytest.approx(meant[-1].tolist(), rel=1e-5)
    path = dumped.nemo_rl(tmp_path / "nemo", 7, masked_rows(policy), left_out=(2,))
    nemo = TrainerDump.model_validate({**common, "path": str(path), "trainer": "nemo_rl"}).generate(policy)
    assert len(nemo) == 7
    share = np.array(nemo.records[-1].token_weights["advantage"]) / np.array(
        slime.records[-1].token_weights["advantage"]
    )
    kept = [m == 1 for m in rows[-1].mask]
    assert share[kept] == pytest.approx(8 / 7, rel=1e-5)


def test_another_policys_log_probabilities_are_refused(policy, tmp_path):
    """Where all are off, and where one row is."""
    rows = masked_rows(policy, 16)
    settings = {"kind": "trainer_dump", "step": 7, "trainer": "nemo_rl", **CLIPPED, "batch_size": 16}

    def made(place: str, rows: list[Row]) -> GeneratedBatch:
        path = dumped.nemo_rl(tmp_path / place, 7, rows)
        return TrainerDump.model_validate({**settings, "path": str(path)}).generate(policy)

    assert len(made("right", rows)) == 16
    off = [row._replace(trainer=[value - 0.8 for value in row.trainer]) for row in rows]
    with pytest.raises(
        RolloutError, match=r"nats a token from the checkpoint's .* Is it the checkpoint before this step"
    ):
        made("off", off)
    one = [rows[0]._replace(trainer=[value - 0.8 for value in rows[0].trainer]), *rows[1:]]
    with pytest.raises(RolloutError, match=r"U-000-00 \(.*line 1\): its log-probabilities in the file are 0.8"):
        made("one", one)


def test_the_ratio_to_the_sampling_engine(policy, tmp_path):
    """update.old: sampler, as with use_rollout_logprobs: r is not 1, and clipped where it is far."""
    rows = masked_rows(policy)
    path = dumped.slime(tmp_path, 7, rows)
    update = {"kind": "trainer_dump", "path": str(path), "step": 7, "trainer": "slime", "old": "sampler"}
    batch = TrainerDump.model_validate({**update, **CLIPPED}).generate(policy)
    changed = [row._replace(trainer=row.sampler) for row in rows]
    leaves = [torch.tensor(row.trainer, dtype=torch.float64, requires_grad=True) for row in rows]
    total, tokens = torch.zeros((), dtype=torch.float64), sum(sum(row.mask) for row in rows)
    for row, ℓ in zip(changed, leaves, strict=True):
        A, old, mask = (torch.tensor(values, dtype=torch.float64) for values in (row.advantages, row.trainer, row.mask))
        r = (ℓ - old).exp()
        total = total + (torch.maximum(-r * A, -r.clamp(0.8, 1.2) * A) * mask).sum() / tokens
    for record, meant in zip(batch, torch.autograd.grad(total, leaves), strict=True):
        assert record.token_weights["advantage"] == pytest.approx(meant.tolist(), rel=1e-5, abs=1e-9)


def test_a_step_on_a_rollout_of_several_needs_the_policy_of_its_ratio(policy, tmp_path):
    path = dumped.slime(tmp_path, 7, masked_rows(policy), steps=2)
    update = {"kind": "trainer_dump", "path": str(path), "step": 7, "trainer": "slime", **CLIPPED}
    assert len(TrainerDump.model_validate({**update, "minibatch": 0}).generate(policy)) == 4
    with pytest.raises(PlanError, match=r"give update.loss.old"):
        TrainerDump.model_validate({**update, "minibatch": 1}).generate(policy)
