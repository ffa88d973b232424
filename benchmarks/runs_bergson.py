"""bergson 2.5.1's scores of a recorded run: its optimizer-aware gradient products at the weights after the run's steps.

bergson knows sequences and no token weights, so its product of S is multiplied by what a sequence's log-probability
weighed in the loss: ω, which is one number a sequence in an on-policy DAPO step. It covers linear layers alone.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT
from benchmarks.peers.against_bergson import PYTHON, available
from benchmarks.peers.case import OPTIMIZER, SEQUENCES
from fkernel.record import Recording, fill, replay
from fkernel.rollout import GeneratedBatch
from fkernel.shapes import Tensor

NAME = "bergson 2.5.1, AdamNormalizer, the last weights and state"


def scores(recording: Recording, steps: range, probes: GeneratedBatch) -> Tensor | None:
    """Score every sequence for every probe, [n_E N]; None where bergson is not there.

    Raises:
        RuntimeError: its process failed.
        ValueError: a sequence's tokens have different weights.
    """
    if not available():
        return None
    records = [record for number in steps for record in recording.step(number).records]
    weights = [w for number in steps for w in _weights(recording, number)]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        _write(recording, steps, place)
        sides = {"E": probes.records, "U": records}
        rows = {s: [([*r.prompt_ids, *r.response_ids], len(r.prompt_ids)) for r in each] for s, each in sides.items()}
        torch.save(rows, place / "ragged.pt")
        command = [str(PYTHON), "-m", "benchmarks.runs_bergson_side", folder]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"bergson's side failed:\n{done.stderr[-2000:]}")
        K = torch.load(place / "K.pt", weights_only=True).double()
    return K * torch.tensor(weights, dtype=torch.float64)


def _weights(recording: Recording, number: int) -> list[float]:
    """−lr c ω of each sequence of a step."""
    step, weights = recording.step(number), list[float]()
    for record in step.records:
        own = torch.tensor(record.token_weights["loss"])
        if float(own.max() - own.min()) > 1e-4 * float(own.abs().max()):
            raise ValueError(
                f"{record.sequence_id} of step {number} has different weights of its tokens: {own.tolist()}."
            )
        weights.append(-step.lr[0][0] * step.clip * float(own.mean()))
    return weights


def _write(recording: Recording, steps: range, place: Path) -> None:
    """The model and its optimizer's state after the steps, as a training run leaves them: one group, by position."""
    *_, last = replay(recording, steps.stop, start=steps.start)
    net: Any = recording.policy()
    fill(net, last.params)
    net.save_pretrained(place)
    recording.tokenizer.save_pretrained(place)
    state = {i: last.stored.entries[name] for i, (name, _) in enumerate(net.named_parameters())}
    group = {"params": [*state], "lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    torch.save({"state": {i: dict(entry) for i, entry in state.items()}, "param_groups": [group]}, place / OPTIMIZER)
    nothing = torch.zeros(1, 4, dtype=torch.int64)
    torch.save({"E": nothing, "U": nothing, "prompt": 1}, place / SEQUENCES)
