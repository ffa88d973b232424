"""`python -m tests.formats [NAME …]`: write runs with the trainers' own packages and pack them for the tests.

A name may be a beginning: `deepspeed_` means all of that writer.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from tests.formats import modules
from tests.formats.archives import pack


def write(name: str, processes: int) -> None:
    """Run one writer on its ranks and pack what it left."""
    with tempfile.TemporaryDirectory() as place:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *launcher, "-m", "tests.formats.run", name, place]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
        archive = pack(Path(place), name)
    print(f"{name}: {archive.stat().st_size / 1000:.0f} kB", flush=True)


def main() -> None:
    """Write the runs that are asked for, or all."""
    wanted = tuple(sys.argv[1:]) or ("",)
    for module in modules():
        if not any(each.startswith(module[: len(each)]) or each.startswith(f"{module}_") for each in wanted):
            continue
        for name, processes in import_module(f"tests.formats.writers.{module}").RUNS.items():
            if name.startswith(wanted):
                write(name, processes)


if __name__ == "__main__":
    main()
