"""Commands on several ranks: start them, or join those that a launcher started; rank 0 alone prints."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from fkernel.distributed import group_of, join, launch, launched, together

Processes = Annotated[
    int | None, typer.Option(help="Ranks that compute together, on this machine (default: one, or a plan's).")
]


def started(processes: int | None) -> bool:
    """Run this command on several ranks and wait for them; False where this process is to run it itself.

    Raises:
        ProcessError: a rank was killed. One that failed has said why: the command exits with its status.
    """
    if launched() or (processes or 1) == 1:
        return False
    command = ["-P", "-c", "import sys; sys.argv[0] = 'fkernel'; from fkernel.cli import app; app()"]
    if status := launch(processes or 1, [*command, *sys.argv[1:]]):
        raise typer.Exit(status)
    return True


def joined(device: str) -> Any:
    """The mesh of the ranks that a launcher started; None where this process is alone."""
    return join(device) if launched() and int(os.environ["WORLD_SIZE"]) > 1 else None


@contextmanager
def of_all_ranks(mesh: Any, what: str) -> Iterator[bool]:
    """Run work of all ranks, telling rank 0 that it is the first, as one process is; the others give no warnings."""
    if mesh is None:
        yield True
        return
    group = group_of(mesh)
    with together(group, what), warnings.catch_warnings():
        if group.rank:
            warnings.simplefilter("ignore")
        yield group.rank == 0
