"""Why did this sequence's probability move? One AdamW step, explained in nats.

Low level: `func` (gradients, log-probabilities), `precond` (AdamW's linear maps), `tree` (algebra on parameters).
Above it: `kernel`, `influence`, `explain_step`.
"""

from fkernel import func, precond, tree
from fkernel.engine import (
    Calibration,
    Estimate,
    Option,
    Rounded,
    StepEffect,
    Strategy,
    calibrate,
    estimate,
    explain_step,
    influence,
    kernel,
    loss_gradient,
    low_precision_kernel,
    realised_change,
    reuse_memory,
    state_against_step,
)
from fkernel.errors import (
    BatchError,
    CheckpointError,
    CheckpointWarning,
    FKernelError,
    ModelError,
    ModelWarning,
    NonFiniteError,
    OptimizerStateError,
    PlanError,
    PreconditionerWarning,
    ProcessError,
    ResultsError,
    RolloutError,
    RolloutWarning,
    StoreError,
    TreeError,
)

__version__ = "0.1.0"

__all__ = [
    "BatchError",
    "Calibration",
    "CheckpointError",
    "CheckpointWarning",
    "Estimate",
    "FKernelError",
    "ModelError",
    "ModelWarning",
    "NonFiniteError",
    "OptimizerStateError",
    "Option",
    "PlanError",
    "PreconditionerWarning",
    "ProcessError",
    "ResultsError",
    "RolloutError",
    "RolloutWarning",
    "Rounded",
    "StepEffect",
    "StoreError",
    "Strategy",
    "TreeError",
    "calibrate",
    "estimate",
    "explain_step",
    "func",
    "influence",
    "kernel",
    "loss_gradient",
    "low_precision_kernel",
    "precond",
    "realised_change",
    "reuse_memory",
    "state_against_step",
    "tree",
]
