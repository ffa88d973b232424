"""Forecast of `fkernel run PLAN`: memory, disk and time of its phases, from the planner.

    U's gradients     computed once, written to the workspace or kept in memory
    U with itself     K_UU, tile by tile
    each request      E's gradients against U's stored ones; then two evaluations of E, before and after the step

Gradients of long sequences of U are recomputed: for their weighted sum, for K_UU, and for every E.

    memory = θ + the optimizer's moments + vectors of the step + the largest of  phases beside them

Strategies are chosen as in the run (`fkernel.engine.planning.kept`), from the checkpoint's weights and the sequences'
lengths; `Forecast.assumed` lists assumptions.
"""

from __future__ import annotations

from time import process_time
from typing import Any, NamedTuple

import torch

from fkernel import func
from fkernel.checkpoint import Checkpoint
from fkernel.engine import ALONE, NODES, SortedBatch, choose_walk, walk_load, walking_alone
from fkernel.engine.planning import (
    HELD,
    Option,
    Rates,
    Ready,
    Strategy,
    Where,
    Workload,
    choose_making,
    choose_meeting,
    choose_tile,
    cost,
    load_of,
    making,
    rates,
    ungranted,
    usual_microbatch,
)
from fkernel.io import parse_bytes
from fkernel.study.analyses.registry import ANALYSES
from fkernel.study.config.plan import FisherKernelPlan
from fkernel.study.in_shards import check_has_forecast
from fkernel.study.lengths import lengths_of
from fkernel.study.policy import policy_of
from fkernel.study.rows import Policy

BESIDE = tuple(name for name, analysis in ANALYSES.items() if analysis.accumulator is None)
"""Analyses whose own passes are not in a forecast."""
PARTS = 4
"""Vectors of a step: P, and Δθ in three parts. A request also has their sum and the nodes of the path."""
FORWARD = 1 / 3
"""Work of an evaluation, relative to a gradient."""


class Phase(NamedTuple):
    """A part of a run.

    Attributes:
        name: the phase.
        sequences: whose gradients are computed or read.
        tokens: of the longest.
        memory: bytes beside the model and the optimizer's moments: vectors of the step, gradients, activations.
        disk: bytes written.
        seconds: predicted time.
        strategy: the planner's.
    """

    name: str
    sequences: int
    tokens: int
    memory: int
    disk: int
    seconds: float
    strategy: Strategy


class Forecast(NamedTuple):
    """Predicted memory, disk and time of a run.

    Attributes:
        phases: in order.
        parameters: how many are differentiated.
        model: bytes of θ and the optimizer's moments.
        grant: `numerics.memory` in bytes; None where there is none.
        assumed: assumptions, a sentence each.
        uncounted: analyses whose own passes are in none of it.
    """

    phases: tuple[Phase, ...]
    parameters: int
    model: int
    grant: int | None
    assumed: tuple[str, ...]
    uncounted: tuple[str, ...] = ()

    @property
    def memory(self) -> int:
        """Peak bytes, without the interpreter and its libraries."""
        return self.model + max(phase.memory for phase in self.phases)

    @property
    def disk(self) -> int:
        """Bytes of the workspace's gradients."""
        return sum(phase.disk for phase in self.phases)

    @property
    def seconds(self) -> float:
        """Sum over all phases."""
        return sum(phase.seconds for phase in self.phases)


def forecast(plan: FisherKernelPlan, loaded: Checkpoint | None = None) -> Forecast:
    """Predict memory, disk and time of a run.

    memory = θ + moments + step's vectors + max over phases,  seconds = Σ over phases

    Args:
        plan: the plan; nothing is sampled, differentiated or written.
        loaded: its checkpoint; None to load its weights.

    Returns:
        The forecast; this machine's rates are measured if they are not cached.

    Raises:
        BatchError: `numerics.memory` is too small for a phase; the message says what would be enough.
        PlanError: a batch is returned by a callback, so that its lengths are unknown; or the plan is in shards.
    """
    check_has_forecast(plan)
    loaded = loaded or plan.checkpoint.load_weights(getattr(torch, plan.numerics.dtype))
    lengths, assumed = lengths_of(plan, loaded)
    return _forecast(plan, loaded, lengths, assumed)


