"""What a kernel will take, and how to compute it within a memory grant: workload / rates → options → choice."""

from fkernel.engine.planning.estimate import Estimate, choose, estimate
from fkernel.engine.planning.machine import Rates, rates
from fkernel.engine.planning.strategy import Option, Strategy, usual_microbatch
from fkernel.engine.planning.workload import Workload

__all__ = ["Estimate", "Option", "Rates", "Strategy", "Workload", "choose", "estimate", "rates", "usual_microbatch"]
