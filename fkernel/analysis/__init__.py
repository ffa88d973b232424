"""What may be asked of a step once it is explained: a room of its own, for it stands on `kernel` and needs no study.

Every function is pure: tensors in, tensors out, no file and no plan. `fkernel.study.analyses` has what a plan may ask.
"""

from fkernel.analysis.comparison import Agreement, compare
from fkernel.analysis.decomposition import Ledger, floor_from, ledger, rounding_floor
from fkernel.analysis.other_steps import Alternative, Counterfactual, alternative_step, counterfactual
from fkernel.analysis.parts import ENDS, by_part, missed, shares, summed
from fkernel.analysis.permutation_test import Permutations, Significance, permutation_rms, permutations, significance
from fkernel.analysis.structure import Clusters, Correlation, KernelPCA, alignment, clusters, correlations, kernel_pca
from fkernel.analysis.sweep import DECADES, Sweep, step_sweep
from fkernel.analysis.tokens import TokenChange, apart, token_change, token_kernel
from fkernel.analysis.trace_shares import Health, Share, health
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
    "ENDS",
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
    "floor_from",
    "group_sums",
    "health",
    "influence_interval",
    "kernel_pca",
    "ledger",
    "missed",
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
