"""docs/checkpoints.md names every packed run once, with the versions that wrote it."""

from __future__ import annotations

import re
from pathlib import Path

from tests.formats.archives import WRITTEN, names

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def test_every_run_has_its_row():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    named = [run for line in rows for run in re.findall(r"`([a-z0-9_]+)`", line.rsplit("|", 2)[-2])]
    assert sorted(named) == names()


def test_packed_runs_are_small():
    assert sum(path.stat().st_size for path in WRITTEN.iterdir()) < 2e6
