"""Beside ExPLAIND (Eichin et al., arXiv 2505.20076; PyPI `explaind` 0.0.2): one run that both account for.

The run is its own modular-addition transformer, trained by its own wrapper of AdamW from the first step, as its method
needs. Both explain every output log p(class | x) of some test inputs, and credit every training example, momentum
included. Its path kernel takes 100 points a step. CPU time, one thread and one process each.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.environment import ROOT
from fkernel.engine import RunAccount, RunStep, account
from fkernel.precond import AdamWState
from fkernel.shapes import Tensor, Tree

PYTHON = ROOT / ".venv-peers" / "bin" / "python"
STEPS = 16
TARGET = 20.0
"""How many times cheaper, at no larger error."""
UNUSED = "positional_encoding.pe"
MISSING = "ExPLAIND is not measured: it is not in .venv-peers, which `make peers` sets up."


def available() -> bool:
    """Tell whether ExPLAIND can be imported where peers are."""
    command = [str(PYTHON), "-c", "import explaind.epk_model"]
    return PYTHON.exists() and subprocess.run(command, capture_output=True, check=False).returncode == 0


def log_p(params: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Its `SingleLayerTransformerClassifier`: log p of one class each, [n] of inputs [n 4] and classes [n]."""
    x, classes = batch
    h = F.embedding(x, params["input_emb.weight"]) * params["input_emb.weight"].shape[1] ** 0.5
    heads = list[Tensor]()
    for i in "1234":
        z = F.linear(h, params[f"head{i}_encoder.weight"])
        a = torch.softmax(z @ z.mT / z.shape[-1] ** 0.5, -1) @ z
        heads.append(F.linear(a, params[f"head{i}_decoder.weight"]))
    h = torch.stack(heads).sum(0)
    inner = F.relu(F.linear(h, params["linear1.weight"], params["linear1.bias"]))
    h = h + F.relu(F.linear(inner, params["linear2.weight"], params["linear2.bias"]))
    logits = F.linear(h, params["decoder.weight"])[:, -1]
    return logits.log_softmax(-1).gather(-1, classes[:, None])[:, 0]


def steps_of(run: dict[str, Any]) -> Iterator[RunStep]:
    """The run's steps, last first."""
    used = [name for name in run["params"][0] if name != UNUSED]
    β1, β2 = run["options"]["betas"]

    def each(value: Any) -> dict[str, Any]:
        return dict.fromkeys(used, value)

    for t in reversed(range(len(run["params"]) - 1)):
        here, after, kept = run["params"][t], run["params"][t + 1], run["states"][t]
        moments = {
            key: {n: kept[key].get(f"model.{n}", torch.zeros_like(here[n])) for n in used}
            for key in ("exp_avg", "exp_avg_sq")
        }
        state = AdamWState(
            step=each(t), **moments, lr=each(run["options"]["lr"]), beta1=each(β1), beta2=each(β2), eps=each(1e-8),
            weight_decay=each(run["options"]["weight_decay"]),
        )  # fmt: skip
        x, y = run["batches"][t]["X"], run["batches"][t]["y"]
        params = {n: here[n] for n in used}
        delta = {n: after[n] - here[n] for n in used}
        yield RunStep(log_p, params, (x, y), torch.full((len(x),), 1 / len(x)), state, delta=delta)


def ours(run: dict[str, Any], path: Any) -> tuple[RunAccount, float]:
    """Account for the run: every class of every test input; and CPU seconds."""
    tests, classes = run["tests"], run["params"][0]["decoder.weight"].shape[0]
    E = (tests.repeat_interleave(classes, 0), torch.arange(classes).repeat(len(tests)))
    begun = time.process_time()
    made = account(log_p, E, [*steps_of(run)], path=path, microbatch=64)
    return made, time.process_time() - begun


def measured(steps: int = STEPS) -> list[dict[str, Any]]:
    """Runs at its own learning rate, and at a tenth."""
    return [_measured(steps, lr) for lr in (1e-3, 1e-4)]


def _measured(steps: int, lr: float) -> dict[str, Any]:
    """Let both account for one run; errors of the sum over the realised change, and times."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(PYTHON), "-m", "benchmarks.runs_explaind_side", folder, str(steps), str(lr)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"ExPLAIND's side failed:\n{done.stderr[-2000:]}")
        run, theirs = (torch.load(Path(folder) / name, weights_only=True) for name in ("run.pt", "theirs.pt"))
    first, after = theirs[0], theirs[0]["after"]
    change = (after - first["before"]).double()
    rows = [
        {
            "method": f"ExPLAIND, {own['points']} points a step",
            "error": float((own["predicted"].double() - after).norm() / change.norm()),
            "seconds": own["seconds"],
        }
        for own in theirs
    ]
    credited = torch.stack([*first["attributed"].values()]).sum(0).reshape(change.numel(), -1)
    credited = credited / len(run["batches"][0]["X"])
    for path in ("midpoint", "gauss2"):
        ours(run, path)  # warms up
        made, seconds = ours(run, path)
        left = made.remainder.norm() + made.unexplained.norm()
        rows.append(
            {
                "method": f"fkernel, {path}",
                "error": float(left / made.realised.norm()),
                "seconds": seconds,
                "cheaper": first["seconds"] / seconds,
                "realised_differs": float((made.realised.reshape(change.shape) - change).norm() / change.norm()),
                "credit_differs": float((by_example(made, run) - credited).norm() / credited.norm()),
            }
        )
    sizes: dict[str, Any] = {
        "lr": lr,
        "steps": len(run["params"]) - 1,
        "outputs": change.numel(),
        "batch": len(run["batches"][0]["X"]),
    }
    return {**sizes, "parameters": sum(x.numel() for x in run["params"][0].values()), "rows": rows}


def by_example(made: RunAccount, run: dict[str, Any]) -> Tensor:
    """Contributions by training example, [n_E n], over all steps that it was in."""
    n = 1 + max(int(batch["indices"].max()) for batch in run["batches"])
    total = torch.zeros(len(made.realised), n, dtype=torch.float64)
    for C, batch in zip(made.contributions, run["batches"], strict=False):
        total.index_add_(1, batch["indices"], C)
    return total
