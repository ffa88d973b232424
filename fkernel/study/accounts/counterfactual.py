"""What a run would have done to the probes without some of its sequences: its steps replayed, at fixed data."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import translate
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fkernel import func
from fkernel.engine import evaluated
from fkernel.errors import PlanError
from fkernel.record import Change, Recording, State, distance, fill, replay
from fkernel.rollout import GeneratedBatch, SampleGenerator, Sampling, SequenceRecord, probes_of, read_probes
from fkernel.shapes import Tensor, Tree
from fkernel.study.workspace import tokens_of

PLACES: dict[str, Callable[[str, SequenceRecord], str]] = {
    "id": lambda name, record: name,
    "prompt": lambda name, record: record.prompt,
    "response": lambda name, record: record.response,
    "prompt_id": lambda name, record: record.provenance.global_prompt_id,
}
"""What a pattern may be about: "prompt:3+5=" is the text of a prompt; without a prefix it is an id within the run."""


class ReplayResults(NamedTuple):
    """S of the probes, nats, at the run's temperature.

    Attributes:
        probes: E.
        before: [n_E] before the first step.
        run: [n_E] after the last, as the run left it; or as its replay did, where there is no snapshot.
        replayed: [n_E] after the last, in the replay.
        changed: sequences whose weight was changed, and all of them.
        distance: ‖θ − θ'‖ / ‖θ' − θ_first‖ of a replay without changes from the run; None where it cannot be told.
    """

    probes: GeneratedBatch
    before: Tensor
    run: Tensor
    replayed: Tensor
    changed: tuple[int, int]
    distance: float | None

    @property
    def difference(self) -> Tensor:
        """[n_E] what the change did: after the replay − after the run."""
        return self.replayed - self.run


def replay_probes(
    recording: Recording | str | Path,
    probes: GeneratedBatch | list[dict[str, Any]] | str | Path,
    weights: Mapping[str, float] | None = None,
    *,
    parts: Mapping[str, float] | None = None,
    upto: int | None = None,
    max_norm: float | None = None,
    template: str = "bare",
    device: str = "cpu",
    model: nn.Module | None = None,
    base: str | Path | None = None,
    on_progress: Callable[[str, int, int], Any] = lambda what, n, total: None,
) -> ReplayResults:
    """Replay a run with some of its sequences weighed otherwise, and compare what it does to probes.

    Args:
        recording: of the run, or its directory.
        probes: as `account_recording` takes them.
        weights: {pattern: weight}: 0 leaves matching sequences out of the loss, 1 is the run. A pattern is of ids
            within the run ("0012/U-003-*"), or "prompt:…", "response:…", "prompt_id:…"; `*` matches anything. Of
            several that match, weights are multiplied. None replays the run as it was.
        parts: {part: weight} of the loss: "kl" and "entropy" where the recording tells them apart, "loss" is the rest.
        upto: the step before which it ends; None for after the last.
        max_norm: that a changed gradient is clipped to; None for what the run clipped to.
        template: of probes with "raw": false.
        device: where it is computed.
        model: the policy, for one whose architecture is not in the recording.
        base: the base model's directory, of an adapter, where it is no longer where the training read it.
        on_progress: called with (what, steps done, of how many).

    Raises:
        PlanError: a pattern matches no sequence, or the loss has no such part.
        FKernelError: as `fkernel.record.replay` and `read_probes`.
    """
    recording = recording if isinstance(recording, Recording) else Recording.open(recording)
    end = recording.steps[-1] + 1 if upto is None else upto
    steps = range(min(recording.snapshots, default=0), end)
    recording.check_steps(steps)
    factor, changed = weigher(recording, steps, weights or {})
    _check_parts(recording, steps, parts or {})
    if parts:
        changed = (changed[1], changed[1])
    net = (recording.policy(base=base) if model is None else copy.deepcopy(model)).to(device)
    apply, _ = func.make_functional(net, [*recording.about["shapes"]])
    f = func.sequence_logprob(apply, recording.about["temperature"])
    first = recording.snapshot(steps.start).params
    fill(net, moved(first, device))
    if isinstance(probes, GeneratedBatch):
        batch = probes
    else:
        generator = SampleGenerator(net, recording.tokenizer, template=template, sampling=Sampling())
        batch = probes_of(probes, generator) if isinstance(probes, list) else read_probes(probes, generator)

    def measured(params: Tree) -> Tensor:
        params = moved(params, device)
        return evaluated(f, params, tokens_of(batch, params), None).cpu()

    def last(change: Change | None, what: str) -> State:
        options: dict[str, Any] = {"model": model, "base": base, "device": device, "max_norm": max_norm}
        walk = replay(recording, end, change, parts=parts if change is not None else None, **options)
        state = next(walk)
        for each in walk:
            state = each
            on_progress(what, 1, len(steps))
        return state

    recorded = end in recording.snapshots
    plain = last(None, "replaying the run") if not changed[0] or not recorded else None
    other = last(factor, "replaying it otherwise") if changed[0] else plain
    assert other is not None
    run = recording.snapshot(end).params if recorded else plain.params if plain is not None else first
    apart = None if plain is None else distance(recording, plain)
    return ReplayResults(batch, measured(first), measured(run), measured(other.params), changed, apart)


def moved(params: Tree, device: str) -> Tree:
    """Parameters in float32, on a device."""
    return {name: leaf.to(device, torch.float32) for name, leaf in params.items()}


def weigher(
    recording: Recording, steps: range, weights: Mapping[str, float]
) -> tuple[Callable[[str, SequenceRecord], float], tuple[int, int]]:
    """Make the weight of each sequence of patterns, and count how many are changed, of how many.

    Args:
        recording: of the run.
        steps: that are replayed.
        weights: as `replay_probes` takes them.

    Raises:
        PlanError: a pattern matches none.
    """
    exact = {pattern: weight for pattern, weight in weights.items() if _rule(pattern) == ("id", escape(pattern))}
    rules = [(*_rule(pattern), weight) for pattern, weight in weights.items() if pattern not in exact]
    compiled = [(PLACES[place], re.compile(translate(pattern)).match, weight) for place, pattern, weight in rules]

    def factor(name: str, record: SequenceRecord) -> float:
        product = exact.get(name, 1.0)
        for place, matches, weight in compiled:
            product *= weight if matches(place(name, record)) else 1.0
        return product

    pairs: Sequence[tuple[str, SequenceRecord]] = [
        pair for step in map(recording.step, steps) for pair in zip(step.sequence_ids, step.records, strict=True)
    ]
    names = {name for name, _ in pairs}
    matched = {pattern: pattern in names for pattern in exact}
    for pattern, (place, matches, _) in zip((p for p in weights if p not in exact), compiled, strict=True):
        matched[pattern] = any(matches(place(*pair)) for pair in pairs)
    for given, found in matched.items():
        if not found:
            raise PlanError(
                f"{given!r} matches none of the {len(pairs)} sequences of steps {steps.start} to {steps.stop - 1}; "
                f"expected an id within the run, such as {pairs[0][0]!r}, or 'prompt:' and a prompt's text, such as "
                f"{pairs[0][1].prompt!r}; * matches anything."
            )
    changed = sum(factor(*pair) != 1.0 for pair in pairs)
    return factor, (changed, len(pairs))


def _check_parts(recording: Recording, steps: range, parts: Mapping[str, float]) -> None:
    """Raise PlanError unless the loss has the parts that are named."""
    if not parts:
        return
    there = sorted({part for number in steps for part in recording.step(number).parts})
    unknown = sorted({*parts} - {*there})
    if unknown:
        raise PlanError(
            f"{unknown[0]!r} is no part of the loss that the recording tells apart; it has {', '.join(there)}."
        )


def _rule(pattern: str) -> tuple[str, str]:
    place, colon, rest = pattern.partition(":")
    return (place, rest) if colon and place in PLACES else ("id", pattern)
