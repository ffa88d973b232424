"""Finished results of explaining a step: what is kept, and how it is written and read."""

from fkernel.study.results import SequenceInfo, StepResults

__all__ = ["SequenceInfo", "StepResults"]
