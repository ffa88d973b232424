"""Slow tests take turns: of those marked `turns(n)`, a run of the whole suite tries one in n, others with every commit.

`make test-all` tries all of them, and so does a run that names files or tests, or selects them with -k or -m.
"""

from __future__ import annotations

import os
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest

ALL = os.environ.get("FKERNEL_TESTS") == "all"
TURN = pytest.StashKey[int | None]()
"""The number of commits, by which turns are told; None where everything is tried."""


def turn_of(config: pytest.Config) -> int | None:
    """The turn of a run."""
    selected = config.option.keyword or config.option.markexpr
    if ALL or selected or config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return None
    command = ["git", "rev-list", "--count", "HEAD"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else 0


def waiting(items: Sequence[pytest.Item], turn: int | None) -> list[pytest.Item]:
    """Those whose turn it is not."""
    sharing = defaultdict[int, list[pytest.Item]](list)
    for item in items:
        if turn is not None and (mark := item.get_closest_marker("turns")):
            sharing[mark.args[0]].append(item)
    return [item for n, those in sharing.items() for k, item in enumerate(those) if (k - (turn or 0)) % n]
