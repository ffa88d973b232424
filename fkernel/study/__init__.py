"""Finished results of explaining a step: what is kept, and how it is written and read."""

from fkernel.study.results import ResultsError, SequenceInfo, StepResults

__all__ = ["ResultsError", "SequenceInfo", "StepResults"]
