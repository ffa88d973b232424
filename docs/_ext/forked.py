"""Python programs that run in forks of one process, which has imported what takes them longer than to compute.

    >>> with programs(["json"]) as start:  # a process that imports these, and then waits at a socket
    ...     subprocess.run([*start, "json.tool", "--compact"], input="[1, 2]", stdout=-1, text=True).stdout.strip()
    '[1,2]'

`start` begins a command like any other: it connects, the process forks, and the fork runs the program in the caller's
folder and environment. It ends when either side does. Programs are paths of scripts, or names of modules. `kernels` has
Jupyter start its Python kernels so. Nothing is computed before a fork, which would leave threads behind.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any


@contextmanager
def programs(modules: Sequence[str]) -> Iterator[list[str]]:
    """Start the process that imports; yields how a command begins whose program runs in a fork of it.

    Args:
        modules: names of what is imported.
    """
    with TemporaryDirectory() as folder:
        place = str(Path(folder) / "socket")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(place)
            listening.listen(64)  # who comes while it imports waits
            command = [sys.executable, __file__, "serve", str(listening.fileno()), *modules]
            process = subprocess.Popen(command, pass_fds=[listening.fileno()], start_new_session=True)
        try:
            yield [sys.executable, "-I", "-S", __file__, "start", place]
        finally:
            os.killpg(process.pid, signal.SIGTERM)  # what is left of its forks ends too
            process.wait()


@contextmanager
def kernels(start: Sequence[str]) -> Iterator[None]:
    """Let Jupyter start Python kernels with a command's beginning, as `programs` yields it."""
    before = os.environ.get("JUPYTER_PATH")
    with TemporaryDirectory() as folder:
        place = Path(folder) / "kernels" / "python3"
        place.mkdir(parents=True)
        argv = [*start, "ipykernel_launcher", "-f", "{connection_file}", "--IPKernelApp.parent_handle=1"]  # or it talks
        spec: dict[str, Any] = {"argv": argv, "display_name": "Python 3", "language": "python"}
        spec["metadata"] = {"supported_encryption": ["curve"]}
        place.joinpath("kernel.json").write_text(json.dumps(spec), "utf-8")
        os.environ["JUPYTER_PATH"] = folder
        try:
            yield
        finally:
            os.environ.pop("JUPYTER_PATH")
            os.environ |= {} if before is None else {"JUPYTER_PATH": before}


def _start(place: str, argv: list[str]) -> int:
    """Run a program in a fork, with this process's files, folder and environment; returns its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Jupyter sends it before it ends a kernel
    with socket.socket(socket.AF_UNIX) as connected:
        connected.connect(place)
        message = json.dumps({"argv": argv, "cwd": os.getcwd(), "env": dict(os.environ)}).encode()
        socket.send_fds(connected, [len(message).to_bytes(8, "big")], [0, 1, 2])
        connected.sendall(message)
        return (connected.recv(1) or b"\1")[0]


def _serve(listening: socket.socket, modules: Sequence[str]) -> None:
    """Import, then fork for everyone who connects."""
    for name in modules:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks are not waited for: they answer themselves
    while True:
        connected, _ = listening.accept()
        if not os.fork():
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _run(connected)
        connected.close()


def _run(connected: socket.socket) -> None:
    """Run what a caller names, and tell it the exit status; never returns."""
    head, files, *_ = socket.recv_fds(connected, 8, 3)
    size, message = int.from_bytes(head, "big"), b""
    while len(message) < size:
        message += connected.recv(size - len(message))
    given = json.loads(message)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(given["env"])
    os.chdir(given["cwd"])
    Thread(target=_until_gone, args=(connected,), daemon=True).start()
    program, *arguments = given["argv"]
    sys.argv = [program, *arguments]
    status = 0
    try:
        if program.endswith(".py"):
            sys.path[0] = str(Path(program).parent)
            runpy.run_path(program, run_name="__main__")
        else:
            sys.path[0] = given["cwd"]
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    connected.send(bytes([status % 256]))
    os._exit(status % 256)


def _until_gone(connected: socket.socket) -> None:
    """End this process when its caller has ended."""
    connected.recv(1)
    os._exit(1)


if __name__ == "__main__":
    what, where, *others = sys.argv[1:]
    if what == "serve":
        _serve(socket.socket(fileno=int(where)), others)
    sys.exit(_start(where, others))
