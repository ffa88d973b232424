"""`numerics.memory` is kept, and `fkernel estimate PLAN` foretells it: whole studies, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import fkernel as fk
from fkernel import checkpoint
from fkernel.rollout import GeneratedBatch, Sampling, save_batch
from fkernel.rollout.record import Provenance, SequenceRecord
from fkernel.study import FisherKernelPlan, forecast, read_plan
from tests.rollout.conftest import byte_tokenizer

T, N_U, N_E = 96, 24, 8
MB = 1e6
_MEASURED = """
import ctypes, gc, sys, time
import torch
from benchmarks.memory import _forget_peak, _status
from fkernel.engine.planning import rates
from fkernel.study import FisherKernelPlan, FisherKernelRunner, read_plan
torch.set_num_threads(1)
rates()
FisherKernelRunner(read_plan(sys.argv[1], FisherKernelPlan)).run()  # libraries take what they take at first use
plan = read_plan(sys.argv[2], FisherKernelPlan)
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
_forget_peak()
before, start = _status("VmRSS"), time.process_time()
results = FisherKernelRunner(plan).run()
assert set(results["held_out"].analyses) == {"ledger", "parts", "uncertainty"}
print(_status("VmHWM") - before, time.process_time() - start)
"""


class Measured(NamedTuple):
    """What a run took: MB that were added, and seconds of one processor."""

    grown: float
    seconds: float


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints with optimizers, of 4 million parameters and of few, and batches of their own."""
    where = tmp_path_factory.mktemp("promise")
    for name, hidden, layers in (("large", 256, 5), ("small", 32, 1)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Qwen2ForCausalLM(
                Qwen2Config(
                    vocab_size=259,
                    hidden_size=hidden,
                    intermediate_size=3 * hidden,
                    num_hidden_layers=layers,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    tie_word_embeddings=True,
                    bos_token_id=2,
                    eos_token_id=1,
                )
            )
            optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-5)
            for leaf in model.parameters():
                leaf.grad = 0.01 * torch.randn_like(leaf)
            optimizer.step()
        model.save_pretrained(where / name / "model")
        byte_tokenizer().save_pretrained(where / name / "model")
        torch.save(optimizer.state_dict(), where / name / "optimizer.pt")
        fingerprint = checkpoint.load(where / name).provenance.fingerprint
        n = {"U": N_U, "E": N_E, "F": N_E} if name == "large" else dict.fromkeys("UEF", 4)
        for seed, (batch, size) in enumerate(n.items()):
            save_batch(_batch(batch, size, seed, fingerprint), where / name / batch)
    return where


def _batch(prefix: str, n: int, seed: int, fingerprint: str | None) -> GeneratedBatch:
    generator, records = torch.Generator().manual_seed(seed), []
    for k in range(n):
        ids = torch.randint(3, 259, (T,), generator=generator).tolist()
        response = tuple(ids[10:])
        each = (-1.0,) * len(response)
        where = Provenance(f"{prefix}{k // 4}", "train", "random", k // 4, k % 4)
        name = f"{prefix}-{k // 4:03d}-{k % 4:02d}"
        record = SequenceRecord(name, tuple(ids[:10]), response, "p", "r", each, each, (1.0,) * len(each), "eos", where)
        records.append(replace(record, reward=float(k % 3), advantage=float(2 * (k % 2) - 1), weight=0.5 / n))
    return GeneratedBatch(tuple(records), fingerprint, Sampling(temperature=1.0))


def _plan(place: Path, name: str, out: Path, **changes: Any) -> Path:
    """Two requests, with analyses on."""
    requests = [{"kind": "from_file", "name": n, "path": str(place / name / b)} for n, b in
                (("held_out", "E"), ("probe", "F"))]  # fmt: skip
    written = {
        "checkpoint": {"path": str(place / name)},
        "update": {"kind": "from_file", "path": str(place / name / "U")},
        "requests": requests,
        "capture": {"kernel": True},
        "analyses": {"ledger": True, "parts": True, "uncertainty": True, "health": True},
        "storage": {"pictures": False},
        "out": str(out),
        **changes,
    }
    out.mkdir(parents=True)
    file = out / "asked.json"
    file.write_text(json.dumps(written))
    return file


def _run(place: Path, out: Path, plan: Path) -> Measured:
    small = _plan(place, "small", out / "small", numerics={"memory": "200MB"})
    command = [sys.executable, "-c", _MEASURED, str(small), str(plan)]
    root = Path(fk.__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return Measured(*map(float, done.stdout.split()[-2:]))


@pytest.mark.turns(6)
@pytest.mark.parametrize(
    ("grant", "persist"), [(120, True), (250, True), (450, False)], ids=["small", "large", "in memory"]
)
def test_a_grant_is_kept(place, tmp_path, grant, persist):
    """16 MB a vector: θ and two moments, P, Δθ in three parts and whole, a node of the path, θ after; and the grant."""
    storage = {"pictures": False, "persist": persist}
    plan = _plan(place, "large", tmp_path / "large", numerics={"memory": f"{grant}MB"}, storage=storage)
    found, foretold = _run(place, tmp_path, plan), forecast(read_plan(plan, FisherKernelPlan))
    promise = 10 * foretold.parameters * 4 / MB + grant
    assert found.grown <= 1.1 * promise
    assert found.grown == pytest.approx(foretold.memory / MB, rel=0.2)
    # The clock is other processes' too; processor time, on a machine whose rates were measured at some other time, is
    # held to an order of magnitude.
    assert 0.1 < found.seconds / foretold.seconds < 10
