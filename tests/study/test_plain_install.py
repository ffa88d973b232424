"""The commands work from a plain install: a wheel is built and installed, and the packages of all extras are hidden."""

from __future__ import annotations

import json
import os
import shutil
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
SOURCES = Path(__file__).parents[2]
HIDING = f"""
import json
import os
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
sys.path[:] = [path for path in sys.path if os.path.realpath(path or ".") != {str(SOURCES.resolve())!r}]
import fkernel
assert fkernel.__file__.startswith(os.environ["PYTHONPATH"]), fkernel.__file__
from fkernel.cli import app
for command in json.loads(sys.argv[1]):
    print("$", *command, flush=True)
    if app(command, standalone_mode=False):
        sys.exit(1)
"""


def said_by(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed."""
    env = {**{name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, **env}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[:4]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the package's wheel alone, installed; built from a copy, which nobody changes meanwhile."""
    pytest.importorskip("hatchling", reason="hatchling, which builds the wheel, is not installed (it is of extra dev)")
    place = tmp_path_factory.mktemp("wheel")
    shutil.copytree(SOURCES / "fkernel", place / "sources" / "fkernel", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(SOURCES / name, place / "sources")
    # By hatchling's own function, and not by pip: an isolated build would download it.
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    name = said_by(sys.executable, "-c", build, place, cwd=place / "sources").stdout.split()[-1]
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target")
    said_by(*pip, place / "installed", place / name, cwd=place)
    return place / "installed"


def plain(installed: Path, place: Path, *commands: tuple[object, ...]) -> subprocess.CompletedProcess[str]:
    """Run commands of the wheel, in one process that can import no optional package and none of the sources."""
    given = json.dumps([[*map(str, command)] for command in commands])
    env = {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    done = said_by(sys.executable, "-c", HIDING, given, cwd=place, **env)
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.turns(6)
def test_explain_run_account_and_the_page_need_no_extra(run, installed, tmp_path):
    assert (installed / "bin" / "fkernel").is_file()
    plan = run.plan(tmp_path / "out", storage={"pictures": True})
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(plan))
    recording, probes = recording_of("dapo").directory, probes_file(tmp_path)
    done = plain(
        installed,
        tmp_path,
        ("explain", run.before, "--batch", run.update, "--max-norm", MAX_NORM, "--probe", "3+4=", "7"),
        ("run", "study.yaml"),
        ("account", recording, "--probes", probes, "--out", "account", "--steps", "0:2"),
        ("report", "account", "--out", "again.html"),
    )
    assert done.stderr.count("pictures are left out: matplotlib is not installed") == 3
    explained, study, account, report = done.stdout.split("\n$ ")
    assert "probe-1" in explained
    assert "held_out" in study
    assert "adds up" in account
    assert "Wrote again.html" in report
    for page in (tmp_path / "explained", tmp_path / "out", tmp_path / "account"):
        assert "Plotly" in (page / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "again.html").stat().st_size == (tmp_path / "account" / "report.html").stat().st_size


@pytest.mark.turns(6)
def test_the_demo_needs_no_extra(installed, tmp_path):
    done = plain(installed, tmp_path, ("demo", "--out", "demo"))
    assert "pictures are left out" in done.stderr
    assert "right" in done.stdout
    assert (tmp_path / "demo" / "report.html").is_file()
