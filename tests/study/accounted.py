"""A study that is asked for everything that accounts for a step, and what its plan names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fkernel import func
from fkernel.study import FisherKernelResults, FisherKernelRunner

EVERYTHING: dict[str, Any] = {
    "ledger": True,
    "sweep": {"scales": [0.1, 1.0, 10.0]},
    "tokens": {"pairs": [["E-000-00", "U-001-02"]]},
    "parts": True,
    "observables": [
        {"name": "entropy", "kind": "entropy"},
        {"name": "own", "kind": "function", "function": "tests.study.accounted.first_token"},
        {"name": "odds", "kind": "log_odds", "pairs": [["E-000-00", "E-000-01"]]},
        {"name": "reward", "kind": "expected_reward"},
    ],
    "counterfactuals": [
        {"name": "rloo", "advantages": "rloo"},
        {"name": "without", "drop": ["U-000-*"]},
        {"name": "unclipped", "max_norm": "none"},
        {"name": "same", "scale": {"U-000-00": 1.0}},
    ],
    "preconditioners": ["identity", "post-step", "muon"],
    "uncertainty": {"draws": 50},
    "covariates": True,
    "health": True,
    "structure": {"clusters": 3, "alignment": True},
}


def first_token(apply: Any, temperature: float) -> Any:
    """log π of the first token of the response."""
    logprobs = func.token_logprobs(apply, temperature)
    return lambda params, batch: logprobs(params, batch).gather(1, batch.response_mask.int().argmax(1)[:, None])[:, 0]


def differs(prompt: Any, response: str) -> float:
    """A reward that no two responses share."""
    return sum(response.encode()) / 1000


def kl(run: Any) -> dict[str, Any]:
    return {"name": "moved", "kind": "kl", "reference": {"path": str(run.after)}}


def everything(run: Any, out: Path) -> tuple[dict[str, Any], FisherKernelResults]:
    """Eight held-out sequences and U itself: the plan, and what it found; saved to `out`."""
    draw = {"kind": "evaluation", "name": "held_out", "batch_size_prompts": 4, "completions_per_prompt": 2}
    requests = [{**draw, "reward": "tests.study.accounted.differs"}, {"kind": "update", "name": "self"}]
    analyses = {**EVERYTHING, "observables": [*EVERYTHING["observables"], kl(run)]}
    plan = run.plan(out, requests=requests, analyses=analyses)
    results = FisherKernelRunner(plan).run()
    results.save_results(out)
    return plan, results
