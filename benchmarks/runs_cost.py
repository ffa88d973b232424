"""What an account costs: `python -m benchmarks.runs_cost --steps 6`, in a process of its own.

    limit    plain batched backward passes over all recorded sequences, and over E once a step
    ours     `account_recording`, from the files of a recording to those of an account

The recording is of a plain loop: 13.8M parameters, 16 sequences of 64 tokens a step, 8 probes. Both sides take turns on
one thread, in CPU seconds, which others on the machine disturb least; the ratio is of medians. Peak memory is what the
account adds, in a process for each length.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import ROOT
from benchmarks.limits import plain_backward
from benchmarks.memory import MB, _forget_peak, _status
from benchmarks.models import Subject, build, model_of
from fkernel.record import Recorder, Recording, replay
from fkernel.rollout import GeneratedBatch, Provenance, SequenceRecord
from fkernel.study import account_recording

N_U, N_E, T = 16, 8, 64
TARGET = 2.5
THREADS = 1
"""One, as elsewhere on a machine that others use: two threads wait for each other."""
SNAPSHOTS = ("every", "first")


def step(
    recorder: Recorder, model: Any, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor, Tensor], A: Tensor
) -> None:
    """Take a recorded step of AdamW on −Σ A log π over the number of response tokens."""
    ids, attention, scored = batch
    with recorder.step():
        logp = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        logp = recorder.tap(logp, input_ids=ids, attention_mask=attention, response_mask=scored.long())
        (-(logp * scored[:, 1:] * A[:, None]).sum() / scored.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


def recorded(place: Path, shape: str, steps: int, snapshots: str, tokens: int = T) -> Recording:
    """Record a loop of AdamW steps on random sequences with random advantages."""
    subject, model = build(shape), model_of(shape, "eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    advantages = torch.randn(N_U, generator=torch.Generator().manual_seed(1))
    with Recorder(place, model, optimizer, snapshots=snapshots) as recorder:
        for number in range(steps):
            ids, attention, scored = subject.batch(N_U, tokens, 100 + number)
            step(recorder, model, optimizer, (ids, attention, scored), advantages)
    return Recording.open(place)


def probes(subject: Subject, tokens: int = T) -> GeneratedBatch:
    """Random sequences, as probes."""
    ids, _, scored = subject.batch(N_E, tokens, 7)
    start = int((~scored[0]).sum())
    records = []
    for i, row in enumerate(ids.tolist()):
        where = Provenance(f"P-{i}", "custom", "custom", i, 0, custom=True)
        texts = (tuple(row[:start]), tuple(row[start:]), "", "")
        records.append(SequenceRecord(f"P-{i}", *texts, (), (), (), "given", where))
    return GeneratedBatch(tuple(records), None, None, 0)


def limit(subject: Subject, steps: int, tokens: int = T) -> None:
    """The passes that no account can do without."""
    E, batches = subject.batch(N_E, tokens, 7), [subject.batch(N_U, tokens, 100 + number) for number in range(steps)]
    for U in batches:
        plain_backward(subject, U)
        plain_backward(subject, E)


def measured(shape: str, steps: int, rounds: int, tokens: int = T, brief: bool = False) -> dict[str, Any]:
    """CPU seconds of both sides in turns, after a warm-up; briefly, without one and of the first account alone."""
    with tempfile.TemporaryDirectory() as folder:
        place, subject = Path(folder), build(shape)
        E = probes(subject, tokens)
        kept = {each: recorded(place / each, shape, steps, each, tokens) for each in SNAPSHOTS[: 2 - brief]}

        def ours(snapshots: str, path: str) -> Callable[[], Any]:
            def run() -> None:
                shutil.rmtree(place / "account", ignore_errors=True)
                account_recording(kept[snapshots], E, place / "account", path=path, p_values=False)

            return run

        def replayed() -> None:
            for _ in replay(kept["first"]):
                pass

        sides: dict[str, Callable[[], Any]] = {
            "limit": lambda: limit(subject, steps, tokens),
            "account, every state kept": ours("every", "midpoint"),
            "account, the first state kept": ours("first", "midpoint"),
            "account, two nodes, every state kept": ours("every", "gauss2"),
            "replay alone": replayed,
        }
        if brief:
            sides = {name: sides[name] for name in [*sides][:2]}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for i in range(brief, rounds + 1):
            for name, side in sides.items():
                begun = time.process_time()
                side()
                if i:  # the first is a warm-up
                    seconds[name].append(time.process_time() - begun)
    middle = {name: median(each) for name, each in seconds.items()}
    ratios = {name: each / middle["limit"] for name, each in middle.items()}
    about = {"parameters": subject.size, "n_U": N_U, "n_E": N_E, "tokens": tokens, "steps": steps, "threads": THREADS}
    return {**about, "rounds": rounds, "seconds": middle, "ratios": ratios, "load": os.getloadavg()[0]}


def peak(shape: str, steps: int, tokens: int = T) -> dict[str, Any]:
    """MB that an account adds to what the process held, at most."""
    with tempfile.TemporaryDirectory() as folder:
        place, subject = Path(folder), build(shape)
        E, recording = probes(subject, tokens), recorded(place / "run", shape, steps, "first", tokens)
        _forget_peak()
        before = _status("VmRSS") or 0.0
        account_recording(recording, E, place / "account", p_values=False)
        most = _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB
    return {"steps": steps, "before_mb": before, "peak_mb": most, "added_mb": most - before}


def in_own_process(*arguments: str) -> dict[str, Any]:
    """Measure in a fresh interpreter."""
    command = [sys.executable, "-m", "benchmarks.runs_cost", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"The measurement {' '.join(arguments)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def all_of_it(shape: str = "base", small: str = "width 256", lengths: tuple[int, ...] = (6, 24)) -> dict[str, Any]:
    """Time of a short run and of a longer one, then peaks of a smaller model; each in a process of its own."""
    short = in_own_process("--shape", shape, "--steps", "4", "--rounds", "1")
    longer = in_own_process("--shape", shape, "--steps", "8", "--rounds", "1", "--brief")
    peaks = [in_own_process("--shape", small, "--steps", str(n), "--peak") for n in lengths]
    return {"time": short, "longer": longer, "memory": peaks}


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="base")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--brief", action="store_true", help="the limit and one account, without a warm-up")
    parser.add_argument("--peak", action="store_true", help="peak memory, and no times")
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    if given.peak:
        print(json.dumps(peak(given.shape, given.steps)))
    else:
        print(json.dumps(measured(given.shape, given.steps, given.rounds, brief=given.brief)))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
