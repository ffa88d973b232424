"""`python -m benchmarks.calibration`: does the account of a real step add up, is each optimizer's step the real one?

    steps        steps of TRL's own trainer, as it saved them: what the exact step leaves, what arithmetic did, and what
                 is left with it; under bfloat16 autocast from the recorded passes and from a batch without a recording,
                 in pure bfloat16, and for losses that are explained from token weights alone
    optimizers   every optimizer against its own class: the exact step, its parts, and the executed one
    floor        the rounding floor against differences between float32 and float64, on the demo's policy

Results and environment go to benchmarks/results/calibration.json, the tables to docs/calibration.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import ROOT, environment
from fkernel import precond
from fkernel.checkpoint import optimizer_state, stored_optimizer_state
from fkernel.demo import prepare, seeded
from fkernel.demo.explain import demo_plan
from fkernel.rollout import save_batch
from fkernel.study import FisherKernelRunner
from fkernel.study.workspace import tokens_of
from fkernel.tree import cast
from tests.optimizers import real
from tests.study.trl_run import Asked, held_out, recorded_microbatches, token_weights, trained, update_batch

RESULTS = ROOT / "benchmarks" / "results" / "calibration.json"
PAGE = ROOT / "docs" / "calibration.md"
AT = 4
DEFAULTS = (("bf16", True), ("gradient_checkpointing", True))
TWICE = (("num_iterations", 2), ("steps_per_generation", 1))
FULL, LORA = Asked("dapo", False, "cosine", 1e-4, max_norm=0.1), Asked("dapo", True, "linear", 3e-4, max_norm=0.1)
PURE = FULL._replace(schedule="constant", dtype="bfloat16")
STEPS: dict[str, Asked] = {
    "full, float32": FULL,
    "LoRA, float32": LORA,
    "full, TRL's defaults (bf16 autocast)": FULL._replace(options=DEFAULTS),
    "LoRA, TRL's defaults (bf16 autocast)": LORA._replace(options=DEFAULTS),
    **{f"pure bf16, lr {lr:g}": PURE._replace(peak=lr) for lr in (1e-6, 1e-5, 1e-4)},
    "CISPO, second inner epoch": FULL._replace(rule="cispo", options=(*TWICE, ("epsilon_high", 1.2))),
    "SAPO with a KL penalty": FULL._replace(rule="sapo", options=(*TWICE, ("beta", 0.05))),
    "GRPO, top entropies and bonus": FULL._replace(
        rule="grpo", options=(*TWICE, ("top_entropy_quantile", 0.5), ("entropy_coef", 0.01))
    ),
}  # fmt: skip
WEIGHTS = {"cispo": "dapo", "sapo": "grpo"}
"""Rules whose loss weights records carry beside ω; nothing reads them where ω is given."""
QUICK = ("full, TRL's defaults (bf16 autocast)", "pure bf16, lr 0.0001")
TARGETS = {"recorded": 1e-3, "drawn": 1e-2}


def steps(names: Mapping[str, Asked]) -> list[dict[str, Any]]:
    """Explain one step of each run: shares of the realised change."""
    return [row for name, spec in names.items() for row in _explained(name, spec)]


def _explained(name: str, spec: Asked) -> list[dict[str, Any]]:
    at = AT + 1 if TWICE[0] in spec.options else AT
    autocast = dict(spec.options).get("bf16")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        place = Path(folder)
        run = trained(place, spec)
        run = run._replace(spec=spec._replace(rule=WEIGHTS.get(spec.rule, spec.rule)))
        drawn, E = update_batch(run, at), held_out(run, at)
        recorded = token_weights(run, at, drawn)
        rows = []
        for kind, batch in (("recorded", recorded), ("drawn", drawn)):
            if kind == "drawn" and not autocast:
                continue
            save_batch(batch, place / kind)
            step: dict[str, Any] = {"loss": {"kind": "token_weights"}} if kind == "recorded" else {}
            step["microbatches"] = recorded_microbatches(run, at, batch) if kind == "recorded" else len(batch)
            if autocast:
                step["autocast"] = "bfloat16"
            plan = run.plan(at, place / kind, E, analyses={"ledger": True})
            results = FisherKernelRunner({**plan, "step": {**plan["step"], **step}}).run()
            rows.append({"run": name, "from": kind, **_shares(results)})
    return rows


def _shares(results: Any) -> dict[str, Any]:
    """What the exact step leaves, what arithmetic did, and what is left with it, over the realised change."""
    ledger = results["held_out"].analysis("ledger")
    size = float(np.linalg.norm(ledger["realised"]))
    arithmetic = ledger.arrays.get("arithmetic", np.zeros_like(ledger["realised"]))
    left = ledger["unexplained"] + ledger["remainder"]

    def share(values: np.ndarray) -> float:
        return float(np.linalg.norm(values)) / size

    return {
        "exact_leaves": share(left + arithmetic),
        "arithmetic": share(arithmetic),
        "unexplained": share(ledger["unexplained"]),
        "remainder": share(ledger["remainder"]),
        "left": share(left),
        "floor": share(ledger["floor"]),
        "moved": results.step.get("moved"),
        "audit": results.step["audit"]["verdict"],
    }


def optimizers() -> list[dict[str, Any]]:
    """Hold every optimizer of torch and transformers against its own class, in float64 and in bfloat16."""
    rows, before, rounded = [], torch.get_default_dtype(), torch.Tensor.bfloat16
    for name, (make, options, shapes) in real.TORCH.items():
        torch.set_default_dtype(torch.float64)
        torch.Tensor.bfloat16 = torch.Tensor.clone  # Muon orthogonalises in it, whatever its weights are in
        try:
            step = real.taken(make, options, shapes)
            state = optimizer_state(step.state_dict, step.before)
            parts = precond.optimizer_step(step.before, {**step.grads}, state)
            P = precond.response(state, {**step.grads}, step.before)
            of_g = P({n: -leaf for n, leaf in step.grads.items()})
            summed = {n: of_g[n] + parts.momentum[n] + parts.decay[n] for n in of_g}
        finally:
            torch.set_default_dtype(before)
            torch.Tensor.bfloat16 = rounded
        row = {"optimizer": name, "exact": _apart(parts.total, step.delta), "parts": _apart(summed, step.delta)}
        if not isinstance(options.get("lr"), torch.Tensor) and "foreach" not in name:
            large = {n: shape for n, shape in real.LARGE.items() if n in shapes}
            half = real.taken(make, options, large, torch.bfloat16)
            stored = stored_optimizer_state(half.state_dict, half.before)
            executed = precond.executed_step(half.before, {**half.grads}, stored)
            row |= {"executed": _apart(executed.delta, half.delta), "moved": executed.moved}
        rows.append(row)
    return rows + [_quantised(name) for name in QUANTISED]


QUANTISED = ("AdamW", "AdamW8bit", "PagedAdamW8bit", "Lion", "Lion8bit")


def _quantised(name: str) -> dict[str, Any]:
    """One of bitsandbytes' optimizers, on its CPU kernels."""
    import bitsandbytes

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # paged states are plain ones on a CPU
        step = real.taken(getattr(bitsandbytes.optim, name), real.LIKELY, real.LARGE, torch.float32)
    state = optimizer_state(step.state_dict, step.before)
    parts = precond.optimizer_step(step.before, {**step.grads}, state)
    stored = stored_optimizer_state(step.state_dict, step.before)
    executed = precond.executed_step(step.before, {**step.grads}, stored)
    P = precond.response(state, {**step.grads}, step.before)({n: -leaf for n, leaf in step.grads.items()})
    summed = {n: P[n] + parts.momentum[n] + parts.decay[n] for n in P}
    apart = {"exact": _apart(parts.total, step.delta), "parts": _apart(summed, parts.total)}
    moved = executed.moved
    return {
        "optimizer": f"bitsandbytes {name}",
        **apart,
        "executed": _apart(executed.delta, step.delta),
        "moved": moved,
    }


