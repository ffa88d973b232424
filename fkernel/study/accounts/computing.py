"""From a recording and probes to the account: states restored, the run swept backwards, its columns named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fkernel import func
from fkernel.analysis import rounding_floor
from fkernel.distributed import Group, from_first, group_of
from fkernel.engine import Sweep, account
from fkernel.errors import PlanError, StoreError
from fkernel.io import check_writable, hash_json, locked, make_directory, parse_bytes
from fkernel.record import Recording, RunSteps, States, fill, training_of
from fkernel.rollout import GeneratedBatch, SampleGenerator, Sampling, dotted, probes_of, read_probes
from fkernel.shapes import Tree
from fkernel.study.accounts.assembly import Taken, assembled, unnamed
from fkernel.study.accounts.results import ACCOUNT, AccountResults
from fkernel.study.accounts.stopped import STATES, KeptSweep, folder_of
from fkernel.study.analyses.observables import OBSERVABLE, Observable, expected_rewards
from fkernel.study.outcome import info_of
from fkernel.study.sources import code_of, own_code
from fkernel.study.workspace import tokens_of

OBSERVABLES = ("logprob", "entropy", "kl", "expected_reward")
AGES = (1, 2, 4, 8, 16, 32)
"""Ages of gradients, in steps, whose share of momentum is told."""
Progress = Callable[[str, int, int], Any]


class Inputs(NamedTuple):
    """What the sweep takes.

    Attributes:
        steps: of the run, last first.
        params: θ before the first step, in the account's dtype.
        apply: the policy.
        probes: E.
    """

    steps: RunSteps
    params: Tree
    apply: Any
    probes: GeneratedBatch


def account_recording(
    recording: Recording | str | Path,
    probes: GeneratedBatch | list[dict[str, Any]] | str | Path,
    out: str | Path,
    *,
    steps: range | None = None,
    path: str = "midpoint",
    observable: str = "logprob",
    memory: int | str | None = None,
    disk: int | str | None = None,
    dtype: str = "float32",
    template: str = "bare",
    p_values: bool = True,
    ages: bool = False,
    device: str = "cpu",
    model: nn.Module | None = None,
    base: str | Path | None = None,
    on_progress: Progress = lambda what, n, total: None,
    mesh: Any = None,
) -> AccountResults:
    """Account for a recorded run: what every sequence of every step did to each probe.

    realised_e = Σ_u contributions_eu + before_e + decay_e + arithmetic_e + unexplained_e + remainder_e     nats

    Args:
        recording: of the run, or its directory.
        probes: what is asked about: a file or directory as `read_probes` takes it, rows of such a file, or a batch.
        out: directory of the account. One that was stopped there goes on; one that is there already is read.
        steps: of the run; None for all of them, from the first snapshot on.
        path: where gradients of probes are evaluated in each step: "midpoint", or "gauss2" for large steps.
        observable: "logprob"; "entropy", the mean over the response; "kl" to the policy before the first step;
            "expected_reward" over the probes of each prompt; or a function's dotted name, (apply, temperature) -> f.
        memory: for gradients and adjoints, as `fkernel.engine.account` takes it; None for no limit.
        disk: for states between snapshots; None for no limit.
        dtype: "float32", or "float64".
        template: of probes with "raw": false.
        p_values: whether contributions are compared with those of advantages permuted within prompts.
        ages: whether momentum is split by the age of the gradients that it is of; it needs snapshots of every step.
        device: where it is computed.
        model: the policy, for one whose architecture is not in the recording.
        base: the base model's directory, of an adapter, where it is no longer where the training read it.
        on_progress: called with (what, steps done, of how many).
        mesh: a one-dimensional `torch.distributed.DeviceMesh`, whose ranks account together: each keeps a share of the
            adjoints, and what it needs to go on after an interruption; rank 0 writes.

    Returns:
        AccountResults, on every rank, written to `out` as well.

    Raises:
        PlanError: out holds another account, or an argument is none of these.
        FKernelError: as `fkernel.engine.account`, `fkernel.record.replay` and `read_probes`.
    """
    recording = recording if isinstance(recording, Recording) else Recording.open(recording)
    chosen = _chosen(recording, steps)
    place = Path(out)
    if not (place / ACCOUNT).exists():
        check_writable(place)
    if dtype not in ("float32", "float64"):
        raise PlanError(f"dtype is {dtype!r}; an account is computed in float32 or float64.")
    net = recording.policy(base=base) if model is None else copy.deepcopy(model)
    net, group = net.to(device=device, dtype=getattr(torch, dtype)), None if mesh is None else group_of(mesh)
    scratch = folder_of(place, STATES, group)
    inputs = _inputs(recording, chosen, probes, net, scratch, disk, template, model, base, device, AGES if ages else ())
    f, E, rows = _observed(observable, inputs, recording.about["temperature"])
    request = {
        "recording": str(recording.directory.resolve()),
        "content": hash_json([dict(recording.about), *map(recording.checksums, chosen)]),
        "steps": [chosen.start, chosen.stop],
        "probes": [record.content_hash for record in inputs.probes],
        "ids": rows,
        "rewards": [record.reward for record in inputs.probes] if observable == "expected_reward" else None,
        "code": code_of([observable] if "." in observable else []),
        **{
            "path": path,
            "observable": observable,
            "dtype": dtype,
            "memory": str(memory),
            "p_values": p_values,
            "ages": [*inputs.steps.ages],
        },
    }
    kept = KeptSweep(place, request | {"fkernel": own_code()}, group=group)
    held = ExitStack()

    def claimed() -> AccountResults | None:
        held.enter_context(locked(make_directory(place), "lock"))
        return _written(place)  # another process may have finished in between

    there = _of_first(group, "reading the account", lambda: _written(place) or claimed())
    with held:
        if there is not None:
            return _finished(there, place, request, inputs, kept)
        begun = kept.found()
        inputs.steps.skip = 0 if begun is None else begun.taken
        on_progress("steps", inputs.steps.skip, len(chosen))

        def on_step(sweep: Sweep) -> None:
            on_progress("steps", 1, len(chosen))
            kept(sweep)

        where: Any = path  # checked below
        made = account(f, E, inputs.steps, path=where, memory=memory, on_step=on_step, resume=begun, mesh=mesh)
        named = [info_of(record) for record in inputs.probes] if rows == inputs.probes.ids else [*map(unnamed, rows)]

        def written() -> AccountResults:
            taken = Taken.of(recording, chosen)
            results = assembled(made, rounding_floor(f, inputs.params, E), taken, named, request, p_values)
            results.save(place)
            return results

        results = _of_first(group, "writing the account", written)
        _clear(inputs, kept)
        return results


def _finished(
    there: AccountResults, place: Path, request: dict[str, Any], inputs: Inputs, kept: KeptSweep
) -> AccountResults:
    """Take the account that is there, if it is this request's."""
    if there.about["request"] != request:
        raise PlanError(f"{str(place)!r} holds another account; choose another directory (out), or delete it.")
    with suppress(StoreError):  # a finished account is read where nothing can be written, too
        _clear(inputs, kept)
    return there