class _Machine(NamedTuple):
    """The inputs of all phases."""

    plan: FisherKernelPlan
    load: Workload
    speed: Rates
    grant: int | None
    counting: float
    where: Where

    def microbatch(self, tokens: list[int]) -> int:
        """Sequences per pass, without a memory limit."""
        return usual_microbatch(self.plan.numerics.microbatch, _sequences([max(tokens)]))


def _forecast(
    plan: FisherKernelPlan, loaded: Checkpoint, lengths: dict[str, list[int]], assumed: list[str]
) -> Forecast:
    policy = policy_of(plan, loaded, 1.0)
    U = SortedBatch("U", _sequences(lengths["U"]), policy.f)
    if how := walking_alone(policy.f, policy.params, U, plan.numerics.memory):
        return _of_walks(plan, policy, U, lengths, assumed, how.every)
    every = sorted((t for counts in lengths.values() for t in counts), reverse=True)
    start = process_time()
    load = load_of(policy.params, SortedBatch("E", _sequences(every), policy.f))
    counting = process_time() - start  # with a memory limit, the run does this once per batch, too
    grant = None if plan.numerics.memory is None else parse_bytes(plan.numerics.memory)
    speed = rates(next(iter(policy.params.values())).dtype)
    machine = _Machine(
        plan, load, speed, grant, 0.0 if grant is None else counting, "disk" if plan.storage.persist else "memory"
    )
    counts = lengths.pop("U")
    gradients, ready = _made(machine, counts)
    phases = [gradients]
    if plan.self_kernel or plan.analyses.structure is not None:
        phases.append(_with_itself(machine, counts, ready))
    requests = {str(request.name): request for request in plan.requests}
    phases += [_request(machine, requests[name], E, counts, ready) for name, E in lengths.items()]
    return Forecast(tuple(phases), load.size, 3 * load.row, grant, tuple(assumed), _uncounted(plan))


def _uncounted(plan: FisherKernelPlan) -> tuple[str, ...]:
    """Which analyses' own passes are not counted."""
    every = [request.analyses or plan.analyses for request in plan.requests]
    return tuple(sorted({name for analyses in every for name in BESIDE if getattr(analyses, name)}))


def _of_walks(
    plan: FisherKernelPlan,
    policy: Policy,
    U: SortedBatch,
    lengths: dict[str, list[int]],
    assumed: list[str],
    every: int,
) -> Forecast:
    """Forecast a study whose U is recomputed for every request."""
    params, grant = policy.params, None if plan.numerics.memory is None else parse_bytes(plan.numerics.memory)
    speed, own = rates(next(iter(params.values())).dtype), walk_load(U, U, params)
    machine = _Machine(plan, own, speed, grant, 0.0, "disk" if plan.storage.persist else "memory")

    def meeting(E: SortedBatch, reserved: int = 0) -> Option:
        return cost(walk_load(E, U, params), speed, choose_walk(E, U, params, grant, 1, reserved))

    def alone(side: SortedBatch) -> Option:
        """One side, a sequence at a time: half the time of the side with itself."""
        first, walk = SortedBatch(side.name, _sequences(side.tokens[:1]), policy.f), ALONE._replace(every=every)
        one = cost(walk_load(first, first, params), speed, walk)
        whole = cost(walk_load(side, side, params), speed, walk._replace(tile=None))
        return one._replace(seconds=whole.seconds / 2)

    phases = [_phase(machine, "sum over U", U.tokens, alone(U), 2)]
    if plan.self_kernel or plan.analyses.structure is not None:
        itself = meeting(U)
        phases.append(_phase(machine, "U with itself", U.tokens, itself._replace(seconds=itself.seconds / 2), PARTS))
    nodes = len(NODES[plan.step.path])
    for request in plan.requests:
        capture, analyses = request.capture or plan.capture, request.analyses or plan.analyses
        E = SortedBatch("E", _sequences(lengths[str(request.name)]), policy.f)
        permuted = analyses.uncertainty is not None and plan.preconditioner.form == "post-step"
        reserved, single = own.row * (bool(analyses.ledger) + permuted), alone(E)
        if not capture.influence_only or analyses.of_rows:
            option = meeting(E, reserved)
        else:
            option = single._replace(seconds=single.seconds + alone(U).seconds)
        seconds = option.seconds + (nodes - 1 + 2 * FORWARD * capture.realised) * single.seconds
        option = option._replace(memory=option.memory + reserved, seconds=seconds)
        phases.append(_phase(machine, f"request {request.name}", E.tokens, option, PARTS + 1 + nodes))
    return Forecast(tuple(phases), own.size, 3 * own.row, grant, tuple(assumed), _uncounted(plan))


