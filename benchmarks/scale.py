"""`python -m benchmarks.scale`: half a billion parameters, thousands of sequences, and what an estimate is worth.

    large     Qwen2.5-0.5B's shape, all of its 494M parameters (tied, random, fp32): K, C and influence of 32 × 16
              sequences of 128 tokens within 8 GiB, against one plain batched backward pass over the same 48 sequences
              and the ideal GEMM; entries are checked against plain autograd
    long      the same shape, 4 × 8 sequences of 2048 tokens, layer by layer, beside the parameters and P; against plain
              passes over the same sequences with fused attention and layer checkpointing
    many      the demo policy's shape: influence of up to 4096 sequences on 1024, and what a further one takes of memory
    curves    time and memory of a kernel against n_U, n_E, T and P (`benchmarks.curves`); benchmarks/results/curves.png
    planner   `fkernel.estimate` against what happens, over a grid of cases (`benchmarks.planner`)

Every measurement is made in a process of its own; results and environment go to benchmarks/results/scale.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import curves, memory, planner
from benchmarks.environment import ROOT, environment
from benchmarks.limits import chunks, plain_backward
from benchmarks.models import THREADS, build, model_of
from fkernel import estimate, influence, kernel, precond, tree
from fkernel.engine.recycling import reuse_memory

RESULTS = ROOT / "benchmarks" / "results" / "scale.json"
LARGE = {"shape": "half-billion", "n_E": 16, "n_U": 32, "T": 128, "memory": "8GiB", "checked": 24}
QUICK = {"shape": "small", "n_E": 4, "n_U": 8, "T": 64, "memory": "200MB", "checked": 6}
MANY = (512, 1024, 2048, 4096)
LONG = {"shape": "half-billion", "n_E": 4, "n_U": 8, "T": 2048}
LONG_QUICK = {"shape": "tiny", "n_E": 1, "n_U": 2, "T": 1100}
ACCURACY = 1e-4


def limit(shape: str, n_E: int, n_U: int, T: int, **_: Any) -> dict[str, Any]:
    """Time one plain batched backward pass over both sides, and the ideal GEMM.

    The pass gets what the engine gets: warm memory that microbatches hand on, and the better of two microbatches.
    """
    subject = build(shape)
    E, U = subject.batch(n_E, T, 1), subject.batch(n_U, T, 2)
    times = {}
    with reuse_memory():
        for microbatch in (4, 8):
            plain_backward(subject, subject.batch(microbatch, T), microbatch)
            times[microbatch], _ = _timed(lambda m=microbatch: [plain_backward(subject, side, m) for side in (E, U)])
    best = min(times, key=lambda m: times[m])
    return {"backward_s": times[best], "microbatch": best, "gemm_s": _gemm(n_E, n_U, subject.size)}


def large(shape: str, n_E: int, n_U: int, T: int, memory: str, checked: int) -> dict[str, Any]:
    """Time K and influence within a grant, with what they add to the process, and check entries against autograd."""
    subject = build(shape)
    E, U = subject.batch(n_E, T, 1), subject.batch(n_U, T, 2)
    P = precond.diagonal({name: 1.0 / (leaf.abs() + 0.1) for name, leaf in subject.params.items()})
    weights = torch.linspace(-1, 1, n_U)
    with tempfile.TemporaryDirectory(dir=RESULTS.parent) as disk:
        grant: dict[str, Any] = {"memory": memory, "store": disk}
        start = time.perf_counter()
        found = estimate(subject.f, subject.params, E, U, P, **grant)
        estimate_s = time.perf_counter() - start
        assert found.chosen is not None, found.reason
        kernel(subject.f, subject.params, subject.batch(1, T), subject.batch(1, T, 3), P)  # first use of everything
        _forget_peak()
        before = _status("VmRSS")  # model, preconditioner and batches, and what a first use of everything leaves
        kernel_s, K = _timed(lambda: kernel(subject.f, subject.params, E, U, P, **grant))
        kernel_MB = _status("VmHWM") - before
    _forget_peak()
    before = _status("VmRSS")
    influence_s, effect = _timed(lambda: influence(subject.f, subject.params, E, U, P, weights, memory=memory))
    influence_MB = _status("VmHWM") - before
    return {
        "parameters": subject.size,
        "strategy": found.chosen.strategy._asdict(),
        "estimate_s": estimate_s,
        "predicted_s": found.chosen.seconds,
        "predicted_MB": found.chosen.memory / 1e6,
        "disk_MB": found.chosen.disk / 1e6,
        "grant_MB": (found.budget or 0) / 1e6,
        "kernel_s": kernel_s,
        "kernel_MB": kernel_MB,
        "influence_s": influence_s,
        "influence_MB": influence_MB,
        "influence_against_C": float(((K * weights).sum(1) - effect).norm() / effect.norm()),
        "checked": checked,
        "worst_entry": _worst_entry(subject, E, U, P, K, checked),
    }


def long(shape: str, n_E: int, n_U: int, T: int) -> dict[str, Any]:
    """Time a kernel of long sequences, with what it adds to the process and what was forecast."""
    subject = build(shape)
    E, U = subject.batch(n_E, T, 1), subject.batch(n_U, T, 2)
    P = precond.diagonal({name: 1.0 / (leaf.abs() + 0.1) for name, leaf in subject.params.items()})
    chosen = estimate(subject.f, subject.params, E, U, P).chosen
    assert chosen is not None
    one = subject.batch(1, 1025)
    kernel(subject.f, subject.params, one, one, P)  # first use of everything
    _forget_peak()
    before = _status("VmRSS")
    kernel_s, _ = _timed(lambda: kernel(subject.f, subject.params, E, U, P))
    return {
        "parameters": subject.size,
        "strategy": chosen.strategy._asdict(),
        "predicted_s": chosen.seconds,
        "predicted_MB": chosen.memory / 1e6,
        "kernel_s": kernel_s,
        "kernel_MB": _status("VmHWM") - before,
    }


def long_limit(shape: str, n_E: int, n_U: int, T: int) -> dict[str, Any]:
    """Time plain passes over the same sequences, one at a time, as one trains on them: sdpa, layer checkpointing."""
    subject, model = build(shape), model_of(shape, "sdpa").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})

    def passes(batch: Any) -> None:
        for ids, _, scored in chunks(batch, 1):
            logprobs = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            (logprobs * scored[:, 1:]).sum().backward()
            model.zero_grad()

    passes(subject.batch(1, 64))
    with reuse_memory():
        return {"backward_s": _timed(lambda: [passes(subject.batch(n, T, n)) for n in (n_E, n_U)])[0]}


def many(n_U: int, n_E: int = 1024, T: int = 32) -> dict[str, Any]:
    """Take the influence of many sequences on many; what it adds to memory is measured from before U is drawn."""
    subject = build("small")
    E, U = subject.batch(n_E, T, 1), subject.batch(n_U, T, 2)
    weights = torch.linspace(-1, 1, n_U)
    influence(subject.f, subject.params, subject.batch(64, T), subject.batch(64, T), memory.scaled, torch.ones(64))
    _forget_peak()
    before = _status("VmRSS")
    seconds, _ = _timed(lambda: influence(subject.f, subject.params, E, U, memory.scaled, weights))
    return {"n_U": n_U, "n_E": n_E, "seconds": seconds, "grown_MB": _status("VmHWM") - before}


def _worst_entry(subject: Any, E: Any, U: Any, P: precond.Diagonal, K: torch.Tensor, checked: int) -> float:
    """Largest |K − autograd| over some entries of the first rows, relative to √(K_ee K_uu)-like scale ‖K‖∞."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in subject.params.items()}

    def gradient(batch: Any, row: int) -> dict[str, torch.Tensor]:
        S = subject.f.fn(leaves, chunks(batch, 1)[row]).sum()
        return dict(zip(leaves, torch.autograd.grad(S, [*leaves.values()]), strict=True))

    worst, n_E, n_U = 0.0, len(E.input_ids), len(U.input_ids)
    rows = [0, n_E // 2]  # two dense gradients of half a billion numbers, and one of U's at a time
    left = [P(gradient(E, e)) for e in rows]
    for u in range(0, n_U, max(1, n_U * len(rows) // checked)):
        right = gradient(U, u)
        for e, g in zip(rows, left, strict=True):
            worst = max(worst, abs(float(K[e, u]) - float(tree.dot(g, right))) / float(K.abs().max()))
    return worst


def _gemm(n: int, m: int, p: int) -> float:
    columns = min(p, 1 << 22)
    x, y = torch.randn(n, columns), torch.randn(m, columns)
    torch.mm(x, y.T)
    return _timed(lambda: torch.mm(x, y.T))[0] * p / columns


def _timed(fn: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = fn()
    return time.perf_counter() - start, result


def _forget_peak() -> None:
    memory._forget_peak()


def _status(field: str) -> float:
    return memory._status(field) or memory._high_water()


RUNS: dict[str, Callable[..., dict[str, Any]]] = {
    "limit": limit,
    "large": large,
    "long": long,
    "long_limit": long_limit,
    "many": many,
    "point": curves.point,
    "planned": planner.planned,
    "run": planner.run,
    "race": planner.race,
}


def in_own_process(part: str, **sizes: Any) -> dict[str, Any]:
    """Run one measurement in a fresh interpreter."""
    command = [sys.executable, "-m", "benchmarks.scale", "--run", part, "--sizes", json.dumps(sizes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{part} {sizes} failed:\n{done.stderr}")
    print(part, json.dumps(sizes), file=sys.stderr, flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_large(quick: bool) -> dict[str, Any]:
    """Half a billion parameters, and the limit."""
    sizes = QUICK if quick else LARGE
    found = {**in_own_process("large", **sizes), **in_own_process("limit", **sizes)}
    return {**found, "ratio": found["kernel_s"] / (found["backward_s"] + found["gemm_s"]), "target": 1.3}


def measure_long(quick: bool) -> dict[str, Any]:
    """Half a billion parameters and thousands of tokens."""
    sizes = LONG_QUICK if quick else LONG
    kernel_run, plain_run = in_own_process("long", **sizes), in_own_process("long_limit", **sizes)
    ratio = kernel_run["kernel_s"] / plain_run["backward_s"]
    return {**sizes, **kernel_run, **plain_run, "ratio": ratio, "target": 1.4, "target_MB": 3.5 * 2**30 / 1e6}


def measure_many(quick: bool) -> dict[str, Any]:
    """Thousands of sequences without K."""
    runs = [in_own_process("many", n_U=n, n_E=64 if quick else 1024) for n in ((32, 64) if quick else MANY)]
    peaks = [memory.Peak("influence", {"n_U": run["n_U"]}, 0.0, run["grown_MB"]) for run in runs]
    return {"runs": runs, "MB_per_sequence": memory.slope(peaks), "target": 0.05}


def measure_curves(quick: bool) -> dict[str, Any]:
    """Time and memory as each size grows."""
    points = {
        name: [in_own_process("point", **{**curves.USUAL, size: value}) for value in values]
        for name, (size, values) in (curves.QUICK if quick else curves.CURVES).items()
    }
    exponents = curves.fitted(points)
    with tempfile.TemporaryDirectory() as folder:
        curves.draw(points, exponents, (Path(folder) if quick else RESULTS.parent) / "curves.png")
    return {"points": points, "exponents": exponents}


def measure_planner(quick: bool) -> dict[str, Any]:
    """Estimates against what happens."""
    rows = [{**case, **in_own_process("planned", **case)} for case in planner.cases(quick)]
    same: dict[str, dict[str, Any]] = {}  # several grants may lead to one form of a strategy
    for row in rows:
        sizes = {key: row[key] for key in ("shape", "n_E", "n_U", "T")}
        forms = same.setdefault(json.dumps(sizes), {})
        forms |= {json.dumps(option["strategy"]): {} for option in row["options"] if option["feasible"]}
    for sizes, forms in same.items():
        strategies = [json.loads(form) for form in forms]
        times = in_own_process(
            "race", **json.loads(sizes), strategies=strategies, rounds=1 if quick else planner.ROUNDS
        )
        for form, seconds in zip(forms, times["measured_s"], strict=True):
            forms[form] = {
                "measured_s": seconds,
                **in_own_process("run", **json.loads(sizes), strategy=json.loads(form)),
            }
    for row in rows:
        forms = same[json.dumps({key: row[key] for key in ("shape", "n_E", "n_U", "T")})]
        for option in row["options"]:
            option |= forms.get(json.dumps(option["strategy"]), {})
    return {**planner.verdict(rows), "rows": rows}


PARTS = {
    "large": measure_large,
    "long": measure_long,
    "many": measure_many,
    "curves": measure_curves,
    "planner": measure_planner,
}


def main() -> None:
    """Measure all parts or one, and save what was found; or make one measurement, for the process that asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="one part; the others' results stay as they are")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing saved")
    parser.add_argument("--run", choices=RUNS, help="one measurement, printed")
    parser.add_argument("--sizes", default="{}", help="its sizes, as JSON")
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    if given.run:
        print(json.dumps(RUNS[given.run](**json.loads(given.sizes))))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in [given.only] if given.only else PARTS:
        found = {"environment": environment(), **PARTS[name](given.quick)}
        print(name, json.dumps({key: value for key, value in found.items() if key != "rows"}, indent=1), flush=True)
        if not given.quick:
            results[name] = found
            RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
