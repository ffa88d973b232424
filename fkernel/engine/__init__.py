"""Kernels, influence without kernels, and one optimizer step explained."""

from fkernel.engine.adjoint import Executed, RunStep, StepColumns
from fkernel.engine.batching import SortedBatch, check_side, cuts_of
from fkernel.engine.calibration import Calibration, calibrate
from fkernel.engine.correlation import mean_ranks, pearson, varies
from fkernel.engine.directions import effects_along
from fkernel.engine.executed import Microbatch, gradient_in
from fkernel.engine.fisher import influence, kernel
from fkernel.engine.from_store import complete
from fkernel.engine.gradients import Gradients, Read, Summing, computed
from fkernel.engine.layerwise import gradient_sum
from fkernel.engine.low_precision import Rounded, low_precision_kernel
from fkernel.engine.params_in_shards import own_part
from fkernel.engine.path import NODES, Nodes, mean_of, nodes_of
from fkernel.engine.planning import Estimate, Option, Strategy, estimate
from fkernel.engine.problem import Problem, blocks
from fkernel.engine.progress import listening, part_done
from fkernel.engine.recycling import kept_or_returned, reuse_memory
from fkernel.engine.run import RunAccount, Sweep, account
from fkernel.engine.sharded_gradients import ShardedGradients
from fkernel.engine.state_certificate import state_against_step
from fkernel.engine.step import StepEffect, explain_step, loss_gradient, realised_change
from fkernel.engine.step_on_shards import clipped_over
from fkernel.engine.streaming import KernelBlock, contraction, self_kernel
from fkernel.engine.sums import evaluated, weighted_gradient
from fkernel.engine.sums_in_shards import values_of_step
from fkernel.engine.walked import (
    ALONE,
    WalkedGradients,
    choose_alone,
    choose_walk,
    problem_of,
    walk_load,
    walking_alone,
)

__all__ = [
    "ALONE",
    "NODES",
    "Calibration",
    "Estimate",
    "Executed",
    "Gradients",
    "KernelBlock",
    "Microbatch",
    "Nodes",
    "Option",
    "Problem",
    "Read",
    "Rounded",
    "RunAccount",
    "RunStep",
    "ShardedGradients",
    "SortedBatch",
    "StepColumns",
    "StepEffect",
    "Strategy",
    "Summing",
    "Sweep",
    "WalkedGradients",
    "account",
    "blocks",
    "calibrate",
    "check_side",
    "choose_alone",
    "choose_walk",
    "clipped_over",
    "complete",
    "computed",
    "contraction",
    "cuts_of",
    "effects_along",
    "estimate",
    "evaluated",
    "explain_step",
    "gradient_in",
    "gradient_sum",
    "influence",
    "kept_or_returned",
    "kernel",
    "listening",
    "loss_gradient",
    "low_precision_kernel",
    "mean_of",
    "mean_ranks",
    "nodes_of",
    "own_part",
    "part_done",
    "pearson",
    "problem_of",
    "realised_change",
    "reuse_memory",
    "self_kernel",
    "state_against_step",
    "values_of_step",
    "varies",
    "walk_load",
    "walking_alone",
    "weighted_gradient",
]
