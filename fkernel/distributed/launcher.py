"""Start ranks by torch's elastic launcher, or join the group that torchrun started.

fkernel run PLAN --processes 8                 launches itself 8 times
torchrun --nproc-per-node 8 -m fkernel run …   each rank joins
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fkernel.errors import ProcessError
from fkernel.io import scratch_directory


def launched() -> bool:
    """Tell whether a launcher started this process as one of several ranks."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def join(device: str = "cpu") -> Any:
    """Join the group that a launcher started, and return its mesh of one dimension.

    Args:
        device: "cpu" for gloo; "cuda" for NCCL, one GPU a rank.

    Returns:
        A `torch.distributed.DeviceMesh` over all ranks.

    Raises:
        ProcessError: no launcher started this process.
    """
    if not launched():
        raise ProcessError(
            "this process is no rank of a group: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are not all set. Start "
            "it with torchrun, or say --processes."
        )
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(kind, (dist.get_world_size(),))


def launch(processes: int, command: Sequence[str]) -> int:
    """Run a command on several ranks of this machine, and wait for them.

    Args:
        processes: their number.
        command: arguments of the Python interpreter, such as ["-m", "module", "argument"].

    Returns:
        The exit status: 0, or that of the rank that failed first; the others were stopped.

    Raises:
        ProcessError: a rank was killed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, errors
    from torch.distributed.launcher import api

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its reports name no reasons
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    with scratch_directory("fkernel-ranks") as logs:
        config = api.LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=f"fkernel-{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=str(logs)),
        )
        try:
            with _stopped_ranks_end():
                api.elastic_launch(config, sys.executable)(*command)
        except errors.ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode > 0:
                return failure.exitcode  # it has said why
            name = signal.Signals(-failure.exitcode).name
            raise ProcessError(f"Rank {rank} of {processes} was killed by {name}; the others were stopped.") from error
    return 0


@contextmanager
def _stopped_ranks_end() -> Iterator[None]:
    """Let go on what is stopped once another rank has ended: it hears SIGTERM only then, which all others get."""
    over = threading.Event()
    watching = threading.Thread(target=_watch_ranks, args=(over,), name="fkernel ranks", daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()


def _watch_ranks(over: threading.Event) -> None:
    most = 0
    while not over.wait(0.5):
        states = _states_of_children()
        most = max(most, len(states))
        if len(states) < most:
            for rank in (pid for pid, state in states.items() if state == "T"):
                with suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGCONT)


def _states_of_children() -> dict[int, str]:
    """{process id: its state} of this process's children that have not ended, as Linux has it; elsewhere {}."""
    states = dict[int, str]()
    with suppress(OSError):
        for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            with suppress(OSError):
                states[int(pid)] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return {pid: state for pid, state in states.items() if state not in "ZX"}
