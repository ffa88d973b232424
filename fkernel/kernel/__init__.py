"""func and precond meet: kernels, influence without kernels, and one optimizer step explained."""

from fkernel.kernel.calibration import Calibration, calibrate
from fkernel.kernel.fisher import influence, kernel
from fkernel.kernel.planning import Estimate, Option, Strategy, estimate
from fkernel.kernel.recycling import recycled
from fkernel.kernel.rounded import Rounded, rounded_kernel
from fkernel.kernel.state_certificate import state_against_step
from fkernel.kernel.step import StepEffect, explain_step, loss_gradient, realised_change

__all__ = [
    "Calibration",
    "Estimate",
    "Option",
    "Rounded",
    "StepEffect",
    "Strategy",
    "calibrate",
    "estimate",
    "explain_step",
    "influence",
    "kernel",
    "loss_gradient",
    "realised_change",
    "recycled",
    "rounded_kernel",
    "state_against_step",
]
