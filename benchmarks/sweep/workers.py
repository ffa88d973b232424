"""One process for each model type: a crash, a hang or an abort costs one row.

Processes are forked from this one, which has imported what is slow to import and has computed nothing: a row then takes
a second, not four. So this is for a process of its own (`python -m benchmarks.sweep`), not for one that used torch.
"""

from __future__ import annotations

import importlib
import os
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, get_context
from typing import Any

import torch

from benchmarks.sweep.judge import Row, judge
from benchmarks.sweep.settings import build

WORKERS = 2
LIMIT = 120.0
"""Seconds until a process is ended."""
MEMORY = 8 << 30
"""Bytes of address space for each."""
SLOW_IMPORTS = (
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.auto",
    "torch._decomp.decompositions_for_jvp",
)


@dataclass
class Worker:
    """A process under way, and what it said last.

    Attributes:
        stage: the verdict if it ends without a row: "not built" while it builds, then "raw".
    """

    kind: str
    process: Any
    answers: connection.Connection
    stage: str = "not built"
    start: float = field(default_factory=time.perf_counter)


def sweep(kinds: Sequence[str], limit: float = LIMIT, build: Callable[[str], Any] = build) -> Iterator[Row]:
    """Judge model types, some at a time; rows come as they are ready."""
    for module in SLOW_IMPORTS:
        importlib.import_module(module)
    waiting, running = list(kinds), []
    try:
        while waiting or running:
            while waiting and len(running) < WORKERS:
                running.append(_start(waiting.pop(0), build))
            connection.wait([worker.answers for worker in running], timeout=1.0)
            for worker in list(running):
                row = _row(worker, limit)
                if row is not None:
                    running.remove(worker)
                    _end(worker)
                    yield {"kind": worker.kind, **row}
    finally:
        for worker in running:
            _end(worker)


def _start(kind: str, build: Callable[[str], Any]) -> Worker:
    context = get_context("fork")
    answers, told = context.Pipe(duplex=False)
    process = context.Process(target=_judge, args=(kind, build, told), daemon=True)
    process.start()
    told.close()
    return Worker(kind, process, answers)


def _judge(kind: str, build: Callable[[str], Any], told: connection.Connection) -> None:
    """Run in the process: tell every stage, then the row."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    told.send(judge(lambda: build(kind), told.send))


def _row(worker: Worker, limit: float) -> Row | None:
    """Read what a process said; None while it is at work."""
    seconds = time.perf_counter() - worker.start
    try:
        while worker.answers.poll():
            answer = worker.answers.recv()
            if not isinstance(answer, str):
                return answer
            worker.stage = answer
    except EOFError:
        worker.process.join()
        code = worker.process.exitcode
        cause = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return {"verdict": worker.stage, "reason": f"the process ended by {cause}", "seconds": round(seconds, 1)}
    if seconds > limit:
        reason = f"no answer within {limit:.0f} s"
        return {"verdict": worker.stage, "reason": reason, "seconds": round(seconds, 1)}
    return None


def _end(worker: Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.answers.close()
