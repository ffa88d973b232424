"""A small instance of `make torture`: some crash points of what is quick to call."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMES = ("store", "record, another run", "sample")


def test_what_is_stopped_anywhere_goes_on_to_the_same_bits(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "tests.torture.crashes", "--out", str(tmp_path / "found.json")]
    command += ["--every", "24", "--random", "1", "--seconds", "30", *(f"--only={name}" for name in NAMES)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=400)
    assert out.returncode == 0, out.stdout + out.stderr
    found = json.loads((tmp_path / "found.json").read_text())["scenarios"]
    assert tuple(found) == NAMES
    for each in found.values():
        assert not each["wrong"]
        assert not each["a power cut could lose"]
        assert each["killed"] > 0
        assert each["killed at random moments"] > 0
