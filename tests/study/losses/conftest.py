"""What the tests of this folder share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fkernel.rollout import save_batch
from fkernel.study import (
    FisherKernelRunner,
)
from tests.study.conftest import made, saved
from tests.study.losses.common import (
    BETA,
    FAR,
    NEAR,
    RATIO,
    Second,
    by_bytes,
    executed,
    kl,
    restored,
    surrogate,
    taken,
    token_logp,
)


@pytest.fixture(scope="package")
def second(tmp_path_factory: pytest.TempPathFactory) -> Second:
    place = tmp_path_factory.mktemp("second")
    first = made(place / "first")
    model, optimizer, tokenizer = restored(first.before)
    U = first.batch.sequences
    mask, weights = U.response_mask[:, 1:], first.batch.weighted_advantages
    taken(model, optimizer, lambda m: -(weights * (token_logp(m, U) * mask).sum(1)).sum(), FAR)
    optimizer.param_groups[0]["lr"] = NEAR
    saved(place / "one", model, tokenizer)
    torch.save(optimizer.state_dict(), place / "one" / "optimizer.pt")
    generator = FisherKernelRunner(first.plan(place / "out")).generator
    pairs = generator.generate_update_batch(4, 2, seed=7, reward_cfg=by_bytes, advantage_cfg=None, weight_cfg=None)
    save_batch(pairs, place / "pairs")
    return Second(first, place / "one", place / "pairs", place)


@pytest.fixture(scope="package")
def study(second: Second, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any]:
    """The step on the clipped surrogate with a penalty, explained with every analysis, and kept."""
    spec = {
        "ledger": True,
        "tokens": {"pairs": [["E-000-00", "U-001-01"]]},
        "parts": True,
        "observables": [{"name": "entropy", "kind": "entropy"}],
        "counterfactuals": [
            {"name": "same", "scale": {"U-000-00": 1.0}},
            {"name": "without", "drop": ["U-000-*"]},
            {"name": "half", "scale": {"*": 0.5}, "max_norm": "none"},
        ],
        "preconditioners": ["identity", "post-step"],
        "uncertainty": {"draws": 50},
        "health": True,
        "structure": {"clusters": 3, "alignment": True},
    }
    after = second.step("kl", surrogate(second, beta=BETA))
    loss = {**RATIO, "kl": kl(second)}
    plan = second.plan(tmp_path_factory.mktemp("losses") / "out", after, loss, analyses=spec)
    results = executed(plan)
    results.save_results(plan["out"])
    return plan, results
