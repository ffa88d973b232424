"""A small instance of `make torture`: some crash points of what is quick to call."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("names", "every"), [(["store", "record, another run"], 8), (["sample", "demo"], 16)])
def test_what_is_stopped_anywhere_goes_on_to_the_same_bits(tmp_path, names, every):
    command = [sys.executable, "-W", "ignore", "-m", "tests.torture.crashes", "--out", str(tmp_path / "found.json")]
    command += ["--every", str(every), "--random", "3", "--seconds", "60"]
    command += [word for name in names for word in ("--only", name)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert out.returncode == 0, out.stdout + out.stderr
    found = json.loads((tmp_path / "found.json").read_text())["scenarios"]
    assert [*found] == names
    for each in found.values():
        assert not each["wrong"]
        assert not each["a power cut could lose"]
        assert each["killed"] > 0
        assert each["killed at random moments"] >= 3