def _apart(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """The largest difference, beside the largest entry."""
    return max(float((one[n].double() - leaf.double()).abs().max() / leaf.abs().max()) for n, leaf in other.items())


def floor(seed: int = 0) -> dict[str, Any]:
    """Hold the floor of the demo's policy against float32's distance from float64."""
    with tempfile.TemporaryDirectory() as folder:
        plan = demo_plan(prepare(seeded(seed)), Path(folder), seed)
        request = next(one for one in plan.requests if one.kind == "evaluation")
        storage = plan.storage.model_copy(update={"persist": False, "pictures": False})
        runner = FisherKernelRunner(plan.model_copy(update={"requests": (request,), "storage": storage}))
        ledger = runner.run()[str(request.name)].analysis("ledger")
        policy, E = runner.policy, tokens_of(runner._batches[str(request.name)], runner.policy.params)
        assert policy.after is not None
        before, after = (policy.f(cast(end, torch.float64), E) for end in (policy.params, policy.after))
        ratio = np.abs(ledger["realised"] - (after - before).detach().numpy()) / ledger["floor"]
        seen = float(np.sqrt(np.mean(ratio**2)))
        return {"sequences": len(ratio), "scale": ledger.facts["floor_scale"], "seen_over_floor": seen}


HEAD = """# Calibration

Real steps, and how much of them an account leaves; made by `make calibration` ({date}, {cpu}, torch {torch}).

## Steps of TRL's trainer

Sizes relative to the realised change of held-out sequences. *Exact leaves*: what the step in real numbers leaves.
*Left*: what remains beside [what arithmetic did](accounting.md), unexplained and remainder together. *From*: whether U
has the recorded token weights and passes, or is the batch alone.

| run | from | exact leaves | arithmetic | left | floor | weights that moved | audit |
|---|---|---|---|---|---|---|---|
"""
STEP = "| {run} | {of} | {exact_leaves:.3%} | {arithmetic:.3%} | {left:.3%} | {floor:.3%} | {share} | {audit} |\n"
OPTIMIZERS = """
## Optimizers

Largest difference from the real optimizer's step beside its largest move: of the exact step and of the sum of its parts
in float64, and of the executed step on bfloat16 weights and moments. bitsandbytes' in float32, whose weights' own
rounding is what its exact step is apart.

| optimizer | exact step | parts add up | executed in bfloat16 | weights that moved there |
|---|---|---|---|---|
"""
FLOOR = """
## The rounding floor

On the demo's policy, {sequences} sequences: float32 is {seen_over_floor:.2f} floors away from float64 (root mean
square); the floor's measured scale is {scale:.2f}.
"""


def page(results: Mapping[str, Any]) -> str:
    """The tables of what was measured."""
    text = HEAD.format(**results["environment"])
    for row in results["steps"]:
        moved = "all" if row["moved"] is None else f"{row['moved']:.1%}"
        text += STEP.format(**row, of=row["from"], share=moved)
    text += OPTIMIZERS
    for row in results["optimizers"]:
        executed = f"{row['executed']:.1e} | {row['moved']:.0%}" if "executed" in row else "– | –"
        text += f"| {row['optimizer']} | {row['exact']:.1e} | {row['parts']:.1e} | {executed} |\n"
    return text + (FLOOR.format(**results["floor"]) if "floor" in results else "")


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description="Hold accounts of real steps against what happened.")
    parser.add_argument("--quick", action="store_true", help="two runs, and nothing is written")
    quick = parser.parse_args().quick
    chosen = {name: STEPS[name] for name in QUICK} if quick else STEPS
    results: dict[str, Any] = {"environment": environment(), "steps": steps(chosen), "optimizers": optimizers()}
    if not quick:
        results["floor"] = floor()
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        PAGE.write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
