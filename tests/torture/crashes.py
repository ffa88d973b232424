"""Every crash point of what writes: killed before and in the middle of each operation, and at random moments.

    python -m tests.torture.crashes [--only run] [--part kills] [--random 120] [--every 1] [--seed 0] [--out FILE]

After each kill the same call is made again. It must end; its files are those of an undisturbed call, to the last bit
(files that differ between two undisturbed calls, such as logs with times, must be there); nothing lies about. A disk
that is full from an operation on, and one that turns read-only, must be one error that names a file and what to do, and
the same call goes on once there is room.

What was done is kept in the output file after every trial: a run that is stopped goes on from there.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fkernel.errors import FKernelError
from fkernel.io import checksums
from tests.torture.leftovers import temporaries
from tests.torture.operations import FULL, READ_ONLY, Stop, watched
from tests.torture.scenarios import SCENARIOS, Scenario

OUT = Path(__file__).parents[2] / "benchmarks" / "results" / "torture_crashes.json"
OF_A_RUN = {"run": ("environment.json", "report.html"), "demo": ("complete.json",)}
"""They say which answers are of an earlier run, and list its certificates beside this one's; or, of the demo, the size
of a file that says how many seconds a training took."""
NOT_FLUSHED = ("log.jsonl", "lock")
"""Files whose loss in a power cut loses nothing."""
REFUSED = 17
"""Exit status of a call that ended with an error of ours."""
PARTS = ("kills", "random", "refusals")
KINDS = ("killed", "killed at random moments", "no room", "read-only")


class Ended(NamedTuple):
    """How a process ended: its status, negative for a signal; and what it said."""

    status: int
    said: str


def in_child(call: Callable[[], Any], log: Path, seconds: float | None = None) -> Ended:
    """Call something in a fork of this process, killed after so many seconds where that is asked."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.setsid()
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            torch.set_num_threads(1)
            said = call()
            log.write_text(json.dumps(said))
            status = 0
        except FKernelError as error:
            log.write_text(str(error))
            status = REFUSED
        except BaseException:
            log.write_text(traceback.format_exc())
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return Ended(status, log.read_text(errors="replace") if log.exists() else "")


class Tortured:
    """A scenario with its inputs, and what an undisturbed call leaves.

    Attributes:
        names: of the operations of an undisturbed call.
        unsafe: paths that a power cut could lose after one.
        seconds: that one takes.
    """

    def __init__(self, name: str, scenario: Scenario, work: Path) -> None:
        self.name, self.scenario, self.work, self.count = name, scenario, work, 0
        self.inputs, self.log = work / "inputs", work / "log"
        self.inputs.mkdir(parents=True)
        self._need(in_child(lambda: scenario.make(self.inputs), self.log))
        scenario.warm(self.inputs)
        first, second = self.fresh(), None
        began = time.perf_counter()
        self.names, self.unsafe = json.loads(self._need(in_child(lambda: self.acted(first), self.log)))
        self.seconds = time.perf_counter() - began
        self.files = checksums(first)
        second = self.fresh()
        self._need(in_child(lambda: self.acted(second), self.log))
        again = checksums(second)
        assert {*again} == {*self.files}, (name, {*again} ^ {*self.files})
        self.volatile = sorted(
            path for path in again if again[path] != self.files[path] or Path(path).name in OF_A_RUN.get(name, ())
        )
        shutil.rmtree(first)

    def fresh(self) -> Path:
        """A folder, always of the same name: results name paths."""
        root = self.work / "root"
        if root.exists():
            shutil.rmtree(root)
        root.mkdir()
        self._need(in_child(lambda: self.scenario.begin(self.inputs, root), self.log))
        return root

    def acted(self, root: Path, stop: Stop = Stop()) -> tuple[list[str], list[str]]:  # noqa: B008 - a tuple
        """Call what is tortured, stopped or not; returns the operations, and what a power cut could lose."""
        with watched(root, stop) as disk:
            self.scenario.act(self.inputs, root)
        lost = {path for path in disk.dirty if Path(path).name not in NOT_FLUSHED}
        return disk.names, sorted({os.path.relpath(path, root) for path in {*disk.unsafe, *lost}})

    def stopped(self, stop: Stop) -> str | None:
        """Stop at an operation, and go on; what is wrong then, or None."""
        root = self.fresh()
        ended = in_child(lambda: self.acted(root, stop), self.log)
        if stop.how == "error":
            if ended.status == REFUSED and not self._is_clear(ended.said, root):
                return f"the error is not clear: {ended.said}"
            if ended.status not in (REFUSED, 0):  # what is not essential may be given up
                return f"a raw error: {ended.said[-1500:]}"
        elif ended.status != -signal.SIGKILL:
            return f"it ended with {ended.status} instead of being killed: {ended.said[-1500:]}"
        return self.goes_on(root)

    def killed(self, rng: random.Random, most: int = 3) -> tuple[int, str | None]:
        """Kill one to `most` times at random moments, then go on; returns how often, and what is wrong."""
        root, kills = self.fresh(), 0
        for _ in range(rng.randint(1, most)):
            seconds = rng.uniform(0, self.seconds)
            kills += in_child(lambda: self.acted(root), self.log, seconds).status == -signal.SIGKILL
        return kills, self.goes_on(root)

    def goes_on(self, root: Path) -> str | None:
        """Make the same call again, undisturbed; what is wrong afterwards, or None."""
        ended = in_child(lambda: self.acted(root), self.log)
        if ended.status:
            return f"the same call does not go on: {ended.said[-1500:]}"
        there = checksums(root)
        if left := temporaries(root):
            return f"left behind: {left}"
        if {*there} != {*self.files}:
            return f"other files: {sorted({*there} ^ {*self.files})}"
        differ = [path for path, sha256 in there.items() if sha256 != self.files[path] and path not in self.volatile]
        return f"differ: {differ}" if differ else None

    def _is_clear(self, said: str, root: Path) -> bool:
        return str(root) in said and ("choose" in said or "room" in said.lower())

    def _need(self, ended: Ended) -> str:
        if ended.status:
            raise AssertionError(f"{self.name}: {ended.said}")
        return ended.said


