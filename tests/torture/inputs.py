"""Bad inputs by the thousand: each is refused by an error of ours, or taken and right.

    python -m tests.torture.inputs [--count 10000] [--only plans] [--seed 0] [--out FILE]

A trial changes one thing in something valid, by a grammar of its own: a value, a key or a line of a plan, a record or a
file; a byte of a file; an argument of a command; a number, shape or name among a function's arguments. It ends as

    refused     an FKernelError with a message
    taken       a result, and every number in it is finite; of functions, that of the plain loop, too
    the user's own   what the user's f raises by itself
    RAW         any other exception
    NOT FINITE  a NaN or an infinity without a word
    OTHER       another number than the plain loop's
    HANGS       no end after a minute

Trial i of a family is the same with the same seed; the output file is kept after every hundred, and a run that is
stopped goes on from there.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fkernel.errors import FKernelError
from tests.torture.examples import FILE
from tests.torture.families import FAMILIES, Family
from tests.torture.rightness import NotRightError

OUT = Path(__file__).parents[2] / "benchmarks" / "results" / "torture_inputs.json"
SECONDS = 60
KEEP = 100
RIGHT = ("refused", "taken", "the user's own")


class HangsError(BaseException):
    """A trial that does not end; no `except Exception` takes it."""


def trial(family: Family, name: str, number: int, seed: int) -> tuple[str, str, str]:
    """Make one trial; returns (what was changed, how it ended, the message)."""
    draw = random.Random(f"{seed} {name} {number}")
    what, call = family(draw)

    def stop(*_: Any) -> None:
        raise HangsError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        call()
    except FKernelError as error:
        return what, "refused" if str(error).strip() else "RAW no message", str(error)
    except NotRightError as error:
        return what, error.kind, str(error)
    except HangsError:
        return what, "HANGS", f"no end after {SECONDS} s"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        if type(error).__name__ == "TypeCheckError":  # of annotations, which tests execute
            return what, "refused", str(error)
        if any(frame.name == "plain" or frame.filename == FILE for frame in traceback.extract_tb(error.__traceback__)):
            return what, "the user's own", str(error)  # f is his
        return what, f"RAW {type(error).__name__}", f"{error} ({Path(where.filename).name}:{where.lineno})"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return what, "taken", ""


def tortured(
    name: str, make: Callable[[Path], Family], count: int, seed: int, found: dict[str, Any], keep: Callable[[], Any]
) -> None:
    """Try a family up to so many trials in all, and count what comes of them."""
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        family = make(Path(place))
        while found["tried"] < count:
            what, outcome, text = trial(family, name, found["tried"], seed)
            found["outcomes"] = dict(Counter(found["outcomes"]) + Counter([outcome]))
            if outcome not in RIGHT:
                found["wrong"].append({"number": found["tried"], "what": what, "outcome": outcome, "text": text[:300]})
            found["tried"] += 1
            if found["tried"] % KEEP == 0:
                keep()
    keep()


def main() -> int:
    """Torture all families."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture.inputs", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="trials in all, shared by the families")
    parser.add_argument("--only", action="append", choices=[*FAMILIES], help="one family; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    given, _ = parser.parse_known_args()  # of all parts of the torture at once
    found: dict[str, Any] = {"seed": given.seed, "families": {}}
    if given.out.is_file() and (before := json.loads(given.out.read_text()))["seed"] == given.seed:
        found = before
    whole = sum(weight for weight, _ in FAMILIES.values())
    for name in given.only or FAMILIES:
        weight, make = FAMILIES[name]
        own = found["families"].setdefault(name, {"tried": 0, "outcomes": {}, "wrong": []})

        def keep() -> None:
            given.out.write_text(json.dumps(found, indent=1) + "\n")

        tortured(name, make, -(-given.count * weight // whole), given.seed, own, keep)
        print(f"{name}: {own['tried']} {own['outcomes']}", flush=True)
    return int(any(own["wrong"] for own in found["families"].values()))


if __name__ == "__main__":
    sys.exit(main())
