"""The commands work from a plain install: without the packages of any extra, hidden here from a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.study.conftest import MAX_NORM
from tests.study.recorded_runs import probes_file, recording_of

OPTIONAL = (
    *("matplotlib", "xarray", "scipy", "pandas", "datasets", "math_verify", "reasoning_gym", "peft", "accelerate"),
    *("trl", "bitsandbytes", "jaxtyping", "beartype", "hypothesis", "sklearn"),
)
HIDING = f"""
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {OPTIONAL!r} else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
from importlib import metadata
versions = metadata.version
def version(name):
    if name.replace("-", "_") in {OPTIONAL!r}:
        raise metadata.PackageNotFoundError(name)
    return versions(name)
metadata.version = version
from fkernel.cli import app
app()
"""


def plain(place: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command where no optional package can be imported."""
    package = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": package, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", HIDING, *map(str, arguments)]
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_explain_run_and_account_need_no_extra(run, tmp_path):
    done = plain(tmp_path, "explain", run.before, "--batch", run.update, "--max-norm", MAX_NORM, "--out", "explained",
                 "--probe", "3+4=", "7")  # fmt: skip
    assert "pictures are left out: matplotlib is not installed" in done.stderr
    assert "probe-1" in done.stdout
    plan = run.plan(tmp_path / "out", storage={"pictures": True})
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(plan))
    done = plain(tmp_path, "run", "study.yaml")
    assert "held_out" in done.stdout
    recording = recording_of("dapo").directory
    done = plain(
        tmp_path, "account", recording, "--probes", probes_file(tmp_path), "--out", "account", "--steps", "0:2"
    )
    assert "adds up" in done.stdout


@pytest.mark.slow
def test_the_demo_needs_no_extra(tmp_path):
    done = plain(tmp_path, "demo", "--out", "demo")
    assert "pictures are left out" in done.stderr
    assert "right" in done.stdout
