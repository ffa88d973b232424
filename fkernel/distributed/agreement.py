"""One error for all: ranks meet before every exchange, and where one of them failed, all of them raise.

    with together(group, "kernel"):      every rank
        …                                  work, on which a rank may fail
        all_sum(group, x)                  meets first, then exchanges
                                         meets at the end

A meeting is one number summed over all ranks: how many of them failed. Between a meeting and the exchange that follows
nothing can fail, so a rank that fails goes straight to the meeting at the end of `together`, where it says why; the
others are then at their next meeting, whichever that is, and learn of it there. A rank that is killed closes its
connections; one that hangs is found by its heartbeat (`fkernel.distributed.heartbeat`). Whoever notices first writes
the reason to the store, and all others read it within a second.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fkernel.distributed.group import Group
from fkernel.distributed.heartbeat import BEAT, Watch, patience, read_beats
from fkernel.errors import ProcessError

_SLICE = timedelta(seconds=0.5)
_SILENCE = 4 * BEAT
"""Seconds without a beat after which a rank has stopped."""
_BROKEN = "broken"
"""Key of the reason why the group cannot go on."""


@contextmanager
def together(group: Group, what: str) -> Iterator[None]:
    """Run work of all ranks; where one fails, every rank raises, and names it.

    Args:
        group: the ranks; all of them must enter.
        what: the work, for the message. Inside another `together` this one does nothing.

    Raises:
        ProcessError: another rank failed, was killed, or hangs. Where all ranks raise the same error, that error, with
            an attribute `of_all_ranks`, so that one rank can tell of it.
    """
    progress = group.progress
    if progress.depth:
        yield
        return
    progress.depth += 1
    try:
        yield
    except BaseException as error:
        shared = None if getattr(error, "of_all_ranks", False) else _shared(group, what, error)
        if shared is None or not isinstance(error, Exception):
            raise
        raise shared from error
    else:
        meet(group)
    finally:
        progress.depth -= 1


def _shared(group: Group, what: str, error: BaseException) -> ProcessError | None:
    """Tell the others of an error; return the one that all raise, None where each has the same one already."""
    try:
        meet(group, f"{what}: {type(error).__name__}: {error}")
    except ProcessError as shared:
        error.__dict__["of_all_ranks"] = shared.unanimous
        return None if shared.unanimous else shared
    raise AssertionError("a meeting with a failure always raises")


def meet(group: Group, failure: str | None = None) -> None:
    """Wait for all ranks; raise on all of them where one failed."""
    number = group.progress.meetings = group.progress.meetings + 1
    group.heartbeat.meeting = number
    failed = torch.zeros(group.size, dtype=torch.int64)
    if failure is not None:
        failed[group.rank] = 1
        _tell(group, f"failed/{number}/{group.rank}", failure)
    wait(group, dist.all_reduce(failed, group=group.control, async_op=True))
    if failed.any():
        raise _failed(group, number, failed.nonzero().flatten().tolist())


def _failed(group: Group, number: int, ranks: list[int]) -> ProcessError:
    """Make the error that all ranks raise at a meeting."""
    reasons = dict[int, str]()
    for rank in ranks:
        _wait_for(group, key := f"failed/{number}/{rank}")  # which the store may get to after the ranks met
        reasons[rank] = group.store.get(key).decode()
    first = ranks[0]
    others = f" ({len(ranks) - 1} more failed)" if len(ranks) > 1 else ""
    unanimous = len(reasons) == group.size and len({*reasons.values()}) == 1
    return _error(f"Rank {first} of {group.size} failed{others}: {reasons[first]}", unanimous)


def agree(group: Group, what: str, value: str) -> None:
    """Raise on every rank unless all of them have the same value.

    Args:
        group: the ranks.
        what: the value's name, for the message.
        value: any text; long ones are shortened in the message.

    Raises:
        ProcessError: ranks differ; it names those that differ from rank 0.
    """
    digest = hashlib.sha256(value.encode()).digest()
    own = torch.tensor([*digest], dtype=torch.uint8)
    every = [torch.empty_like(own) for _ in range(group.size)]
    _tell(group, f"agree/{group.progress.meetings + 1}/{group.rank}", _shortened(value))
    meet(group)
    number = group.progress.meetings
    wait(group, dist.all_gather(every, own, group=group.control, async_op=True))
    apart = [rank for rank in range(group.size) if not torch.equal(every[rank], every[0])]
    if not apart:
        return
    values = {rank: group.store.get(f"agree/{number}/{rank}").decode() for rank in (0, apart[0])}
    more = f" (and {len(apart) - 1} more)" if len(apart) > 1 else ""
    raise _error(
        f"The ranks disagree about {what}: rank {apart[0]}{more} has {values[apart[0]]}, rank 0 has {values[0]}. Give "
        f"every rank the same; nothing was computed."
    )


def _shortened(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def from_first(group: Group, what: str, make: Callable[[], Any]) -> Any:
    """Run `make` on rank 0 alone, and return its result on every rank.

    The others wait however long it takes, as long as rank 0 lives.

    Args:
        group: the ranks.
        what: the work, for messages.
        make: what rank 0 runs; its result is pickled.
    """
    with together(group, what):
        number = group.heartbeat.meeting = group.progress.meetings + 1
        result, done = None, f"done/{number}"
        if group.rank == 0:
            group.heartbeat.meeting -= 1  # the others wait for it
            try:
                result = make()
            finally:
                _tell(group, done, "")
        else:
            _wait_for(group, done)
        data = _pickled(result) if group.rank == 0 else torch.empty(0, dtype=torch.uint8)
        meet(group)
        size, source = torch.tensor([len(data)]), dist.get_global_rank(group.control, 0)
        wait(group, dist.broadcast(size, source, group=group.control, async_op=True))
        data = data if group.rank == 0 else torch.empty(int(size), dtype=torch.uint8)
        wait(group, dist.broadcast(data, source, group=group.control, async_op=True))
        return result if group.rank == 0 else torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=False)


def _pickled(value: Any) -> torch.Tensor:
    stream = io.BytesIO()
    torch.save(value, stream)
    return torch.frombuffer(bytearray(stream.getbuffer()), dtype=torch.uint8)


def _wait_for(group: Group, key: str) -> None:
    """Wait for a key of the store without a collective, whose own timeout would end the wait."""
    watch = Watch(group.heartbeat.meeting, time.monotonic())
    while not _has(group, key):
        if reason := _reason(group, watch):
            raise _error(reason)
        time.sleep(_SLICE.total_seconds() / 5)


def _has(group: Group, key: str) -> bool:
    try:
        return group.store.check([key])
    except RuntimeError as error:
        raise _error(_without_store()) from error


def wait(group: Group, work: Any) -> None:
    """Wait for a collective; raise on every rank when one has stopped or hangs.

    Raises:
        ProcessError: the collective cannot end; it names the rank and says why.
    """
    watch = Watch(group.progress.meetings, time.monotonic())
    while True:
        try:
            work.wait(_SLICE)
            return
        except RuntimeError as error:
            if work.is_completed():
                raise _error(_lost(group, watch, error)) from error
        if reason := _reason(group, watch):
            raise _error(reason)


def _reason(group: Group, watch: Watch) -> str | None:
    """Return why the group cannot go on, as far as this rank knows."""
    try:
        if group.store.check([_BROKEN]):
            return group.store.get(_BROKEN).decode()
        now = time.monotonic()
        watch.see(read_beats(group.store, group.size), now)
    except RuntimeError:
        return _without_store()
    silence = max(_SILENCE, patience() / 2)
    if stopped := watch.stopped(group.size, now, silence):
        return _tell(group, _BROKEN, f"{_named(group, stopped)} stopped: no sign of life for {silence:.0f} s.")
    if hanging := watch.hanging(group.size, now, patience()):
        return _tell(
            group,
            _BROKEN,
            f"{_named(group, hanging)} hangs: the other ranks wait, and it has used no processor time for "
            f"{patience():.0f} s (FKERNEL_PATIENCE sets how many).",
        )
    return None


def _lost(group: Group, watch: Watch, error: RuntimeError) -> str:
    """Find out which rank's connection was lost: the one whose beats end."""
    until = time.monotonic() + _SILENCE + 2 * BEAT
    try:
        while time.monotonic() < until:
            now = time.monotonic()
            if group.store.check([_BROKEN]):
                return group.store.get(_BROKEN).decode()
            watch.see(read_beats(group.store, group.size), now)
            if stopped := watch.stopped(group.size, now, _SILENCE):
                return _tell(group, _BROKEN, f"{_named(group, stopped)} stopped: it was killed, or ran out of memory.")
            time.sleep(BEAT / 4)
    except RuntimeError:
        return _without_store()
    return _tell(group, _BROKEN, f"A connection between ranks was lost: {error}")


def _without_store() -> str:
    return "The process that keeps the group's store stopped: rank 0, or the launcher."


def _named(group: Group, ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks))
    return f"Rank{'s' if len(ranks) > 1 else ''} {listed} of {group.size}"


def _tell(group: Group, key: str, text: str) -> str:
    """Write to the store, where it is still there; return the text."""
    with suppress(RuntimeError):
        group.store.set(key, text)
    return text


def _error(message: str, unanimous: bool = False) -> ProcessError:
    """Make an error that every rank raises, so that no further meeting is needed."""
    return ProcessError(" ".join(message.split()), of_all_ranks=True, unanimous=unanimous)
