"""An account that was stopped: the sweep is kept now and then, and the same request goes on from there."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fkernel.distributed import Group, gather_numbers
from fkernel.engine import RunAccount, StepColumns, Sweep
from fkernel.errors import ResultsError
from fkernel.io import (
    atomic_directory,
    checksum,
    checksummed_json,
    read_checksummed,
    remove_directory,
    safetensors_chunks,
    sweep,
    write_file,
)
from fkernel.shapes import Tensor

SWEEP, STATES = "sweep", "states"
REQUEST, TENSORS = "sweep.json", "sweep.safetensors"
_KEPT = re.compile(rf"({SWEEP}|{STATES})(-\d+-of-\d+)?")
EVERY = 30.0
"""Seconds of work between two states that are kept, at least."""


def folder_of(directory: Path, name: str, group: Group | None) -> Path:
    """Where a process keeps what an account needs until it is written: `sweep`; of several ranks, `sweep-0-of-2`."""
    return directory / (name if group is None else f"{name}-{group.rank}-of-{group.size}")


class KeptSweep:
    """Keeps the sweep of a request in a directory, at most every so many seconds.

    Args:
        directory: of the account.
        request: JSON that tells one account from another.
        every: seconds.
        group: the ranks that sweep together, each of which keeps its shards; None for this process alone.
    """

    def __init__(
        self, directory: Path, request: Mapping[str, Any], every: float = EVERY, group: Group | None = None
    ) -> None:
        self.directory, self.place = directory, folder_of(directory, SWEEP, group)
        self.request, self.every, self.group = dict(request), every, group
        self._last = time.monotonic()
        sweep(directory)

    def found(self) -> Sweep | None:
        """The sweep that all ranks kept of this request; None where there is none, or another request's."""
        kept = self._found()
        if self.group is not None:
            own = [-1, -1] if kept is None else [len(kept.done), kept.taken]
            if any(each != own for each in gather_numbers(self.group, own)):
                return None  # stopped while some had kept a state and others had not: the sweep begins anew
        return kept

    def _found(self) -> Sweep | None:
        if not (self.place / REQUEST).is_file():
            return None
        try:
            about = read_checksummed(self.place / REQUEST)
            if about["request"] != self.request or checksum(self.place / TENSORS) != about["sha256"]:
                return None
            tensors = {
                name: leaf.clone() for name, leaf in load_file(self.place / TENSORS).items()
            }  # aligned: same bits
        except (OSError, ValueError, KeyError) as error:
            raise ResultsError(f"{str(self.place)!r} is damaged ({error}); delete it to begin anew.") from error
        done = tuple(_account(tensors, f"done/{i}/", about["paths"][i]) for i in range(about["done"]))
        columns = tuple(
            StepColumns(*(tensors[f"columns/{t}/{name}"] for name in StepColumns._fields))
            for t in range(about["columns"])
        )
        rows = {name.removeprefix("rows/"): leaf for name, leaf in tensors.items() if name.startswith("rows/")}
        return Sweep(done, about["taken"], rows, columns, tensors["after"])

    def __call__(self, sweep: Sweep) -> None:
        """Keep a sweep, if the last one is old enough."""
        due = time.monotonic() - self._last >= self.every
        if self.group is not None:
            due = bool(gather_numbers(self.group, [int(due)])[0][0])  # all keep the same step: when rank 0 says
        if not due:
            return
        tensors = {f"rows/{name}": leaf for name, leaf in sweep.rows.items()} | {"after": sweep.after}
        for t, columns in enumerate(sweep.columns):
            tensors |= {f"columns/{t}/{name}": leaf for name, leaf in columns._asdict().items()}
        for i, account in enumerate(sweep.done):
            tensors |= _tensors(account, f"done/{i}/")
        about = {"request": self.request, "taken": sweep.taken, "columns": len(sweep.columns)}
        about |= {"done": len(sweep.done), "paths": [account.path for account in sweep.done]}
        with atomic_directory(self.place, replace=True) as work:
            sha256 = write_file(work / TENSORS, safetensors_chunks(tensors))
            write_file(work / REQUEST, [checksummed_json({**about, "sha256": sha256})])
        self._last = time.monotonic()

    def forget(self) -> None:
        """Delete what was kept, and what a run on another number of ranks left when it was stopped."""
        remove_directory(self.place)
        ours = "" if self.group is None else rf"-\d+-of-{self.group.size}"
        if self.group is None or self.group.rank == 0:
            for name in os.listdir(self.directory) if self.directory.is_dir() else ():
                if _KEPT.fullmatch(name) and not re.fullmatch(rf"({SWEEP}|{STATES}){ours}", name):
                    remove_directory(self.directory / name)


def _tensors(account: RunAccount, start: str) -> dict[str, Tensor]:
    own = {f"{start}{name}": getattr(account, name) for name in RunAccount._fields[1:-1]}
    return own | {f"{start}contributions/{t}": leaf for t, leaf in enumerate(account.contributions)}


def _account(tensors: Mapping[str, Tensor], start: str, path: str) -> RunAccount:
    own = {name: tensors[f"{start}{name}"] for name in RunAccount._fields[1:-1]}
    count = sum(name.startswith(f"{start}contributions/") for name in tensors)
    return RunAccount([tensors[f"{start}contributions/{t}"] for t in range(count)], **own, path=path)
