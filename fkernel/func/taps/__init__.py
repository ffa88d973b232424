"""Per-sequence gradients of a microbatch: by one plain pass with taps, by vmap, or one at a time."""

from fkernel.func.taps.plan import GradientPlan
from fkernel.func.taps.rows import ONE_AT_A_TIME, handle_pieces, handles_of, make_plan, plan_of, pull_back

__all__ = ["ONE_AT_A_TIME", "GradientPlan", "handle_pieces", "handles_of", "make_plan", "plan_of", "pull_back"]
