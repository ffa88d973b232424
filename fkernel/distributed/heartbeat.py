"""Signs of life: each rank writes once a second how much processor time it has used, and at which meeting it is.

A rank that others wait for is alive as long as its beats go on and it uses its processor: a long computation is not a
hang. It has stopped when its beats end, and hangs when it has used no processor time for `patience()` seconds.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from typing import Any, NamedTuple

BEAT = 1.0
"""Seconds between two beats."""
IDLE = 0.1
"""Processor seconds that a rank that hangs does not use: the beats themselves use less."""


def patience() -> float:
    """Return the seconds for which a rank may use no processor time while others wait; FKERNEL_PATIENCE, or 20."""
    return float(os.environ.get("FKERNEL_PATIENCE", "20"))


class Beat(NamedTuple):
    """One sign of life.

    Attributes:
        number: of the beat.
        seconds: of processor time that the process has used.
        meeting: number of the meeting that the rank has reached.
    """

    number: int
    seconds: float
    meeting: int


class Heartbeat:
    """A thread that writes this rank's beats.

    Attributes:
        meeting: what the next beat says.
    """

    def __init__(self, store: Any, rank: int) -> None:
        """Start at once; ends with the process."""
        self.meeting, self._store, self._rank = 0, store.clone(), rank
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="fkernel heartbeat", daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """End the beats: before the interpreter does, since the thread calls into torch."""
        self._stopped.set()
        self._thread.join(2 * BEAT)

    def _beat(self) -> None:
        count = 0
        while not self._stopped.is_set():
            count += 1
            text = f"{count} {time.process_time():.3f} {self.meeting}"
            try:
                self._store.set(f"beat/{self._rank}", text)
            except RuntimeError:  # the store has ended, and with it the group
                return
            self._stopped.wait(BEAT)


def read_beats(store: Any, size: int) -> dict[int, Beat]:
    """Read the last beat of every rank that has one; raises RuntimeError where the store has ended."""
    beats = {}
    for rank in range(size):
        if store.check([f"beat/{rank}"]):
            count, seconds, meeting = store.get(f"beat/{rank}").decode().split()
            beats[rank] = Beat(int(count), float(seconds), int(meeting))
    return beats


class Watch:
    """Watches the ranks that have not come to a meeting.

    Args of its methods are times in seconds since any fixed moment.
    """

    def __init__(self, meeting: int, now: float) -> None:
        """Begin to wait for a meeting."""
        self.meeting, self.start = meeting, now
        self._beats: dict[int, tuple[float, Beat]] = {}
        self._moved: dict[int, tuple[float, Beat]] = {}

    def see(self, beats: dict[int, Beat], now: float) -> None:
        """Take the ranks' newest beats."""
        for rank, beat in beats.items():
            if rank not in self._beats or beat.number != self._beats[rank][1].number:
                self._beats[rank] = now, beat
            if rank not in self._moved or beat.seconds > self._moved[rank][1].seconds + IDLE:
                self._moved[rank] = now, beat

    def missing(self, size: int) -> list[int]:
        """Ranks that have not reached the meeting."""
        here = {rank for rank, (_, beat) in self._beats.items() if beat.meeting >= self.meeting}
        return [rank for rank in range(size) if rank not in here]

    def stopped(self, size: int, now: float, silence: float) -> list[int]:
        """Ranks without a beat for some seconds, whether they have come or not."""
        return [rank for rank in range(size) if now - self._last(self._beats, rank) >= silence]

    def hanging(self, size: int, now: float, idle: float) -> list[int]:
        """Missing ranks that used no processor time for some seconds."""
        return [rank for rank in self.missing(size) if now - self._last(self._moved, rank) >= idle]

    def _last(self, seen: dict[int, tuple[float, Beat]], rank: int) -> float:
        return seen[rank][0] if rank in seen else self.start
