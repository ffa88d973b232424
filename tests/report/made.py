"""Results made without a model: an account and a study of any size, with texts that try to be markup."""

from __future__ import annotations

from typing import Any

import numpy as np

from fkernel.study import AccountResults, AnalysisResult, FisherKernelResults, RequestResult, SequenceInfo

HOSTILE = (
    "</script><script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "<!--<script> & 'quotes' \"double\" \u2028 \u202e reversed",
    "line one\nline two\ttabbed",
    "<a href='http://example.invalid/'>click</a> %{x} ${y}",
    "   ",
)


def made_account(probes: int = 4, steps: int = 6, each: int = 8, texts: tuple[str, ...] = HOSTILE) -> AccountResults:
    """An account that adds up: `steps` steps of `each` sequences, with rewards, parts and p-values."""
    random, N = np.random.default_rng(0), steps * each
    own = random.normal(0, 0.3, (probes, steps, each)).astype(np.float32)
    own[:, :, -1] = 0.0
    C = own.reshape(probes, N)
    first, momentum = 0.4 * own.sum(2), 0.6 * own.sum(2)
    before = random.normal(0, 0.01, probes).astype(np.float32)
    remainder = random.normal(0, 1e-5, probes).astype(np.float32)
    nothing = np.zeros(probes, dtype=np.float32)
    realised = C.sum(1) + before + remainder
    arrays = {
        "contributions": C, "realised": realised, "before": before, "decay": nothing, "arithmetic": nothing,
        "unexplained": nothing, "remainder": remainder, "floor": np.full(probes, 1e-5, np.float32),
        "by_step": first + momentum, "own": first, "momentum": momentum,
        "p": random.uniform(0.001, 1, (probes, N)).astype(np.float32),
        "rewards": np.stack([0.7 * own.sum(2), 0.3 * own.sum(2)], 2),
    }  # fmt: skip
    return AccountResults(
        about={"recording": "run/recording", "path": "midpoint", "observable": "logprob", "dtype": "float32",
               "environment": {"python": "3", "versions": {}}, "request": {"steps": [0, steps]}},
        probes=tuple(_info(f"probe-{e}", e, texts) for e in range(probes)),
        sequences=tuple(_of_run(t, u, texts) for t in range(steps) for u in range(each)),
        steps=tuple({"step": t, "sequences": each, "lr": 1e-5, "loss": 0.5, "grad_norm": 1.0 + t % 3, "clip": 1.0}
                    for t in range(steps)),
        arrays=arrays,
        facts={"reward_functions": ["right", "short"]},
    )  # fmt: skip


def made_study(probes: int = 5, sequences: int = 12, texts: tuple[str, ...] = HOSTILE) -> FisherKernelResults:
    """A study of one request that kept its kernel, with a ledger, tokens and a pair of them, and p-values."""
    random = np.random.default_rng(1)
    C = random.normal(0, 1e-2, (probes, sequences)).astype(np.float32)
    batch, momentum = C.sum(1), random.normal(0, 1e-2, probes).astype(np.float32)
    remainder = random.normal(0, 1e-7, probes)
    realised = (batch + momentum + remainder).astype(np.float32)
    top = np.argsort(-np.abs(C), 1)[:, :4]
    update = tuple(_info(f"U-{u:03d}", u, texts, reward=float(u % 2), advantage=u % 2 - 0.5) for u in range(sequences))
    rows = tuple(_info(f"E-{e:03d}", e, texts, reward=float(e % 2)) for e in range(probes))
    ledger = {"batch": batch, "momentum": momentum, "remainder": remainder, "realised": realised,
              "floor": np.full(probes, 1e-6)}  # fmt: skip
    prompts = [*dict.fromkeys(info.prompt_id for info in update)]
    tokens = {
        "logprob": random.normal(0, 1e-2, (probes, 5)).astype(np.float32), "entropy": np.zeros((probes, 5), np.float32),
        "response": np.array([[False, False, True, True, True]] * probes), "pair_0": random.normal(0, 1e-3, (3, 2)),
    }  # fmt: skip
    sequence_p = random.uniform(size=C.shape).astype(np.float32)
    uncertainty = {
        "p": random.uniform(size=probes), "low": batch - 0.01, "high": batch + 0.01,
        "top_p": np.take_along_axis(sequence_p, top, 1), "sequence_p": sequence_p,
        "prompt_p": random.uniform(size=(probes, len(prompts))),
        "prompt_contributions": random.normal(size=(probes, len(prompts))),
    }  # fmt: skip
    pairs = [{"row": rows[0].id, "column": update[1].id, "array": "pair_0", "column_tokens": ["<b>", "\n"]}]
    analyses = {
        "ledger": AnalysisResult(ledger, {"clip": 0.5, "path": "midpoint", "error": 1e-5, "floor": 2e-5}),
        "tokens": AnalysisResult(tokens, {"tokens": [["<i>", "a", "</i>"]] * probes, "pairs": pairs}),
        "uncertainty": AnalysisResult(
            uncertainty, {"coverage": 0.9, "prompts": prompts, "informative": [True], "least": [0.2, 0.4]}
        ),
        "sweep": AnalysisResult({}, {"left_out": "there is no <step>"}),
    }
    diagonal = np.full(probes, 2.0), np.full(sequences, 8.0)
    request = RequestResult(
        "held_out", "evaluation", rows, update, batch=batch, momentum=momentum, decay=np.zeros(probes, np.float32),
        realised=realised, squared_norms=diagonal[0], diagonal=diagonal[0], update_diagonal=diagonal[1], top=top,
        top_contributions=np.take_along_axis(C, top, 1), kernel=C / 0.01, contributions=C, analyses=analyses,
        facts={"path": "midpoint", "realised_on": "step.after", "correct": 1.0},
    )  # fmt: skip
    step: dict[str, Any] = {
        "clip": 0.5,
        "grad_norm": 2.0,
        "step": 4,
        "lr": [1e-5],
        "optimizer": "AdamW",
        "audit": {"fine": True, "verdict": "the step is the one described", "findings": []},
    }
    plan = {"checkpoint": {"path": texts[0]}, "preconditioner": {"calibrated": True}}
    return FisherKernelResults(plan, {"versions": {}}, update, step, None, {"held_out": request})


def _info(name: str, i: int, texts: tuple[str, ...], **more: Any) -> SequenceInfo:
    prompt = texts[i // 2 % len(texts)]
    return SequenceInfo(name, prompt, texts[(i // 3 + 1) % len(texts)], -2.5, prompt_id=f"prompt-{i // 2}", **more)


def _of_run(step: int, u: int, texts: tuple[str, ...]) -> dict[str, Any]:
    reward, prompt = float(u % 2), step * 7 + u // 4
    return {
        "id": f"{step:04d}/U-{u:03d}", "step": step, "prompt": texts[prompt % len(texts)],
        "response": texts[(step + u // 2) % len(texts)], "prompt_id": f"prompt-{prompt % 97}", "tokens": 3,
        "reward": reward,
        "rewards": {"right": reward, "short": 0.0}, "advantage": 2 * reward - 1, "metadata": {},
    }  # fmt: skip
