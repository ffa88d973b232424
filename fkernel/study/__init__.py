"""Studies: a plan names a checkpoint, an update batch and requests about its step; a runner evaluates them.

plan → workspace (U, its gradients, P) → one answer per request → results
"""

from fkernel.engine import Gradients
from fkernel.errors import ResultsError
from fkernel.study.accounts.computing import account_recording
from fkernel.study.accounts.counterfactual import ReplayResults, replay_probes
from fkernel.study.accounts.results import AccountResults, Share
from fkernel.study.analyses.registry import AnalysesPlan, RequestAnalyses
from fkernel.study.asking import ask, probes_batch, runner_of
from fkernel.study.checks import check_inputs, check_out, check_saved_batch, claimed
from fkernel.study.config.capture import CapturePlan
from fkernel.study.config.io import read_plan
from fkernel.study.config.loss import ClippedRatioLoss, KLPlan, PolicyGradientLoss, PreferenceLoss, SequenceRatioLoss
from fkernel.study.config.plan import TEMPLATE, FisherKernelPlan, NumericsPlan, StoragePlan
from fkernel.study.config.requests import AnyRequest, BatchRequest
from fkernel.study.config.step import PreconditionerPlan, StepPlan
from fkernel.study.config.yaml_text import parse_yaml
from fkernel.study.diagnostics import Blocks, Spectrum, cosines, spectrum, top_contributors
from fkernel.study.explaining import Explanation, explanation
from fkernel.study.from_recording import as_recorded
from fkernel.study.gradients import GradientCache
from fkernel.study.log import LEVELS, recorded
from fkernel.study.loss_terms import LossTerms
from fkernel.study.outcome import AnalysisResult, Entry, RequestResult, SelfKernel, SequenceInfo
from fkernel.study.phases import Forecast, Phase, forecast
from fkernel.study.provenance import environment
from fkernel.study.questions import entry_of, influence_of, self_kernel_of
from fkernel.study.results import FisherKernelResults
from fkernel.study.runner import FisherKernelRunner
from fkernel.study.sample import SamplePlan, sampled
from fkernel.study.workspace import KernelWorkspace, load_workspace, serialize_workspace

__all__ = [
    "LEVELS",
    "TEMPLATE",
    "AccountResults",
    "AnalysesPlan",
    "AnalysisResult",
    "AnyRequest",
    "BatchRequest",
    "Blocks",
    "CapturePlan",
    "ClippedRatioLoss",
    "Entry",
    "Explanation",
    "FisherKernelPlan",
    "FisherKernelResults",
    "FisherKernelRunner",
    "Forecast",
    "GradientCache",
    "Gradients",
    "KLPlan",
    "KernelWorkspace",
    "LossTerms",
    "NumericsPlan",
    "Phase",
    "PolicyGradientLoss",
    "PreconditionerPlan",
    "PreferenceLoss",
    "ReplayResults",
    "RequestAnalyses",
    "RequestResult",
    "ResultsError",
    "SamplePlan",
    "SelfKernel",
    "SequenceInfo",
    "SequenceRatioLoss",
    "Share",
    "Spectrum",
    "StepPlan",
    "StoragePlan",
    "account_recording",
    "as_recorded",
    "ask",
    "check_inputs",
    "check_out",
    "check_saved_batch",
    "claimed",
    "cosines",
    "entry_of",
    "environment",
    "explanation",
    "forecast",
    "influence_of",
    "load_workspace",
    "parse_yaml",
    "probes_batch",
    "read_plan",
    "recorded",
    "replay_probes",
    "runner_of",
    "sampled",
    "self_kernel_of",
    "serialize_workspace",
    "spectrum",
    "top_contributors",
]
