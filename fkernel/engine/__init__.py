"""func and precond meet: kernels, influence without kernels, and one optimizer step explained."""

from fkernel.engine.calibration import Calibration, calibrate
from fkernel.engine.fisher import influence, kernel
from fkernel.engine.planning import Estimate, Option, Strategy, estimate
from fkernel.engine.recycling import recycled
from fkernel.engine.rounded import Rounded, rounded_kernel
from fkernel.engine.state_certificate import state_against_step
from fkernel.engine.step import StepEffect, explain_step, loss_gradient, realised_change

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
