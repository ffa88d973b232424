"""Peak memory of one callable, in a process of its own: `python -m benchmarks.memory NAME --sizes n=8,T=256`.

Inside one process the allocator keeps what an earlier callable asked for, so peaks can only be compared across
processes. Model and batch are built before the first reading: what is reported is what the call adds, ids excluded.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.limits import MICROBATCH, plain_backward
from benchmarks.models import THREADS, build
from fkernel import Strategy, explain_step, func, influence, kernel, precond
from fkernel.engine.planning import rates

ROOT = Path(__file__).resolve().parent.parent
MB = 1e6


class Peak(NamedTuple):
    """Memory of one process, in MB: held before the call, and at most during it."""

    name: str
    sizes: dict[str, Any]
    before: float
    peak: float

    @property
    def grown(self) -> float:
        """MB that the call added."""
        return self.peak - self.before


def rows(shape: str = "base", n: int = MICROBATCH, T: int = 256) -> Callable[[], Any]:
    """J of one microbatch."""
    subject = build(shape)
    batch, J = subject.batch(n, T), func.per_sequence_grad(subject.f, MICROBATCH)
    return lambda: J(subject.params, batch)


def backward(shape: str = "base", n: int = MICROBATCH, T: int = 256) -> Callable[[], Any]:
    """The same sequences' summed gradient."""
    subject = build(shape)
    batch = subject.batch(n, T)
    return lambda: plain_backward(subject, batch)


def effect(shape: str = "small", n_E: int = MICROBATCH, n_U: int = 64, T: int = 32) -> Callable[[], Any]:
    """Influence of n_U sequences on n_E."""
    subject = build(shape)
    E, U, P = subject.batch(n_E, T, 1), subject.batch(n_U, T, 2), scaled
    weights = torch.ones(n_U)
    return lambda: influence(subject.f, subject.params, E, U, P, weights)


def granted(shape: str = "base", n_E: int = 16, n_U: int = 32, T: int = 128, grant: int = 700) -> Callable[[], Any]:
    """The kernel of n_E × n_U sequences within a grant of so many MB."""
    subject = build(shape)
    E, U = subject.batch(n_E, T, 1), subject.batch(n_U, T, 2)
    diagonal = precond.diagonal({name: 1.0 / (leaf.abs() + 0.1) for name, leaf in subject.params.items()})
    rates()  # measured once on a machine, and not part of any kernel
    return lambda: kernel(subject.f, subject.params, E, U, diagonal, memory=int(grant * MB))


def granted_influence(
    shape: str = "base", n_E: int = 16, n_U: int = 32, T: int = 128, grant: int = 700
) -> Callable[[], Any]:
    """The influence of n_U sequences on n_E within a grant of so many MB."""
    subject = build(shape)
    E, U, weights = subject.batch(n_E, T, 1), subject.batch(n_U, T, 2), torch.ones(n_U)
    return lambda: influence(subject.f, subject.params, E, U, scaled, weights, memory=int(grant * MB))


def granted_step(
    shape: str = "base", n_E: int = 16, n_U: int = 32, T: int = 128, grant: int = 700
) -> Callable[[], Any]:
    """One step on n_U sequences explained for n_E, within a grant of so many MB."""
    subject = build(shape)
    E, U, weights, state = subject.batch(n_E, T, 1), subject.batch(n_U, T, 2), torch.ones(n_U), subject.adamw_state()
    rates()
    return lambda: explain_step(subject.f, subject.params, E, U, weights, state, memory=int(grant * MB))


def long_kernel(
    shape: str = "half-billion", n_E: int = 4, n_U: int = 8, T: int = 2048, every: int = 1
) -> Callable[[], Any]:
    """The kernel of n_E × n_U long sequences, layer by layer; of how many layer inputs one is kept."""
    subject = build(shape)
    E, U = subject.batch(n_E, T, 1), subject.batch(n_U, T, 2)
    D = precond.diagonal({name: torch.full_like(leaf, 0.5) for name, leaf in subject.params.items()})
    strategy = Strategy("layers", "E", None, None, 0, every)
    return lambda: kernel(subject.f, subject.params, E, U, D, strategy=strategy)


def scaled(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A preconditioner without a memory of its own."""
    return {name: 0.5 * leaf for name, leaf in x.items()}


MEASURED: dict[str, Callable[..., Callable[[], Any]]] = {
    "per_sequence_grad": rows,
    "plain batched backward": backward,
    "influence": effect,
    "kernel within a grant": granted,
    "influence within a grant": granted_influence,
    "explain_step within a grant": granted_step,
    "kernel of long sequences": long_kernel,
}


def in_own_process(name: str, sizes: Mapping[str, Any]) -> Peak:
    """Measure in a fresh interpreter."""
    listed = ",".join(f"{key}={value}" for key, value in sizes.items())
    command = [sys.executable, "-m", "benchmarks.memory", name, "--sizes", listed]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"The memory measurement {name!r} ({listed}) failed:\n{done.stderr}")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def measure(name: str, sizes: Mapping[str, Any]) -> Peak:
    """Measure in this process; meaningful once, and before anything large has run."""
    torch.set_num_threads(THREADS)
    call = MEASURED[name](**sizes)
    _forget_peak()
    before = _status("VmRSS") or _high_water()
    call()
    return Peak(name, dict(sizes), before, _status("VmHWM") or _high_water())


def slope(peaks: list[Peak], size: str = "n_U") -> float:
    """MB of peak for each further sequence: the least-squares line through the processes' peaks.

    Example:
        >>> slope([Peak("influence", {"n_U": n}, before=100.0, peak=300.0 + 0.5 * n) for n in (64, 256, 1024)])
        0.5
    """
    x = [float(peak.sizes[size]) for peak in peaks]
    y = [peak.grown for peak in peaks]
    centre_x, centre_y = sum(x) / len(x), sum(y) / len(y)
    along = sum((a - centre_x) * (b - centre_y) for a, b in zip(x, y, strict=True))
    return along / sum((a - centre_x) ** 2 for a in x)


def _forget_peak() -> None:
    """Ask the kernel to restart the high-water mark, which the imports may have set; elsewhere it stays."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _status(field: str) -> float | None:
    """Read a size in MB from Linux's account of this process."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 / MB for line in lines if line.startswith(f"{field}:")), None)


def _high_water() -> float:
    """ru_maxrss: kilobytes on Linux, bytes on macOS."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=MEASURED)
    parser.add_argument("--sizes", default="", help="shape=base,n=8,T=256")
    given = parser.parse_args()
    pairs = [pair.split("=") for pair in given.sizes.split(",") if pair]
    sizes = {key: value if key == "shape" else int(value) for key, value in pairs}
    print(json.dumps(measure(given.name, sizes)._asdict()))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
