"""Pure functions of (params, batch): log-probabilities, their derivatives, and the contraction of gradients.

No files, no tokenizers, no state. See `fkernel.func.gradient` for the mathematics.
"""

from fkernel.func.batch import Sequences, pad
from fkernel.func.contract import contract
from fkernel.func.evaluate import evaluate
from fkernel.func.functional import Apply, make_functional
from fkernel.func.gradient import curvature, jvp, per_sequence_grad, per_sequence_handles, vjp
from fkernel.func.handles import Factored, Handle, Handles, Rows, Stack, Sum
from fkernel.func.held import SquaredNorms, squared_norms, weighted_sum
from fkernel.func.logprob import sequence_logprob, token_entropy, token_logprobs
from fkernel.func.objective import Objective

__all__ = [
    "Apply",
    "Factored",
    "Handle",
    "Handles",
    "Objective",
    "Rows",
    "Sequences",
    "SquaredNorms",
    "Stack",
    "Sum",
    "contract",
    "curvature",
    "evaluate",
    "jvp",
    "make_functional",
    "pad",
    "per_sequence_grad",
    "per_sequence_handles",
    "sequence_logprob",
    "squared_norms",
    "token_entropy",
    "token_logprobs",
    "vjp",
    "weighted_sum",
]
