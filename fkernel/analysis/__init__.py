"""Analyses of an explained step, as pure functions: tensors in, tensors out, no files and no plans.

`fkernel.study.analyses` makes them available to plans.
"""

from fkernel.analysis.auditing import Audit, Described, audit, described_step
from fkernel.analysis.comparison import Agreement, compare
from fkernel.analysis.decomposition import Ledger, floor_from, floor_scale, ledger, rounding_floor
from fkernel.analysis.other_steps import Alternative, Counterfactual, alternative_step, counterfactual
from fkernel.analysis.parts import ENDS, by_part, missed, shares, summed
from fkernel.analysis.permutation_test import Permutations, Significance, permutation_rms, permutations, significance
from fkernel.analysis.runs import Recurrence, recurrences, reward_shares, turning_points
from fkernel.analysis.step_fit import Fit
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
from fkernel.analysis.verdicts import Finding

__all__ = [
    "DECADES",
    "ENDS",
    "Agreement",
    "Alternative",
    "Audit",
    "Clusters",
    "Correlation",
    "Counterfactual",
    "Described",
    "Finding",
    "Fit",
    "Health",
    "Interval",
    "KernelPCA",
    "Ledger",
    "Permutations",
    "Ranks",
    "Recurrence",
    "Resamplings",
    "Share",
    "Significance",
    "Sweep",
    "TokenChange",
    "alignment",
    "alternative_step",
    "apart",
    "audit",
    "by_part",
    "clusters",
    "compare",
    "correlations",
    "counterfactual",
    "described_step",
    "floor_from",
    "floor_scale",
    "group_sums",
    "health",
    "influence_interval",
    "kernel_pca",
    "ledger",
    "missed",
    "permutation_rms",
    "permutations",
    "rank_interval",
    "recurrences",
    "resamplings",
    "reward_shares",
    "rounding_floor",
    "shares",
    "significance",
    "step_sweep",
    "summed",
    "token_change",
    "token_kernel",
    "total_ranks",
    "turning_points",
]