def _clear(inputs: Inputs, kept: KeptSweep) -> None:
    """Delete what an account needs no more once it is written."""
    inputs.steps.states.clear()
    kept.forget()


def _of_first(group: Group | None, what: str, make: Callable[[], Any]) -> Any:
    """Return what `make` returns; over ranks it is run on rank 0 alone."""
    return make() if group is None else from_first(group, what, make)


def _written(place: Path) -> AccountResults | None:
    return AccountResults.load(place) if (place / ACCOUNT).exists() else None


def _chosen(recording: Recording, steps: range | None) -> range:
    there = recording.steps
    if not there:
        raise PlanError(f"{str(recording.directory)!r} holds no step.")
    first = min((n for n in recording.snapshots if n in there), default=there[0])
    chosen = range(first, there[-1] + 1) if steps is None else steps
    recording.check_steps(chosen)
    return chosen


def _inputs(
    recording: Recording,
    chosen: range,
    probes: Any,
    net: nn.Module,
    scratch: Path,
    disk: int | str | None,
    template: str,
    model: nn.Module | None,
    base: Any,
    device: str,
    ages: tuple[int, ...],
) -> Inputs:
    grant = None if disk is None else parse_bytes(disk)
    states = States(training_of(recording, model, base, device), chosen, scratch, grant)
    steps = RunSteps(states, net, ages=ages)
    apply, _ = func.make_functional(net, [*recording.about["shapes"]])
    params = steps.params_before()
    if not isinstance(probes, GeneratedBatch):
        fill(net, params)
        generator = SampleGenerator(net, recording.tokenizer, template=template, sampling=Sampling())
        probes = probes_of(probes, generator) if isinstance(probes, list) else read_probes(probes, generator)
    return Inputs(steps, params, replace(apply, padding_idx=None), probes)


def _observed(observable: str, inputs: Inputs, temperature: float) -> Observable:
    """The function of θ that is accounted for, its inputs, and its rows' names."""
    probes, apply = inputs.probes, inputs.apply
    E = tokens_of(probes, inputs.params)
    if observable == "logprob":
        return Observable(func.sequence_logprob(apply, temperature), E, probes.ids)
    if observable == "entropy":
        return Observable(func.mean_entropy(apply, temperature), E, probes.ids)
    if observable == "kl":
        return Observable(func.kl_divergence(apply, inputs.params, temperature), E, probes.ids)
    if observable == "expected_reward":
        return expected_rewards(apply, temperature, probes, E, next(iter(inputs.params.values())))
    if "." not in observable:
        raise PlanError(f"observable is {observable!r}; expected one of {', '.join(OBSERVABLES)}, or module.function.")
    return Observable(dotted(observable, OBSERVABLE)(apply, temperature), E, probes.ids)
