"""Memory and time of a kernel, and the choice of a strategy within a memory budget: workload / rates → options."""

from fkernel.engine.planning.curve import Curve
from fkernel.engine.planning.estimates import Estimate, choose, estimate, weighed
from fkernel.engine.planning.in_shards import bytes_in_shards
from fkernel.engine.planning.kept import (
    HELD,
    Where,
    choose_making,
    choose_meeting,
    choose_tile,
    load_of,
    making,
    read_load,
    ungranted,
)
from fkernel.engine.planning.machine import Rates, rates
from fkernel.engine.planning.passes import bytes_of
from fkernel.engine.planning.ranks_cost import GPUS, Gpu, RanksCost, cost_in_shards, cost_on_ranks
from fkernel.engine.planning.strategy import Option, Strategy, cost, usual_microbatch
from fkernel.engine.planning.walking import Walk, walk_of
from fkernel.engine.planning.work import Work
from fkernel.engine.planning.workloads import LONG, Ready, Workload, counted

__all__ = [
    "GPUS",
    "HELD",
    "LONG",
    "Curve",
    "Estimate",
    "Gpu",
    "Option",
    "RanksCost",
    "Rates",
    "Ready",
    "Strategy",
    "Walk",
    "Where",
    "Work",
    "Workload",
    "bytes_in_shards",
    "bytes_of",
    "choose",
    "choose_making",
    "choose_meeting",
    "choose_tile",
    "cost",
    "cost_in_shards",
    "cost_on_ranks",
    "counted",
    "estimate",
    "load_of",
    "making",
    "rates",
    "read_load",
    "ungranted",
    "usual_microbatch",
    "walk_of",
    "weighed",
]
