"""Run a function of a test on several real processes, joined by gloo; kill some of them, where a test says so."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "fkernel", "tests.distributed.cases"])


class Outcome(NamedTuple):
    """What a rank ended with: a result, or an error's class name and message; and when, seconds after the start."""

    result: Any
    error: str | None
    seconds: float


def on_ranks(
    ranks: int, work: Callable[..., Any], *args: Any, seconds: float = 60, lost: Collection[int] = (), **env: str
) -> list[Outcome | None]:
    """Run work(mesh, *args) on every rank; None of those that are `lost`, killed, or do not end in time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        CONTEXT.Process(target=_rank, args=(pipe[1], rank, ranks, port, work, args, env), daemon=True)
        for rank, pipe in enumerate(pipes)
    ]
    start = time.monotonic()
    for process, (_, send) in zip(processes, pipes, strict=True):
        process.start()
        send.close()
    outcomes = [None if rank in lost else _received(pipe[0], start + seconds) for rank, pipe in enumerate(pipes)]
    for process in processes:
        process.kill()
        process.join()
    return outcomes


def results(ranks: int, work: Callable[..., Any], *args: Any, **env: Any) -> list[Any]:
    """Run work(mesh, *args) on every rank, none of which may fail."""
    outcomes = on_ranks(ranks, work, *args, seconds=280, **env)
    for rank, outcome in enumerate(outcomes):
        assert outcome is not None, f"rank {rank} did not end"
        assert outcome.error is None, f"rank {rank}: {outcome.error}"
    return [outcome.result for outcome in outcomes if outcome is not None]


def _received(pipe: Any, until: float) -> Outcome | None:
    try:
        ended = pipe.poll(max(0.0, until - time.monotonic()))
        return pickle.loads(pipe.recv_bytes()) if ended else None
    except EOFError:
        return None


def _rank(pipe: Any, rank: int, ranks: int, port: int, work: Any, args: Any, env: dict[str, str]) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", **env}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    start = time.monotonic()
    try:
        outcome = Outcome(work(mesh, *args), None, time.monotonic() - start)
    except Exception as error:
        trace = "" if type(error).__name__ == "ProcessError" else traceback.format_exc()
        outcome = Outcome(None, f"{type(error).__name__}: {error}{trace}", time.monotonic() - start)
    pipe.send_bytes(pickle.dumps(outcome))
    pipe.close()
    time.sleep(0.2 if outcome.error is None else 60)  # a rank that failed may live on: the test kills it
