"""Recorded steps taken again: the run as it was, or as it would have been with sequences weighed otherwise.

    g_t = c_t Σ_u a_u Σ_t ( ω_ut ∇log π(u_t) + η_ut ∇H(u_t) )        a_u = 1 for the run as it was, 0 for a dropped u
    θ_{t+1}, state_{t+1} = the optimizer's own class, on θ_t, g_t, state_t, in their own dtypes

ω and η are those of the run, computed at the run's θ: what is changed is the weight that a sequence has in the loss, at
fixed data, and not what a changed policy would have sampled, or what a ratio to it would have been. Each g_t is
computed at the replay's own θ_t. c_t is the recorded factor while nothing is changed, else that of clipping to the
norm that the run clipped to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fkernel import tree
from fkernel.checkpoint import stored_optimizer_state
from fkernel.engine import gradient_in
from fkernel.errors import OptimizerStateError, StoreError
from fkernel.func import make_functional, unused_parameters, weighted_logprob, with_masked_padding_grad
from fkernel.precond import StoredState, executed_step
from fkernel.record.gradients import passes_of, weighted
from fkernel.record.reading import RecordedStep, Recording
from fkernel.rollout import SequenceRecord
from fkernel.shapes import Tensor, Tree

Change = Callable[[str, SequenceRecord], float]
"""Weight a of a sequence of a replay, by its id within the run ("0012/U-003-05") and its record: 0 drops it."""


class State(NamedTuple):
    """Where a run is between two steps.

    Attributes:
        number: of the step that comes next.
        params: θ of what is trained, {name: [*shape]}, in the training's dtypes.
        stored: the optimizers' state, in theirs; settings are those of the step before.
    """

    number: int
    params: Tree
    stored: StoredState


@dataclass(frozen=True, eq=False)
class Training:
    """What turns a recorded step into a gradient.

    Attributes:
        recording: the run.
        build: makes its policy as it was trained: attention, dtypes of what was frozen.
        device: where its passes run, and states are.
    """

    recording: Recording
    build: Callable[[], nn.Module]
    device: torch.device

    @cached_property
    def f(self) -> Callable[[Tree, Any], Tensor]:
        """`func.weighted_logprob` of the policy, built where the first gradient asks for it."""
        apply, _ = make_functional(self.build().to(self.device), [*self.recording.about["shapes"]])
        return weighted_logprob(with_masked_padding_grad(apply), self.recording.about["temperature"])

    def gradient(
        self, params: Tree, step: RecordedStep, change: Change | None = None, parts: Mapping[str, float] | None = None
    ) -> dict[str, Any]:
        """Compute ∇L of a step at θ in the training's arithmetic, before clipping; None where f never uses a parameter.

        Args:
            params: θ, in the training's dtypes.
            step: the step.
            change: weights of its sequences; None for those of the run.
            parts: {part: weight} of its loss; None for those of the run.
        """
        rows, passes = passes_of(step.microbatches)
        if not rows:
            return {name: torch.zeros_like(leaf) for name, leaf in params.items()}
        rows = rows if parts is None else [row.weighed(parts) for row in rows]
        batch, about = moved(weighted(rows), self.device), self.recording.about
        a = torch.ones(len(rows), device=self.device)
        if change is not None:
            factors = [float(change(*pair)) for pair in zip(step.sequence_ids, step.records, strict=True)]
            a = torch.tensor(factors, device=self.device)
        g = gradient_in(self.f, params, batch, a, autocast=about["autocast"], microbatches=passes, head=about["head"])
        return {**g, **dict.fromkeys(unused_parameters(self.f, params, batch))}


def training_of(
    recording: Recording, model: nn.Module | None = None, base: Any = None, device: str = "cpu"
) -> Training:
    """Make what takes a recording's steps again; its policy is built where the first gradient asks for it.

    Args:
        recording: the run.
        model: its policy, for one whose architecture is not in the recording.
        base: as `Recording.policy` takes it.
        device: where its passes run.
    """
    build = partial(recording.policy, base=base, attention=None) if model is None else partial(copy.deepcopy, model)
    return Training(recording, build, torch.device(device))


def moved(content: Any, device: torch.device) -> Any:
    """Move all tensors of a structure."""
    return pytree.tree_map_only(torch.Tensor, lambda leaf: leaf.to(device), content)


def state_of(training: Training, number: int) -> State:
    """Read a snapshot as a state.

    Args:
        training: of the run.
        number: of the step that comes next.

    Raises:
        StoreError: there is none before this step.
        OptimizerStateError: as `fkernel.checkpoint.optimizer_state`.
    """
    snapshot = training.recording.snapshot(number)
    dicts = [*snapshot.state_dicts]
    stored = stored_optimizer_state(dicts if len(dicts) > 1 else dicts[0], snapshot.params)
    return placed(State(number, snapshot.params, stored), training.device)


def placed(state: State, device: torch.device) -> State:
    """Move a state's tensors; counts of steps stay where torch keeps them."""
    entries = {
        name: {key: moved(leaf, device) if getattr(leaf, "ndim", 0) else leaf for key, leaf in entry.items()}
        for name, entry in state.stored.entries.items()
    }
    masters = moved(state.stored.masters, device)
    return State(state.number, moved(state.params, device), replace(state.stored, entries=entries, masters=masters))


