"""What may be asked of a step once it is explained: a room of its own, for it stands on `kernel` and needs no study.

Every function is pure: tensors in, tensors out, no file and no plan. `fkernel.study` calls them by a plan's toggles.
"""

from fkernel.analysis.comparison import Agreement, compare
from fkernel.analysis.counterfactual import Alternative, Counterfactual, alternative_step, counterfactual
from fkernel.analysis.health import Health, Share, health
from fkernel.analysis.ledger import Ledger, ledger, rounding_floor
from fkernel.analysis.observed import explain_observable
from fkernel.analysis.parts import by_part, missed, norms_by, shares, summed
from fkernel.analysis.significance import Permutations, Significance, permutation_rms, permutations, significance
from fkernel.analysis.structure import Clusters, Correlation, KernelPCA, alignment, clusters, correlations, kernel_pca
from fkernel.analysis.sweep import DECADES, Sweep, step_sweep
from fkernel.analysis.tokens import TokenChange, apart, token_change, token_kernel
from fkernel.analysis.uncertainty import (
    Interval,
    Ranks,
    Resamplings,
    group_sums,
    influence_interval,
    rank_interval,
    resamplings,
    total_ranks,
)

__all__ = [
    "DECADES",
    "Agreement",
    "Alternative",
    "Clusters",
    "Correlation",
    "Counterfactual",
    "Health",
    "Interval",
    "KernelPCA",
    "Ledger",
    "Permutations",
    "Ranks",
    "Resamplings",
    "Share",
    "Significance",
    "Sweep",
    "TokenChange",
    "alignment",
    "alternative_step",
    "apart",
    "by_part",
    "clusters",
    "compare",
    "correlations",
    "counterfactual",
    "explain_observable",
    "group_sums",
    "health",
    "influence_interval",
    "kernel_pca",
    "ledger",
    "missed",
    "norms_by",
    "permutation_rms",
    "permutations",
    "rank_interval",
    "resamplings",
    "rounding_floor",
    "shares",
    "significance",
    "step_sweep",
    "summed",
    "token_change",
    "token_kernel",
    "total_ranks",
]