def stops_of(names: list[str], every: int, offset: int) -> list[Stop]:
    """Every place where a call with these operations is stopped, or every so many of them."""
    stops = list[Stop]()
    for number, name in enumerate(names, 1):
        stops.append(Stop(number))
        if name in ("write", "open"):
            stops.append(Stop(number, "middle"))
        if name in FULL:
            stops.append(Stop(number, "error", errno.ENOSPC, FULL))
        stops.append(Stop(number, "error", errno.EROFS, READ_ONLY))
    return stops[offset % every :: every]


def kind_of(stop: Stop) -> str:
    """How a stop is called in the figures."""
    return {0: "killed", errno.ENOSPC: "no room", errno.EROFS: "read-only"}[stop.error]


def tried(one: Tortured, stops: list[Stop], found: dict[str, Any], part: str, keep: Callable[[], Any]) -> None:
    """Try the stops of a part that were not tried yet, and count them."""
    for stop in stops[found["tried"][part] :]:
        problem = one.stopped(stop)
        found["tried"][part] += 1
        found[kind_of(stop)] += 1
        if problem:
            name = one.names[stop.at - 1]
            found["wrong"].append(f"{stop.how} operation {stop.at} ({name}), {kind_of(stop)}: {problem}")
            print(f"  {one.name}: {found['wrong'][-1]}", flush=True)
        keep()


def killed_at_random(one: Tortured, kills: int, seed: int, found: dict[str, Any], keep: Callable[[], Any]) -> None:
    """Kill at random moments until there are so many kills."""
    while found["killed at random moments"] < kills and found["tried"]["random"] < 4 * kills:
        stopped, problem = one.killed(random.Random(f"{seed} {one.name} {found['tried']['random']}"))
        found["tried"]["random"] += 1
        found["killed at random moments"] += stopped
        if problem:
            found["wrong"].append(f"random kill: {problem}")
            print(f"  {one.name}: {found['wrong'][-1]}", flush=True)
        keep()


class OutOfTimeError(Exception):
    """A part has had its seconds."""


def tortured(
    name: str, part: str, given: argparse.Namespace, scenarios: dict[str, Any], save: Callable[[], Any]
) -> None:
    """Do one part of one scenario, from where it was stopped, for so many seconds at most."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fkernel-torture-") as work:
        one = Tortured(name, SCENARIOS[name], Path(work))
        rng = random.Random(f"{given.seed} {name}")
        stops = stops_of(one.names, given.every, rng.randrange(given.every))
        rng.shuffle(stops)
        found = scenarios.setdefault(name, {})
        if found.get("operations") != len(one.names):  # or of other code
            found.clear()
            found |= {"operations": len(one.names), "places": Counter(map(kind_of, stops)), **dict.fromkeys(KINDS, 0)}
            found |= {"killed at random moments": 0, "tried": dict.fromkeys(PARTS, 0), "wrong": [], "seconds": 0}
        found["a power cut could lose"], found["differ between undisturbed calls"] = one.unsafe, one.volatile
        found["seconds of one call"] = round(one.seconds, 2)
        before = found["seconds"]

        def keep() -> None:
            found["seconds"] = before + round(time.monotonic() - began)
            save()
            if time.monotonic() - began > given.seconds:
                raise OutOfTimeError

        with suppress(OutOfTimeError):
            if part == "random":
                killed_at_random(one, given.random, given.seed, found, keep)
            else:
                tried(one, [stop for stop in stops if (stop.error == 0) == (part == "kills")], found, part, keep)


def main() -> int:
    """Torture all scenarios with what was not tried yet: kills at operations, kills at random moments, refusals."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture.crashes", description=__doc__)
    parser.add_argument("--only", action="append", choices=[*SCENARIOS], help="one scenario; may be repeated")
    parser.add_argument("--part", action="append", choices=PARTS, help="one part; may be repeated")
    parser.add_argument("--random", type=int, default=120, help="kills at random moments of each")
    parser.add_argument("--every", type=int, default=1, help="every so many stops instead of all")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for a part of a scenario, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    given, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    settings = {"seed": given.seed, "every": given.every}
    whole: dict[str, Any] = {"settings": settings, "scenarios": {}}
    if given.out.is_file() and (before := json.loads(given.out.read_text()))["settings"] == settings:
        whole = before
    scenarios = whole["scenarios"]

    def save() -> None:
        whole["in all"] = {kind: sum(each[kind] for each in scenarios.values()) for kind in KINDS}
        whole["in all"]["wrong"] = sum(len(each["wrong"]) for each in scenarios.values())
        given.out.write_text(json.dumps(whole, indent=1) + "\n")

    for part in given.part or PARTS:
        for name in given.only or SCENARIOS:
            tortured(name, part, given, scenarios, save)
            save()
            found = {key: len(value) if isinstance(value, list) else value for key, value in scenarios[name].items()}
            print(f"{part} of {name}: {found}", flush=True)
    return int(any(each["wrong"] or each["a power cut could lose"] for each in scenarios.values()))


if __name__ == "__main__":
    sys.exit(main())