def _made(machine: _Machine, U: list[int]) -> tuple[Phase, Ready]:
    """The phase of U's gradients, and where they are stored."""
    load, m, where = machine.load.of(U, U, {}), machine.microbatch(U), machine.where
    whole = sum(map(load.kept, load.tokens["E"]))
    if machine.grant is not None:
        option = choose_making(load, machine.grant, machine.speed, m, where)
        option = option._replace(seconds=option.seconds + machine.counting)
    else:  # gradients stay in memory as well as on disk, up to HELD / 2 bytes
        remembered = min(HELD // 2, whole) if where == "disk" else 0
        option = making(load, machine.speed, m, where, promised=False)
        option = option._replace(memory=option.memory + remembered)
        where = "memory" if remembered == whole else where
    at_once = max(1, (option.strategy.tokens or 1) // max(U))
    # Two vectors: the weighted sum, and one microbatch's part of it.
    return _phase(machine, "gradients of U", U, option, 2), Ready(where, whole / sum(U), min(at_once, len(U)))


def _with_itself(machine: _Machine, U: list[int], ready: Ready) -> Phase:
    load, how = machine.load.of(U, U, dict.fromkeys("EU", ready)), ungranted(U, ready, machine.microbatch(U))
    if machine.grant is None:
        option = cost(load, machine.speed, how._replace(block=how.tile))
    else:
        option = choose_tile(load, machine.grant, machine.speed)
    return _phase(machine, "U with itself", U, option, PARTS)


def _request(machine: _Machine, request: Any, E: list[int], U: list[int], ready: Ready) -> Phase:
    """A request's pass over E and U, and the evaluations of E."""
    plan, speed = machine.plan, machine.speed
    capture, analyses = request.capture or plan.capture, request.analyses or plan.analyses
    load, m = machine.load.of(E, U, {"U": ready}), machine.microbatch(E)
    needs_K = not capture.influence_only or analyses.of_rows
    permuted = analyses.uncertainty is not None and plan.preconditioner.form == "post-step"
    reserved = load.row * (bool(analyses.ledger) + permuted)
    if machine.grant is None:
        option = cost(load, speed, ungranted(load.tokens["E"], ready, m))
    else:
        option = choose_meeting(load, machine.grant, speed, m, reserved)
    gradients = load.producing("E", option.strategy.tokens, speed)
    seconds = option.seconds + machine.counting + (len(NODES[plan.step.path]) - 1) * gradients
    if capture.realised:
        seconds += 2 * FORWARD * gradients
    if permuted:  # a second kernel
        seconds += 2.0 * len(E) * len(U) * load.size / speed.flops
    if not needs_K:
        seconds = gradients + load.multiplying("E", speed) + load.producing("U", None, speed)
    option = option._replace(memory=option.memory + reserved, seconds=seconds)
    return _phase(machine, f"request {request.name}", E, option, PARTS + 1 + len(NODES[plan.step.path]))


def _phase(machine: _Machine, name: str, counts: list[int], option: Option, vectors: int) -> Phase:
    memory = option.memory + vectors * machine.load.row
    return Phase(name, len(counts), max(counts), memory, option.disk, option.seconds, option.strategy)


def _sequences(counts: list[int]) -> func.Sequences:
    return func.pad([[0]] * len(counts), [[0] * (max(2, t) - 1) for t in counts])
