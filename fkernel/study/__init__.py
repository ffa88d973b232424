"""Plans and finished results: what is to be done, what was found, and how both are written and read."""

from fkernel.study.reading import read_plan
from fkernel.study.results import ResultsError, SequenceInfo, StepResults
from fkernel.study.sample import SamplePlan, sampled

__all__ = ["ResultsError", "SamplePlan", "SequenceInfo", "StepResults", "read_plan", "sampled"]
