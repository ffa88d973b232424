"""A recorded step's start as a checkpoint: what `fkernel.checkpoint.load` gives of a directory that a trainer left."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from fkernel.checkpoint import Checkpoint, Provenance
from fkernel.errors import StoreError
from fkernel.io import fingerprint
from fkernel.precond import exact_state
from fkernel.record.policy import fill
from fkernel.record.reading import Recording
from fkernel.record.replaying import Training, next_state, settled, state_of


def checkpoint_before(
    recording: Recording,
    number: int,
    *,
    dtype: torch.dtype = torch.float32,
    base: str | Path | None = None,
    optimizer: bool = True,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Make a checkpoint of the state before a step: a snapshot, or the steps from the one before it replayed.

    Args:
        recording: of the run.
        number: the step; after the last one, the state that the run ended with.
        dtype: of the parameters: float32, or float64 for laws.
        base: the base model's directory, of an adapter, where it is no longer where the training read it.
        optimizer: whether the optimizer's state is wanted; with the settings that the step was taken with.
        trust_remote_code: whether the model's own code may be executed.

    Raises:
        StoreError: no snapshot lies before the step, or a step between them is missing.
        ModelError, OptimizerStateError: as `Recording.policy` and `fkernel.record.replay`.
    """
    before = [each for each in recording.snapshots if each <= number]
    if not before:
        raise StoreError(f"{str(recording.directory)!r} has no snapshot before step {number}.")
    if number != before[-1]:
        recording.check_steps(range(before[-1], number))
    build = partial(recording.policy, base=base, attention=None, trust_remote_code=trust_remote_code)
    training = Training(recording, build, torch.device("cpu"))
    state = state_of(training, before[-1])
    while state.number < number:
        state = next_state(training, state)
    model = recording.policy(base=base, trust_remote_code=trust_remote_code).to(dtype)
    fill(model, state.params)
    stored = state.stored
    if number in recording.steps:
        stored = settled(state, recording, recording.step(number))
    params = {name: leaf.to(dtype) for name, leaf in state.params.items()}
    return Checkpoint(
        model=model,
        tokenizer=recording.tokenizer,
        optimizer=exact_state(stored, params) if optimizer else None,
        step=number,
        provenance=Provenance(
            path=str(recording.directory),
            layout="recording",
            fingerprint=fingerprint(dict(model.named_parameters())),
            optimizer=str(recording.directory) if optimizer else None,
            base=None if base is None else str(base),
        ),
        stored=stored if optimizer else None,
        trained_dtypes={name: leaf.dtype for name, leaf in state.params.items()},
    )
