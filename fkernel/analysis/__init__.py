"""What may be asked of a step once it is explained: a room of its own, for it stands on `kernel` and needs no study.

Every function is pure: tensors in, tensors out, no file and no plan. `fkernel.study` calls them by a plan's toggles.
"""

from fkernel.analysis.comparison import Agreement, compare
from fkernel.analysis.counterfactual import Alternative, Counterfactual, alternative_step, counterfactual
from fkernel.analysis.ledger import Ledger, ledger, rounding_floor
from fkernel.analysis.observed import explain_observable
from fkernel.analysis.parts import by_part, missed, norms_by, shares, summed
from fkernel.analysis.sweep import DECADES, Sweep, step_sweep
from fkernel.analysis.tokens import TokenChange, apart, token_change, token_kernel

__all__ = [
    "DECADES",
    "Agreement",
    "Alternative",
    "Counterfactual",
    "Ledger",
    "Sweep",
    "TokenChange",
    "alternative_step",
    "apart",
    "by_part",
    "compare",
    "counterfactual",
    "explain_observable",
    "ledger",
    "missed",
    "norms_by",
    "rounding_floor",
    "shares",
    "step_sweep",
    "summed",
    "token_change",
    "token_kernel",
]
