"""States of a run, last first: read where a snapshot is, replayed where there is none, within a disk grant.

    snapshot ─────── k ─────── 2k ─────── 3k … next snapshot      replayed once, every k-th state kept on disk
                                └ 2k+1 … 3k−1 ┘                   replayed again when the walk comes to it, then deleted

A walk over L states between two snapshots replays them at most twice and keeps ⌈L/k⌉ + k − 2 of them at a time; k is
the smallest that the grant allows. What is kept is found again by an account that was killed.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, isqrt
from pathlib import Path
from typing import Any

import torch

from fkernel.errors import StoreError
from fkernel.io import atomic_write, checksummed_json, hash_json, make_directory, read_checksummed, remove_directory
from fkernel.precond import StoredState
from fkernel.record.directory import SNAPSHOTS, numbered, place_of, read_snapshot, remove_partial, write_snapshot
from fkernel.record.replaying import State, Training, next_state, placed, state_of

OF = "of.json"
"""Beside the states that are kept: which run they are of."""


class States:
    """States of a run, from the one after its last step to the one before its first; iterated as often as one likes.

    Args:
        training: of the run.
        steps: whose states.
        scratch: a directory for states that no snapshot holds, of nobody else; those of another run are deleted there.
        disk: bytes that they may take at a time; None for as many as there are.

    Raises:
        StoreError: a step is missing, no snapshot lies before the first, or the grant is too small.
    """

    def __init__(self, training: Training, steps: range, scratch: Path, disk: int | None = None) -> None:
        recording = training.recording
        recording.check_steps(steps)
        self.training, self.steps, self.scratch, self.disk = training, steps, scratch, disk
        before = [number for number in recording.snapshots if number <= steps.start]
        if not before:
            raise StoreError(
                f"{str(recording.directory)!r} has no snapshot before step {steps.start}; the first is before step "
                f"{min(recording.snapshots, default='–')}. Ask for steps from there on."
            )
        self._bounds = [before[-1], *(n for n in recording.snapshots if steps.start < n <= steps.stop)]
        numbers = [n for n in recording.steps if before[-1] <= n < steps.stop]
        self._of = hash_json([dict(recording.about), str(training.device), *map(recording.checksums, numbers)])
        if self._found() != self._of:
            remove_directory(scratch)
        remove_partial(scratch)

    def __iter__(self) -> Iterator[State]:
        """Walk backwards."""
        bounds, end = self._bounds, self.steps.stop
        if bounds[-1] == end:
            yield state_of(self.training, end)
            bounds = bounds[:-1]
        else:
            end += 1  # the state after the last step is one of the last segment
        for begin in reversed(bounds):
            yield from self._segment(begin, end)
            end = begin

    def first(self) -> State:
        """The state before the first step."""
        state = state_of(self.training, self._bounds[0])
        while state.number < self.steps.start:
            state = next_state(self.training, state)
        return state

    def clear(self) -> None:
        """Delete all states that were kept."""
        remove_directory(self.scratch)

    def _found(self) -> str | None:
        """Which run the states are of that are there; None where that is not said."""
        try:
            return read_checksummed(self.scratch / OF)["run"]
        except (OSError, ValueError, KeyError):
            return None

    def _segment(self, begin: int, end: int) -> Iterator[State]:
        """States end − 1 … max(begin, the first step), from the snapshot at begin."""
        first = state_of(self.training, begin)
        k = self._spacing(first, end - begin)
        for number in [n for n in self._kept if begin <= n < end and (n - begin) % k]:
            self._forget(number)
        self._forward(first, end, k)
        for start in reversed(range(begin, end, k)):
            stop = min(start + k, end)
            if stop <= self.steps.start:
                return
            if k > 1:
                self._forward(self._state(start, first), stop, 1)
            for number in reversed(range(max(start, self.steps.start), stop)):
                yield self._state(number, first)
            for number in range(start + 1, stop) if k > 1 else ():
                self._forget(number)

    def _forward(self, first: State, end: int, k: int) -> None:
        """Replay to the last multiple of k before end, and keep every k-th state; what is there is not taken again."""
        wanted = range(first.number + k, end, k)
        there = {*self._kept}
        if {*wanted} <= there:
            return
        state = self._state(max((n for n in wanted if n in there), default=first.number), first)
        while state.number < wanted[-1]:
            state = next_state(self.training, state)
            if state.number in wanted:
                self._keep(state)

    def _spacing(self, state: State, steps: int) -> int:
        """The smallest k whose states fit the grant."""
        if self.disk is None:
            return 1
        entries = [leaf for entry in state.stored.entries.values() for leaf in entry.values()]
        tensors = [*state.params.values(), *(leaf for leaf in entries if isinstance(leaf, torch.Tensor))]
        size = max(sum(leaf.nbytes for leaf in tensors), 3 * sum(leaf.nbytes for leaf in state.params.values()))
        held = {k: ceil(steps / k) - 1 + (k - 1) for k in range(1, isqrt(steps) + 2)}
        fits = [k for k, count in held.items() if count * size <= self.disk]
        if fits:
            return fits[0]
        least = min(held.values())
        raise StoreError(
            f"disk={self.disk} bytes hold {self.disk // size} states of the run, of {size} bytes each; {steps} steps "
            f"lie between two snapshots, and a walk back over them keeps at least {least}: give {least * size} bytes, "
            f"or record snapshots more often."
        )

    @property
    def _kept(self) -> tuple[int, ...]:
        return numbered(self.scratch, SNAPSHOTS)

    def _state(self, number: int, first: State) -> State:
        return first if number == first.number else self._read(number)

    def _keep(self, state: State) -> None:
        stored = state.stored
        entries = [(name, key, value) for name, entry in stored.entries.items() for key, value in entry.items()]
        tensors = {f"{name}/{key}": value for name, key, value in entries if isinstance(value, torch.Tensor)}
        rest = dict[str, dict[str, Any]]()
        for name, key, value in entries:
            if not isinstance(value, torch.Tensor):
                rest.setdefault(name, {})[key] = value
        if self._found() is None:
            atomic_write(make_directory(self.scratch) / OF, [checksummed_json({"run": self._of})])
        facts = {"kinds": stored.kinds, "writers": stored.writers, "groups": stored.groups, "state": rest}
        write_snapshot(place_of(self.scratch, SNAPSHOTS, state.number), facts, state.params, tensors)

    def _read(self, number: int) -> State:
        facts, params, tensors = read_snapshot(place_of(self.scratch, SNAPSHOTS, number))
        entries: dict[str, dict[str, Any]] = {name: dict(facts["state"].get(name, {})) for name in facts["kinds"]}
        for place, leaf in tensors.items():
            name, _, key = place.rpartition("/")
            entries[name][key] = leaf
        groups = {
            name: {key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}
            for name, own in facts["groups"].items()
        }
        state = State(number, params, StoredState(facts["kinds"], facts["writers"], entries, groups))
        return placed(state, self.training.device)

    def _forget(self, number: int) -> None:
        remove_directory(place_of(self.scratch, SNAPSHOTS, number))
