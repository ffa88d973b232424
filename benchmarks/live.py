"""What probes of a running training cost: `python -m benchmarks.live`, written to `results/live.json`.

    limit      a recorded loop: forward, backward, AdamW; with the generation of its sequences before, or without
    ours       the same loop, with four probes told at every fifth step

The sides take turns on one thread, in CPU seconds, five steps each, so that every turn of ours holds one such step. The
ratio is taken within each round (`benchmarks.ratios`).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT
from benchmarks.models import build, model_of
from benchmarks.ratios import interleaved
from benchmarks.runs_cost import N_U, THREADS, T, probes, step
from fkernel.record import Recorder
from fkernel.rollout import GeneratedBatch

N_PROBES, EVERY = 4, 5
TARGET = 1.10
SIZES = ((N_U, False), (N_U, True), (2 * N_U, True), (4 * N_U, False))
RESULTS = ROOT / "benchmarks" / "results" / "live.json"


def loop(
    place: Path, shape: str, n_U: int, tokens: int, generated: bool, E: GeneratedBatch | None
) -> Callable[[], None]:
    """A recorded training that goes on by `EVERY` steps with each call."""
    subject, model = build(shape), model_of(shape, "sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    recorder = Recorder(place, model, optimizer, probes=E, every=EVERY)
    ids, attention, scored = subject.batch(n_U, tokens, 100)
    advantages = torch.randn(n_U, generator=torch.Generator().manual_seed(1))

    def go_on() -> None:
        for _ in range(EVERY):
            if generated:
                begun, mask = ids[:, : tokens // 2], attention[:, : tokens // 2]
                length = {"max_length": tokens, "min_length": tokens, "pad_token_id": 0}
                model.generate(begun, attention_mask=mask, do_sample=True, **length)
            step(recorder, model, optimizer, (ids, attention, scored), advantages)

    return go_on


def measured(shape: str, n_U: int, generated: bool, rounds: int, tokens: int = T) -> dict[str, Any]:
    """The ratio of a loop with probes to one without."""
    torch.set_num_threads(THREADS)
    every = probes(build(shape), tokens)
    E = GeneratedBatch(every.records[:N_PROBES], None, None, 0)
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            "limit": loop(Path(folder) / "plain", shape, n_U, tokens, generated, None),
            "probes": loop(Path(folder) / "probes", shape, n_U, tokens, generated, E),
        }
        taken = interleaved(sides, rounds, clock=time.process_time)
    about = {"shape": shape, "n_U": n_U, "generated": generated, "probes": N_PROBES, "every": EVERY}
    about |= {"tokens": tokens, "threads": THREADS, "rounds": rounds}
    return {**about, **taken["probes"]._asdict(), "target": TARGET, "load": os.getloadavg()[0]}


def main() -> None:
    """Measure batches of two sizes, and write them."""
    given = argparse.ArgumentParser()
    given.add_argument("--rounds", type=int, default=5)
    rounds = given.parse_args().rounds
    made = [measured("base", n, own, rounds) for n, own in SIZES]
    RESULTS.write_text(json.dumps(made, indent=1) + "\n")
    for row in made:
        what = "with generation" if row["generated"] else "without generation"
        print(f"{row['n_U']} sequences a step, {what}: {row['ratio']:.3f} ({row['least']:.3f} to {row['most']:.3f})")


if __name__ == "__main__":
    main()
