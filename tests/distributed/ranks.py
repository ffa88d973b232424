"""Run a function of a test on several real processes, joined by gloo; kill some of them, where a test says so."""

from __future__ import annotations

import atexit
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
CONTEXT.set_forkserver_preload(
    [
        *("torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint", "fkernel.checkpoint"),
        *("transformers.models.qwen2.modeling_qwen2", "transformers.models.gpt2.modeling_gpt2", "peft"),
        *("tests.distributed.cases", "tests.test_layered"),
    ]
)


class Outcome(NamedTuple):
    """What a rank ended with: a result, or an error's class name and message; and when, seconds after the start."""

    result: Any
    error: str | None
    seconds: float


class Ranks:
    """Processes joined in a group, which run one function after another until they are closed."""

    def __init__(self, ranks: int, **env: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pipes = [CONTEXT.Pipe() for _ in range(ranks)]
        self.pipes = [own for own, _ in pipes]
        self.processes = [
            CONTEXT.Process(target=_rank, args=(theirs, rank, ranks, port, env), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()

    def run(self, work: Callable[..., Any], *args: Any, seconds: float, lost: Collection[int]) -> list[Outcome | None]:
        """Run work(mesh, *args) on every rank; None of those that are `lost`, killed, or do not end in time."""
        until = time.monotonic() + seconds
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((work, args)))
        return [None if rank in lost else _received(pipe, until) for rank, pipe in enumerate(self.pipes)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


_STANDING: dict[int, Ranks] = {}
"""Groups in which nothing has failed, by their size."""


@atexit.register
def _closed() -> None:
    while _STANDING:
        _STANDING.popitem()[1].close()


def on_ranks(
    ranks: int, work: Callable[..., Any], *args: Any, seconds: float = 60, lost: Collection[int] = (), **env: str
) -> list[Outcome | None]:
    """Run work(mesh, *args) on ranks of its own, which may fail; None of those that are `lost`, or late."""
    group = Ranks(ranks, **env)
    try:
        return group.run(work, *args, seconds=seconds, lost=lost)
    finally:
        group.close()


def results(ranks: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Run work(mesh, *args) on every rank, none of which may fail; the group stays for the next."""
    group = _STANDING.pop(ranks, None) or Ranks(ranks)
    outcomes = group.run(work, *args, seconds=280, lost=())
    if any(outcome is None or outcome.error is not None for outcome in outcomes):
        group.close()
    else:
        _STANDING[ranks] = group
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


def _rank(pipe: Any, rank: int, ranks: int, port: int, env: dict[str, str]) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", **env}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    while True:  # until it is killed
        work, args = pickle.loads(pipe.recv_bytes())
        start = time.monotonic()
        try:
            outcome = Outcome(work(mesh, *args), None, time.monotonic() - start)
        except Exception as error:
            trace = "" if type(error).__name__ == "ProcessError" else traceback.format_exc()
            outcome = Outcome(None, f"{type(error).__name__}: {error}{trace}", time.monotonic() - start)
        pipe.send_bytes(pickle.dumps(outcome))
