"""A study of long sequences, computed layer by layer: the numbers that whole passes find."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fkernel import checkpoint
from fkernel.rollout import GeneratedBatch, Sampling
from fkernel.rollout.record import Provenance, SequenceRecord
from fkernel.study import FisherKernelRunner
from tests.rollout.conftest import byte_tokenizer, policy

T = 1100


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a context of 2048 tokens and an optimizer with a past."""
    where = tmp_path_factory.mktemp("long")
    with torch.random.fork_rng():
        model = policy(context=2048)
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-5)
        for leaf in model.parameters():
            leaf.grad = 0.01 * torch.randn_like(leaf)
        optimizer.step()
    model.save_pretrained(where / "model")
    byte_tokenizer().save_pretrained(where / "model")
    torch.save(optimizer.state_dict(), where / "optimizer.pt")
    return where


def batch(prefix: str, n: int, seed: int, fingerprint: str | None) -> GeneratedBatch:
    """Sequences of some 1100 tokens, of which 40 are the prompt's."""
    generator, records = torch.Generator().manual_seed(seed), []
    for k in range(n):
        ids = torch.randint(3, 259, (T - 7 * k,), generator=generator).tolist()
        response = tuple(ids[40:])
        each = (-1.0,) * len(response)
        where = Provenance(f"{prefix}{k}", "train", "random", k, 0)
        record = SequenceRecord(
            f"{prefix}-00{k}-00", tuple(ids[:40]), response, "p", "r", each, each, (1.0,) * len(each), "eos", where
        )
        records.append(replace(record, reward=float(k), advantage=float(2 * k - 1), weight=0.5 / n))
    return GeneratedBatch(tuple(records), fingerprint, Sampling(temperature=1.0))


def plan(place: Path, out: Path, **numerics: Any) -> dict[str, Any]:
    fingerprint = checkpoint.load(place).provenance.fingerprint
    return {
        "checkpoint": {"path": str(place)},
        "update": {"kind": "payload", "batch": batch("U", 2, 1, fingerprint)},
        "requests": [{"kind": "payload", "name": "held_out", "batch": batch("E", 2, 2, fingerprint)}],
        "capture": {"kernel": True},
        "analyses": {"ledger": True, "parts": True},
        "storage": {"pictures": False},
        "numerics": numerics,
        "out": str(out),
    }


def test_layer_by_layer_it_is_what_whole_passes_find(place, tmp_path, monkeypatch):
    by_layers = FisherKernelRunner(plan(place, tmp_path / "layers", memory="150MB")).run()["held_out"]
    for module in ("planning.estimate", "planning.workload", "gradients"):
        monkeypatch.setattr(sys.modules[f"fkernel.engine.{module}"], "LONG", 10**6)
    whole = FisherKernelRunner(plan(place, tmp_path / "whole")).run()["held_out"]
    for name in ("kernel", "contributions", "momentum", "squared_norms"):
        scale = np.abs(whole.kept(name)).max()
        np.testing.assert_allclose(by_layers.kept(name), whole.kept(name), atol=1e-4 * scale, rtol=1e-3)
    # S of a thousand tokens is some 6000 nats, which float32 holds to 5e-4: so much may every change be off.
    np.testing.assert_allclose(by_layers.kept("realised"), whole.kept("realised"), atol=1e-3)
    np.testing.assert_allclose(by_layers.predicted, by_layers.kept("realised"), atol=1e-3)
