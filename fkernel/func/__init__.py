"""Pure functions of (params, batch): log-probabilities, their derivatives, and the contraction of gradients.

No files, no tokenizers, no state. See `fkernel.func.gradient` for the mathematics.
"""

from fkernel.func.detach import through_detach
from fkernel.func.evaluation import evaluate, evaluate_in_float64
from fkernel.func.functional import Apply, make_functional, split
from fkernel.func.gradient import curvature, jvp, per_sequence_grad, per_sequence_handles, vjp
from fkernel.func.handles.forms import Concat, Factored, Handle, Handles, SparseRows, Sum
from fkernel.func.handles.groups import Part, by_kind, by_layer, contract_by, grouped, part_of
from fkernel.func.handles.products import contract
from fkernel.func.handles.reductions import SquaredNorms, squared_norms, squared_sum, weighted_sum
from fkernel.func.inputs.batch import Sequences, pad
from fkernel.func.inputs.objective import Objective
from fkernel.func.logprob import sequence_logprob, token_entropy, token_logprobs
from fkernel.func.observables import Answers, Pair, expected_reward, kl_divergence, log_odds, mean_entropy
from fkernel.func.padding import with_masked_padding_grad
from fkernel.func.trust.along import true_derivative
from fkernel.func.trust.comparisons import Certificate
from fkernel.func.trust.memory import certificates, made_certificates, skip_certificates
from fkernel.func.unused import unused_parameters
from fkernel.func.weighted import Weighted, weighted_logprob
from fkernel.func.weightless import InShards, policy_function, without_weights

__all__ = [
    "Answers",
    "Apply",
    "Certificate",
    "Concat",
    "Factored",
    "Handle",
    "Handles",
    "InShards",
    "Objective",
    "Pair",
    "Part",
    "Sequences",
    "SparseRows",
    "SquaredNorms",
    "Sum",
    "Weighted",
    "by_kind",
    "by_layer",
    "certificates",
    "contract",
    "contract_by",
    "curvature",
    "evaluate",
    "evaluate_in_float64",
    "expected_reward",
    "grouped",
    "jvp",
    "kl_divergence",
    "log_odds",
    "made_certificates",
    "make_functional",
    "mean_entropy",
    "pad",
    "part_of",
    "per_sequence_grad",
    "per_sequence_handles",
    "policy_function",
    "sequence_logprob",
    "skip_certificates",
    "split",
    "squared_norms",
    "squared_sum",
    "through_detach",
    "token_entropy",
    "token_logprobs",
    "true_derivative",
    "unused_parameters",
    "vjp",
    "weighted_logprob",
    "weighted_sum",
    "with_masked_padding_grad",
    "without_weights",
]