def settled(state: State, recording: Recording, step: RecordedStep) -> StoredState:
    """The optimizers' state with the settings that a step was taken with, of the parameters that were stepped.

    Args:
        state: before the step.
        recording: whose names of parameters they are.
        step: the step.
    """
    groups = dict(state.stored.groups)
    for optimizer, settings in zip(recording.about["optimizers"], step.settings, strict=False):
        for own, names in zip(settings or (), optimizer["groups"], strict=False):
            plain = {key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}
            groups |= {name: {**groups[name], **plain} for name in names if name in groups}
    return replace(state.stored, groups=groups)


def next_state(
    training: Training,
    state: State,
    change: Change | None = None,
    max_norm: float | None = None,
    parts: Mapping[str, float] | None = None,
) -> State:
    """Take one recorded step from a state.

    Args:
        training: of the run.
        state: before the step.
        change: weights of sequences; None for the run as it was.
        max_norm: that gradients are clipped to where something is changed; None for none.
        parts: weights of the parts of the loss; None for the run as it was.

    Returns:
        The state after it.

    Raises:
        StoreError: the step is not recorded.
        OptimizerStateError: its optimizer cannot be executed here; `fkernel.precond.executed_step`.
    """
    step = training.recording.step(state.number)
    g = training.gradient(state.params, step, change, parts)
    c = step.clip
    if change is not None or parts is not None:
        norm = float(tree.norm({name: leaf for name, leaf in g.items() if leaf is not None}))
        c = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
    return advanced(training.recording, state, step, scaled(g, c))


def scaled(g: Mapping[str, Any], c: float) -> dict[str, Any]:
    """Multiply gradients by c; None stays None."""
    return {name: None if leaf is None else leaf if c == 1.0 else leaf * c for name, leaf in g.items()}


def advanced(recording: Recording, state: State, step: RecordedStep, g: Mapping[str, Any]) -> State:
    """Let the optimizers step on a clipped gradient.

    Args:
        recording: of the run.
        state: before the step.
        step: whose settings they have; an optimizer without any did not step.
        g: {name: gradient or None}.
    """
    stored = settled(state, recording, step)
    idle = {
        name
        for optimizer, settings in zip(recording.about["optimizers"], step.settings, strict=False)
        for names in (optimizer["groups"] if settings is None else ())
        for name in names
    }
    after = executed_step(state.params, {name: None if name in idle else g[name] for name in state.params}, stored)
    params = {name: (leaf.double() + after.delta[name].double()).to(leaf.dtype) for name, leaf in state.params.items()}
    if stored.masters:
        raise OptimizerStateError("A replay of an optimizer with master weights is not built; its snapshots are there.")
    return State(state.number + 1, params, replace(stored, entries=after.entries))


