"""Sides in processes of their own, which take turns: each waits, and costs nothing, until it is asked for a round.

A process answers every line on its standard input with one marked line of JSON. So each side has an environment of its
own, imports and loading stay outside of what is timed, and rounds still alternate, as `benchmarks.ratios` wants them.
Imports nothing but the standard library, and so runs in any side's environment.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    **dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1"),
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}
"""What every side runs under: one thread, offline, on the CPU."""
MARK = "answer: "
"""Begins the lines that are answers; whatever else a library prints is passed over."""
TAIL = 3_000
"""Characters of a failed process's standard error that are shown."""

Answer = dict[str, Any]


class Cpu(NamedTuple):
    """CPU seconds of one call.

    Attributes:
        total: the program's own and the system's on its behalf.
        system: the latter: mostly pages of memory touched for the first time, which is dear on a virtual machine.
    """

    total: float
    system: float

    @property
    def user(self) -> float:
        """The program's own."""
        return max(0.0, self.total - self.system)


class PeerError(RuntimeError):
    """A side's process failed before it answered."""


def serve(load: Callable[[], Callable[[], Answer]]) -> None:
    """Load once, then answer each line of standard input with what the loaded function returns."""
    with os.fdopen(os.dup(1), "w") as channel:
        os.dup2(2, 1)  # what is printed from here on goes to standard error
        once = load()
        for _ in sys.stdin:
            channel.write(f"{MARK}{json.dumps(once())}\n")
            channel.flush()


def timed(call: Callable[[], Any]) -> tuple[Cpu, Any]:
    """Run a call by this process's CPU clock, all of its threads included; return its value too."""
    gc.collect()
    start, system = time.process_time(), _system_seconds()
    value = call()
    return Cpu(time.process_time() - start, _system_seconds() - system), value


def _system_seconds() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_stime


class Side:
    """A process that computes once for every line that it is sent; it lives as long as the `with` block.

    Args:
        name: what the comparison calls it.
        command: starts a program that calls `serve`; it runs at the root of the repository, under `ENVIRONMENT`.

    Example:
        >>> with Side("echo", [sys.executable, "-c", "for _ in open(0): print('answer: {}', flush=True)"]) as side:
        ...     side.ask()
        {}
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self.command = [*command]

    def __enter__(self) -> Side:
        """Start the process."""
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        return self

    def ask(self) -> Answer:
        """Have it compute, and wait for the answer.

        Raises:
            PeerError: the process has ended; the message holds the end of what it wrote to standard error.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; so does what it printed, below
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        code = self.process.wait()
        self.errors.seek(0)
        raise PeerError(f"{self.name} ended with status {code} before it answered:\n{self.errors.read()[-TAIL:]}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Let the process end by itself after a good round, and end it after a bad one."""
        if kind is not None:
            self.process.kill()
        self.process.communicate()
        self.errors.close()
