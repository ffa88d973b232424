"""`fkernel run PLAN --processes 2` gives what one process gives, writes once, and stops with one line if one dies."""

from __future__ import annotations

import json
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

from tests.study.conftest import MAX_NORM, made

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
COMMAND = [sys.executable, "-c", "import sys; sys.argv[0] = 'fkernel'; from fkernel.cli import app; app()"]
DRAWN = {
    "kind": "update",
    "batch_size_prompts": 3,
    "completions_per_prompt": 3,
    "reward": "tests.study.conftest.brevity",
}


def command(*arguments: Any, **env: str) -> subprocess.CompletedProcess[str]:
    environment = ENVIRONMENT | env
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=280, env=environment, check=False
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ranks")
    run = made(place / "training")
    for dtype in ("float64", "float32"):
        plan = run.plan(place / "out", numerics={"dtype": dtype, "microbatch": 2})
        plan |= {"update": DRAWN, "step": {"max_norm": MAX_NORM}}
        plan["requests"] += [{"kind": "update", "name": "self"}]
        (place / f"{dtype}.yaml").write_text(yaml.safe_dump(plan))
    return place


def arrays(out: Path) -> dict[str, np.ndarray]:
    with np.load(out / "kernel.npz") as stored:
        return {name: stored[name] for name in stored.files if stored[name].dtype.kind == "f"}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-11), ("float32", 1e-4)])
def test_two_ranks_give_the_numbers_of_one_process(place, dtype, tolerance):
    plan, alone, ranks = place / f"{dtype}.yaml", place / f"{dtype}-1", place / f"{dtype}-2"
    for out, more in ((alone, []), (ranks, ["--processes", "2"])):
        done = command("run", plan, "--out", out, *more)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Wrote") == 1, done.stdout
    one, two = arrays(alone), arrays(ranks)
    assert one.keys() == two.keys()
    for name, expected in one.items():
        size = max(float(np.linalg.norm(np.nan_to_num(expected))), 1e-3 if "remainder" in name else 1e-6)
        error = float(np.linalg.norm(np.nan_to_num(two[name] - expected)))
        assert error <= tolerance * size, (name, error / size)
    written = [{path.name for path in out.iterdir()} for out in (alone, ranks)]
    assert written[0] - written[1] == {"workspace"}  # over ranks U's gradients stay in memory


def test_an_error_is_one_line_of_one_rank(place):
    plan = yaml.safe_load((place / "float32.yaml").read_text()) | {"parameters": ["nothing*"]}
    (place / "wrong.yaml").write_text(yaml.safe_dump(plan))
    done = command("run", place / "wrong.yaml", "--out", place / "wrong", "--processes", "2")
    assert done.returncode == 2
    assert done.stderr.count("names none of the") == 1
    assert "Traceback" not in done.stderr
    assert not (place / "wrong" / "results.json").exists()


def test_a_rank_that_is_killed_stops_the_run_and_the_next_run_goes_on(place):
    out = place / "killed"
    arguments = [*COMMAND, "run", str(place / "float64.yaml"), "--out", str(out), "--processes", "2"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as run:
        victim = _rank(run.pid, 1)
        start = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        _, told = run.communicate(timeout=60)
        assert time.monotonic() - start < 30
    assert run.returncode == 2
    assert "Rank 1 of 2 was killed by SIGKILL; the others were stopped." in told
    assert not (out / "results.json").exists()
    assert command("run", place / "float64.yaml", "--out", out, "--processes", "2").returncode == 0
    assert json.loads((out / "results.json").read_text())["requests"]


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