def clipped_to(recording: Recording, steps: range) -> float | None:
    """The norm that the run clipped gradients to; None where none of these steps was clipped.

    max_norm = c (‖∇L‖ + 1e-6) wherever c < 1

    Args:
        recording: the run.
        steps: that are looked at.

    Raises:
        StoreError: clipped steps have different ones.
    """
    given = recording.about.get("arguments", {}).get("max_grad_norm")
    if given:
        return float(given)
    both = [(step.clip, step.grad_norm) for step in map(recording.step, steps)]
    found = [c * (norm + 1e-6) for c, norm in both if c < 1]
    if found and max(found) > 1.001 * min(found):
        raise StoreError(
            f"Gradients were clipped to norms from {min(found):.4g} to {max(found):.4g}, so that it is not known to "
            f"what a changed gradient would be; give max_norm."
        )
    return sum(found) / len(found) if found else None


def replay(
    recording: Recording,
    upto: int | None = None,
    change: Change | None = None,
    *,
    parts: Mapping[str, float] | None = None,
    start: int | None = None,
    max_norm: float | None = None,
    model: nn.Module | None = None,
    base: Any = None,
    device: str = "cpu",
) -> Iterator[State]:
    """Take recorded steps again, from a snapshot.

    Args:
        recording: the run.
        upto: the step before which it ends; None for after the last.
        change: weights of sequences, (id within the run, record) -> factor; None for the run as it was.
        parts: {part: weight} of the loss: "kl" and "entropy" where the recording tells them apart, "loss" is the rest.
        start: a step before which there is a snapshot; None for the first.
        max_norm: that gradients are clipped to where something is changed; None for what the run clipped to: the
            trainer's max_grad_norm, else that of its clipped steps; where none was clipped it is not known.
        model: the policy, for one whose architecture is not in the recording.
        base: the base model's directory, of an adapter, where it is no longer where the training read it.
        device: where it is computed.

    Yields:
        The state before every step, and after the last; the first is the snapshot itself.

    Raises:
        StoreError: a step is missing, or there is no snapshot to begin with.
        ModelError, OptimizerStateError: as `Recording.policy`, and `fkernel.precond.executed_step`.

    Example:
        >>> import tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from fkernel.record import Recorder
        >>> shape = {"vocab_size": 11, "n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 1}
        >>> quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        >>> model = GPT2LMHeadModel(GPT2Config(**shape, **quiet, bos_token_id=0, eos_token_id=0))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        >>> ids, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     with Recorder(directory, model, optimizer) as recorder, recorder.step():
        ...         log_p = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        ...         log_p = recorder.tap(log_p, input_ids=ids, attention_mask=mask, response_mask=torch.ones(1, 2))
        ...         (-log_p.sum()).backward()
        ...         optimizer.step()
        ...     *_, last = replay(Recording.open(directory))
        >>> last.number, bool((last.params["lm_head.weight" if "lm_head.weight" in last.params else
        ...     "transformer.wte.weight"] - model.lm_head.weight).abs().max() < 1e-6)
        (1, True)
    """
    steps, snapshots = recording.steps, recording.snapshots
    if not steps or not snapshots:
        raise StoreError(f"{str(recording.directory)!r} holds no step, or no snapshot to begin with.")
    begin = snapshots[0] if start is None else start
    end = steps[-1] + 1 if upto is None else upto
    recording.check_steps(range(begin, end))
    training = training_of(recording, model, base, device)
    training.f  # noqa: B018 - a policy that cannot be built is said before the first state
    state = state_of(training, begin)
    if (change is not None or parts is not None) and max_norm is None:
        max_norm = clipped_to(recording, range(begin, end))
    yield state
    while state.number < end:
        state = next_state(training, state, change, max_norm, parts)
        yield state


def distance(recording: Recording, state: State) -> float | None:
    """How far a replayed state is from the run's own: ‖θ − θ'‖ / ‖θ' − θ_first‖; None where there is no snapshot.

    Args:
        recording: the run.
        state: of the replay.
    """
    if state.number not in recording.snapshots:
        return None
    first, there = (recording.snapshot(n).params for n in (recording.snapshots[0], state.number))
    moved = tree.norm(tree.map(lambda a, b: a.double() - b.double(), there, first))
    apart = tree.norm(tree.map(lambda a, b: a.double().cpu() - b.double(), state.params, there))
    return float(apart) / (float(moved) or 1.0)
