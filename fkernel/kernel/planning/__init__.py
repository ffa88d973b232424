"""What a kernel will take, and how to compute it within a memory grant: workload / rates → options → choice."""

from fkernel.kernel.planning.estimate import Estimate, choose, estimate
from fkernel.kernel.planning.machine import Rates, rates
from fkernel.kernel.planning.strategy import Option, Strategy, usual_microbatch
from fkernel.kernel.planning.workload import Workload

__all__ = ["Estimate", "Option", "Rates", "Strategy", "Workload", "choose", "estimate", "rates", "usual_microbatch"]
