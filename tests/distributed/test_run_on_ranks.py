"""`fkernel run PLAN` on two ranks gives what one process gives, writes once, and stops with one line if one dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from fkernel.cli import app
from fkernel.demo import demo_plan, prepare
from tests.demo.conftest import TINY
from tests.study.conftest import MAX_NORM, made

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
COMMAND = [sys.executable, "-c", "import sys; sys.argv[0] = 'fkernel'; from fkernel.cli import app; app()"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--no-python", "--nproc-per-node", "2", *COMMAND]
DRAWN = {
    "kind": "update",
    "batch_size_prompts": 3,
    "completions_per_prompt": 3,
    "reward": "tests.study.conftest.brevity",
}


def command(*arguments: Any, start: list[str] = COMMAND) -> subprocess.CompletedProcess[str]:
    whole = [*start, *map(str, arguments)]
    return subprocess.run(whole, capture_output=True, text=True, timeout=280, env=ENVIRONMENT, check=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ranks")
    run = made(place / "training")
    plan = run.plan(place / "out", numerics={"dtype": "float64", "microbatch": 2})
    plan |= {"update": DRAWN, "step": {"max_norm": MAX_NORM}}
    plan["requests"] += [{"kind": "update", "name": "self"}]
    (place / "study.yaml").write_text(yaml.safe_dump(plan))
    return place


def ended(place: Path, by: signal.Signals, out: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """A run on two ranks whose second gets a signal: how it ended, and after how many seconds."""
    arguments = [*COMMAND, "run", str(place / "study.yaml"), "--out", str(place / out), "--processes", "2"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as run:
        victim = _rank(run.pid, 1)
        while by == signal.SIGSTOP and not (place / out / "log.jsonl").exists():
            time.sleep(0.05)  # until both have met
        start = time.monotonic()
        os.kill(victim, by)
        said, told = run.communicate(timeout=60)
        seconds = time.monotonic() - start
    assert not (place / out / "results.json").exists()
    return subprocess.CompletedProcess(arguments, run.returncode, said, told), seconds


@pytest.fixture(scope="module")
def killed(place: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    return ended(place, signal.SIGKILL, "two")


def arrays(out: Path) -> dict[str, np.ndarray]:
    with np.load(out / "kernel.npz") as stored:
        return {name: stored[name] for name in stored.files if stored[name].dtype.kind == "f"}


def compared(alone: Path, ranks: Path, tolerance: float) -> None:
    """Hold every array, and what files there are, of a run on ranks against those of one process."""
    one, two = arrays(alone), arrays(ranks)
    assert one.keys() == two.keys()
    errors = {}
    for name, expected in one.items():
        there = np.isfinite(expected)
        np.testing.assert_array_equal(
            two[name][~there], expected[~there], err_msg=name
        )  # what is left out, or infinite
        nothing = name.endswith(("remainder", "unexplained"))  # what rounding makes of a difference of θ
        size = max(float(np.linalg.norm(expected[there])), 1e-3 if nothing else 1e-6)
        errors[name] = float(np.linalg.norm(two[name][there] - expected[there])) / size
        assert np.isfinite(errors[name]), name
    assert max(errors.values()) <= tolerance, {name: error for name, error in errors.items() if error > tolerance}
    written = [{path.name for path in out.iterdir()} for out in (alone, ranks)]
    assert written[0] - written[1] == {"workspace"}  # over ranks U's gradients stay in memory


def alone(plan: Path, out: Path) -> None:
    result = CliRunner().invoke(app, ["run", str(plan), "--out", str(out)])
    assert result.exit_code == 0, result.output


def test_a_rank_that_is_killed_stops_the_run_with_one_line(killed):
    run, seconds = killed
    assert seconds < 30
    assert run.returncode == 2
    assert "Rank 1 of 2 was killed by SIGKILL; the others were stopped." in run.stderr


@pytest.mark.turns(6)
def test_a_rank_that_is_stopped_stops_the_run_with_one_line(place):
    """It hears no other signal than SIGKILL."""
    run, seconds = ended(place, signal.SIGSTOP, "stopped")
    assert seconds < 30
    assert run.returncode == 2
    assert run.stderr.count("Rank 1 of 2 stopped: no sign of life for") == 1, run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.turns(6)
def test_the_next_run_goes_on_and_two_ranks_give_the_numbers_of_one_process(place, killed):
    alone(place / "study.yaml", place / "one")
    done = command("run", place / "study.yaml", "--out", place / "two", "--processes", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote") == 1, done.stdout
    assert "fkernel show" in done.stdout
    assert "fkernel ask" not in done.stdout  # there is no workspace to ask
    compared(place / "one", place / "two", 1e-11)


@pytest.mark.turns(8)
def test_under_torchrun_the_demos_plan_gives_the_demos_numbers(tmp_path):
    plan = demo_plan(prepare(TINY, tmp_path / "cache"), tmp_path / "out").record()
    plan["requests"][0]["batch_size_prompts"] = 6
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(plan))
    alone(tmp_path / "demo.yaml", tmp_path / "one")
    done = command("run", tmp_path / "demo.yaml", "--out", tmp_path / "two", start=TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote") == 1, done.stdout
    compared(tmp_path / "one", tmp_path / "two", 1e-4)


@pytest.mark.turns(6)
def test_an_error_is_one_line_of_one_rank(place):
    plan = yaml.safe_load((place / "study.yaml").read_text()) | {"parameters": ["nothing*"]}
    (place / "wrong.yaml").write_text(yaml.safe_dump(plan))
    done = command("run", place / "wrong.yaml", "--out", place / "wrong", "--processes", "2")
    assert done.returncode == 2
    assert done.stderr.count("names none of the") == 1
    assert "Traceback" not in done.stderr
    assert not (place / "wrong" / "results.json").exists()


def _rank(launcher: int, rank: int) -> int:
    """Find the process of a rank below a launcher, once it has loaded torch."""
    until = time.monotonic() + 200
    while time.monotonic() < until:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                status, environ = (process / "status").read_text(), (process / "environ").read_text()
                loaded = "libtorch" in (process / "maps").read_text()
            except OSError:
                continue
            if f"PPid:\t{launcher}\n" in status and f"\0RANK={rank}\0" in f"\0{environ}" and loaded:
                return int(process.name)
        time.sleep(0.1)
    raise AssertionError(f"rank {rank} never started")
