"""From the prepared directory to finished results: the last step, explained and held against what it really did."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

import fkernel as fk
from fkernel import func
from fkernel.checkpoint import load_adamw_state, load_model
from fkernel.demo.cache import versions
from fkernel.demo.progress import silent
from fkernel.demo.records import Record, read_json, read_records
from fkernel.func import Objective, Sequences
from fkernel.study import SequenceInfo, StepResults

MICROBATCH = 16


def explain(directory: Path, progress: Progress | None = None) -> StepResults:
    """Explain the last step of a prepared directory.

    Args:
        directory: what `prepare` returned.
        progress: where to draw; nothing is drawn without it.

    Returns:
        Predicted effects of the step on every sequence of E, and the change that `optimizer.step()` really made.

    Raises:
        FKernelError: the directory's files do not fit each other.
    """
    facts = read_json(directory / "step.json")
    update, evaluation = (read_records(directory / name) for name in ("update.json", "evaluation.json"))
    U, E = _batch(update), _batch(evaluation)
    apply, params = func.make_functional(load_model(directory / "model"))
    _, after = func.make_functional(load_model(directory / "after" / "model"))
    state = load_adamw_state(directory / "optimizer.pt", params)
    weights = torch.tensor([_given(r.weight) * _given(r.advantage) for r in update])

    progress = progress or silent()
    S = func.sequence_logprob(apply, facts["temperature"])
    bar = progress.add_task("explaining the last step", total=_passes(len(E.input_ids), len(U.input_ids)))
    watched = _watched(S, lambda: progress.advance(bar))
    effect, _ = fk.explain_step(
        watched, params, E, U, weights, state, max_norm=facts["max_norm"], microbatch=MICROBATCH
    )
    realised = fk.realised_change(watched, params, after, E, microbatch=MICROBATCH)
    progress.update(bar, completed=_passes(len(E.input_ids), len(U.input_ids)))

    step = {key: facts[key] for key in ("steps_before", "lr", "weight_decay", "temperature", "max_norm")}
    step |= {"clip": effect.clip, "grad_norm": effect.grad_norm, "parameters": facts["parameters"]}
    step |= {"accuracy_before_rl": facts["accuracy_before_rl"], "groups_with_signal": facts["groups_with_signal"]}
    return StepResults(
        evaluation=_infos(evaluation, S(params, E).tolist()),
        update=_infos(update, S(params, U).tolist()),
        kernel=effect.kernel.numpy(),
        contributions=effect.contributions.numpy(),
        momentum=effect.momentum.numpy(),
        decay=effect.decay.numpy(),
        curvature=effect.curvature.numpy(),
        realised=realised.numpy(),
        step=step,
        environment=_environment(),
    )


def _batch(records: Sequence[Record]) -> Sequences:
    prompts, responses = zip(*((r.sample.prompt_ids, r.sample.response_ids) for r in records), strict=True)
    return func.pad(prompts, responses)


def _given(value: float | None) -> float:
    if value is None:
        raise ValueError("An update record lacks its advantage or its loss weight; delete the cached directory.")
    return value


def _infos(records: Sequence[Record], logprobs: list[float]) -> tuple[SequenceInfo, ...]:
    return tuple(
        SequenceInfo(r.sample.id, r.sample.problem.prompt, r.sample.text, S, r.sample.reward, r.advantage, r.weight)
        for r, S in zip(records, logprobs, strict=True)
    )


def _watched(f: Objective, tick: Callable[[], Any]) -> Objective:
    """The same function; `tick` is called whenever it is evaluated on a microbatch."""

    def fn(params: Any, batch: Any) -> Any:
        tick()
        return f.fn(params, batch)

    return replace(f, fn=fn)


def _passes(n_E: int, n_U: int) -> int:
    """Microbatches of one explanation: U in vjp and K; E in K, two jvps, the curvature and twice realised."""
    return 2 * math.ceil(n_U / MICROBATCH) + 6 * math.ceil(n_E / MICROBATCH)


def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "fkernel": fk.__version__,
        **versions(),
    }
