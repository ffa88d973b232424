"""A run's steps as they were taken: recorded by a tap on log-probabilities, checked as they are written, and read.

A room of its own because it looks at a living training, which no other room does. It stands above `rollout` and
`checkpoint`: what it reads back are their batches and states.
"""

from fkernel.record.layout import RecordedMicrobatch
from fkernel.record.opened import OpenStep
from fkernel.record.reading import RecordedStep, Recording, Snapshot
from fkernel.record.recorder import Recorder

__all__ = ["OpenStep", "RecordedMicrobatch", "RecordedStep", "Recorder", "Recording", "Snapshot"]
