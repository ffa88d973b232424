"""A run's steps as they were taken: recorded by a tap on log-probabilities, checked, read again, replayed.

A room of its own because it looks at a living training, which no other room does. It stands above `rollout` and
`checkpoint`: what it reads back are their batches and states.
"""

from fkernel.record.as_checkpoint import checkpoint_before
from fkernel.record.dumps import read
from fkernel.record.layout import LOSS, RecordedMicrobatch
from fkernel.record.opened import OpenStep
from fkernel.record.policy import fill
from fkernel.record.reading import RecordedStep, Recording, Snapshot
from fkernel.record.recorder import Recorder
from fkernel.record.replaying import Change, State, Training, distance, replay, training_of
from fkernel.record.restored import States
from fkernel.record.run_steps import RunSteps

__all__ = [
    "LOSS",
    "Change",
    "OpenStep",
    "RecordedMicrobatch",
    "RecordedStep",
    "Recorder",
    "Recording",
    "RunSteps",
    "Snapshot",
    "State",
    "States",
    "Training",
    "checkpoint_before",
    "distance",
    "fill",
    "read",
    "replay",
    "training_of",
]
