"""The main command against its limit: a workspace of a given U, and one request with ledger and realised changes."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.conftest import Sides
from benchmarks.limits import MICROBATCH, plain_backward, plain_forward
from benchmarks.models import Subject
from fkernel import checkpoint, explain_step, func, realised_change
from fkernel.rollout import GeneratedBatch, Sampling
from fkernel.rollout.record import Provenance, SequenceRecord
from fkernel.study import FisherKernelRunner

N_E, N_U, T_E, T_U = 32, 64, 184, 145
COMMAND = ("plain backward over U and E + GEMM + 2 forwards over E", "workspace and one request")
STEP = ("plain backward twice over U, once over E, 2 forwards over E", "explain_step and realised_change")
TARGETS = {COMMAND[1]: 1.6, STEP[1]: 1.4}
"""As multiples of the first side of each group."""
SHAPE = {"hidden_size": 320, "intermediate_size": 960, "num_hidden_layers": 6, "num_attention_heads": 5}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def policy(place: Path, shape: dict[str, int], vocab: int) -> Subject:
    """Save a Qwen3 with the state of an optimizer that has a past; and give it as the limits take it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from tests.rollout.conftest import byte_tokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen3Config(
            **{"num_key_value_heads": shape["num_attention_heads"], **shape},  # pyright: ignore[reportArgumentType]
            head_dim=shape["hidden_size"] // shape["num_attention_heads"],
            vocab_size=vocab,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
        model = Qwen3ForCausalLM(config).float().eval()
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-5)
        for leaf in model.parameters():
            leaf.grad = 0.01 * torch.randn_like(leaf)
        optimizer.step()
    model.save_pretrained(place / "model")
    byte_tokenizer().save_pretrained(place / "model")
    torch.save(optimizer.state_dict(), place / "optimizer.pt")
    apply, params = func.make_functional(model)
    return Subject("command", apply, params, func.sequence_logprob(apply), vocab)


def sequences(n: int, T: int, prefix: str, fingerprint: str, vocab: int) -> GeneratedBatch:
    """Make n sequences of 40 % to 100 % of T tokens, a quarter of each the prompt's; rewards alternate."""
    generator, records = torch.Generator().manual_seed(T), []
    for k, t in enumerate(torch.linspace(0.4 * T, T, n).long().tolist()):
        ids = torch.randint(3, vocab, (t,), generator=generator).tolist()
        prompt, response = tuple(ids[: t // 4]), tuple(ids[t // 4 :])
        each, where = (-1.0,) * len(response), Provenance(f"{prefix}{k // 4}", "train", "random", k // 4, k % 4)
        record = SequenceRecord(
            f"{prefix}-{k // 4:03d}-{k % 4:02d}",
            prompt,
            response,
            "p",
            "r",
            each,
            each,
            (1.0,) * len(each),
            "eos",
            where,
        )
        records.append(replace(record, reward=float(k % 2), advantage=float(k % 2) - 0.5, weight=1.0 / n))
    return GeneratedBatch(tuple(records), fingerprint, Sampling(temperature=1.0))


def by_length(batch: func.Sequences) -> list[func.Sequences]:
    """Cut a batch as a loop with buckets does: longest first, each microbatch at its own width."""
    counts = batch.attention_mask.sum(1)
    order = counts.argsort(descending=True)
    ordered = func.Sequences(*(leaf[order] for leaf in batch))
    widths = counts[order][::MICROBATCH].tolist()
    parts = zip(*(leaf.split(MICROBATCH) for leaf in ordered), strict=True)
    return [func.Sequences(*(leaf[:, :t] for leaf in part)) for part, t in zip(parts, widths, strict=True)]


def command_sides(place: Path, quick: bool) -> Sides:
    """Prepare a workspace of U that is handed in, and ask for the ledger of E."""
    vocab = 512 if quick else 8192
    subject = policy(place, TINY if quick else SHAPE, vocab)
    fingerprint = checkpoint.load(place).provenance.fingerprint
    n_E, n_U = (4, 8) if quick else (N_E, N_U)
    E, U = (sequences(n, T, name, fingerprint, vocab) for n, T, name in ((n_E, T_E, "E"), (n_U, T_U, "U")))
    plan = {
        "checkpoint": {"path": str(place)},
        "update": {"kind": "payload", "batch": U},
        "requests": [{"kind": "payload", "name": "held_out", "batch": E}],
        "analyses": {"ledger": True},
        "step": {"max_norm": 1.0},
        "out": str(place / "out"),
    }
    loaded = FisherKernelRunner(plan).checkpoint
    X, Y = torch.randn(n_E, subject.size), torch.randn(n_U, subject.size)

    def limit() -> Any:
        parts_U, parts_E = by_length(U.sequences), by_length(E.sequences)
        for part in (*parts_U, *parts_E):
            plain_backward(subject, part)
        return X @ Y.T, [plain_forward(subject, part) for part in parts_E for _ in range(2)]

    def ours() -> Any:
        shutil.rmtree(place / "out", ignore_errors=True)
        runner = FisherKernelRunner(plan)
        runner.__dict__["checkpoint"] = loaded  # it is loaded by both sides, and by neither in the time
        with runner.prepare_update_workspace() as workspace:
            return runner.evaluate_batch(runner.plan.requests[0], workspace)

    return {COMMAND[0]: limit, COMMAND[1]: ours}


def step_sides(subject: Subject, n_E: int = 32, n_U: int = 32, T: int = 128) -> Sides:
    """Explain a step on U for E, and measure what it does."""
    E, U, weights, state = (
        subject.batch(n_E, T, 1),
        subject.batch(n_U, T, 2),
        torch.ones(n_U) / n_U,
        subject.adamw_state(),
    )

    def ours() -> Any:
        _, step = explain_step(subject.f, subject.params, E, U, weights, state)
        after = {name: leaf + step.total[name] for name, leaf in subject.params.items()}
        return realised_change(subject.f, subject.params, after, E)

    def limit() -> Any:
        for batch in (U, U, E):
            plain_backward(subject, batch)
        return [plain_forward(subject, E) for _ in range(2)]

    return {STEP[0]: limit, STEP[1]: ours}


@pytest.fixture(scope="module")
def place() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.parametrize("side", COMMAND)
def test_command(race, place, request, side):
    sides = partial(command_sides, place, bool(request.config.getoption("--quick")))
    race(side, f"main command, {N_U} U × {N_E} E", sides, TARGETS.get(side), n_E=N_E, n_U=N_U, T=f"to {T_E}")


@pytest.mark.parametrize("side", STEP)
def test_step(race, subject, side):
    sizes = {"n_E": 32, "n_U": 32, "T": 128, "P": subject.size}
    race(side, "explain_step, 32 × 32", lambda: step_sides(subject), TARGETS.get(side), **sizes)
