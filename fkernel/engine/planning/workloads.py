"""What a kernel between two batches has to do, counted before it is done.

Work is counted on one sequence of the greatest length, and for ragged batches on two shorter ones, by running the
engine on tensors without storage (`fkernel.engine.planning.work`). Everything in a transformer's pass is a polynomial
of second degree in the number of tokens, so three lengths give all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

from fkernel import tree
from fkernel.engine.planning.curve import Curve
from fkernel.engine.planning.machine import Rates
from fkernel.engine.planning.walking import Walk, walk_of
from fkernel.engine.planning.work import Work, count_cost
from fkernel.errors import ModelError
from fkernel.func.handles import Concat, Factored, Handles, SparseRows, Sum, compress, tensors
from fkernel.func.inputs import (
    Function,
    Sequences,
    bare,
    cut,
    find_sequences,
    is_half,
    length,
    lengths,
    take,
    trim,
    widened,
)
from fkernel.func.layers import cut_of
from fkernel.func.taps import GradientPlan, handles_of
from fkernel.func.trust import plan_of
from fkernel.shapes import Tree

LONG = 1024
"""Tokens of a sequence beyond which it is computed layer by layer, where it can be: whole it would take gigabytes."""


HALVES = "Weights in half precision are cast layer by layer"


class Ready(NamedTuple):
    """Gradients of a side that were made before, in microbatches.

    Attributes:
        where: they are: held in memory, or on disk.
        token_bytes: of their handles, a token.
        rows: sequences of its largest microbatch; no fewer are read at a time.
    """

    where: Literal["memory", "disk"]
    token_bytes: float
    rows: int


class Workload:
    """What is to be done, in numbers.

    Attributes:
        tokens: {"E": tokens of each sequence, "U": …}, longest first.
        size: parameters.
        itemsize: bytes of one.
        forming: floating-point operations that multiplying out one token's factors takes.
        curve: work of one sequence's gradient in handles, by its tokens; None where it was not counted.
        dense_U: whether U's gradients must be rows, because the preconditioner is an arbitrary function.
        widest: share of the handles' bytes that one parameter takes, at most.
        walk: the same layer by layer; or why it cannot be done so.
        ready: sides whose gradients were made before, and are not computed.
    """

    def __init__(
        self,
        tokens: dict[str, list[int]],
        size: int,
        itemsize: int,
        forming: float,
        gradients: Curve | None,
        dense_U: bool = False,
        widest: float = 1.0,
        walk: Walk | str = "not counted",
    ) -> None:
        """Take the numbers."""
        self.walk, self.ready = walk, dict[str, Ready]()
        self.tokens, self.size, self.itemsize = tokens, size, itemsize
        self.forming, self.curve, self.dense_U, self.widest = forming, gradients, dense_U, widest

    def of(self, E: Sequence[int], U: Sequence[int], ready: Mapping[str, Ready]) -> Workload:
        """Take the same work for sequences of other lengths, where some gradients may be ready."""
        tokens = {side: sorted(counts, reverse=True) for side, counts in (("E", E), ("U", U))}
        found = Workload(
            tokens, self.size, self.itemsize, self.forming, self.curve, self.dense_U, self.widest, self.walk
        )
        found.ready = dict(ready)
        return found

    def gradients(self, t: float) -> Work:
        """Work of one whole sequence's gradient of t tokens."""
        assert self.curve is not None
        return self.curve(t)

    def impossible(self, name: str) -> str:
        """Say why a kernel cannot be computed in one of the ways; nothing where it can."""
        if self.ready:
            return "" if name == "sequences" else "the gradients of one side are there"
        if name == "layers":
            return self.walk if isinstance(self.walk, str) else ""
        why = f"sequences of more than {LONG} tokens, and weights in half precision, are computed layer by layer"
        return why if self.curve is None else ""

    @property
    def row(self) -> int:
        """Bytes of one dense gradient."""
        return self.size * self.itemsize

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence; of those whose gradients are computed, where some are."""
        own = {side: counts for side, counts in self.tokens.items() if side not in self.ready}
        return max(max(counts) for counts in (own or self.tokens).values())

    def producing(self, side: str, tokens: int | None, rates: Rates) -> float:
        """Predict the seconds that one side's handles take, in microbatches of at most so many tokens, or read."""
        counts = self.tokens[side]
        if side in self.ready:
            from_disk = self.ready[side].where == "disk"
            return self.ready[side].token_bytes * sum(counts) / rates.read if from_disk else 0.0
        work = (
            self.gradients(counts[rows.start]).times(rows.stop - rows.start) for rows in _cuts(tuple(counts), tokens)
        )
        return sum(map(rates.seconds, work))

    def multiplying(self, side: str, rates: Rates) -> float:
        """Predict the seconds that multiplying out one side's handles takes: rows are written, dense leaves copied."""
        n, tokens = len(self.tokens[side]), sum(self.tokens[side])
        return tokens * self.forming / rates.forming + 2.0 * n * self.row / rates.moved

    def kept_by(self, side: str, n: int) -> int:
        """Bytes that the handles of one sequence take, on average over a side's n longest."""
        if side in self.ready:
            return int(self.ready[side].token_bytes * sum(self.tokens[side][:n])) // n
        return sum(self.kept(t) for t in self.tokens[side][:n]) // n

    def kept(self, t: int) -> int:
        """Bytes that the handles of one sequence of t tokens take."""
        return max(0, self.gradients(t).kept)

    def peak(self, t: int) -> int:
        """Bytes that are alive at once, at most, while they are made."""
        return max(self.gradients(t).peak, self.kept(t))


@lru_cache(64)
def _cuts(counts: tuple[int, ...], tokens: int | None) -> list[slice]:
    """Cut a side once: many forms of a strategy share a cut."""
    return cut(counts, tokens)


def workload(f: Function, params: Tree, E: Any, U: Any, dense_U: bool = False) -> Workload:
    """Count what a kernel between two batches has to do.

    Args:
        f: (params, batch) -> [n].
        params: θ.
        E: the evaluation batch.
        U: the update batch.
        dense_U: whether U's gradients must be rows.
    """
    counts = {side: _each(batch) for side, batch in (("E", E), ("U", U))}
    tokens = {side: sorted(each, reverse=True) for side, each in counts.items()}
    side, batch = ("E", E) if tokens["E"][0] >= tokens["U"][0] else ("U", U)
    longest = counts[side].index(tokens[side][0])
    one = trim(take(batch, slice(longest, longest + 1)))
    walk = _walk(f, params, U, tokens, dense_U)
    if is_half(params) and isinstance(walk, str):
        raise ModelError(f"{HALVES}, and f cannot be: {walk}. Convert them: fkernel.tree.cast(params, torch.float32).")
    if not isinstance(walk, str) and (is_half(params) or max(tokens["E"][0], tokens["U"][0]) > LONG):
        leaf = next(iter(params.values()))
        return Workload(tokens, tree.size(params), widened(leaf[..., :0]).element_size(), 0.0, None, walk=walk)
    found = counted(f, params, one, tokens, plan_of(f, params, U), dense_U)
    found.walk = walk
    return found


def _walk(f: Function, params: Tree, U: Any, tokens: dict[str, list[int]], dense_U: bool) -> Walk | str:
    """Count the same layer by layer, or say why it cannot be done so."""
    if dense_U:
        return "the preconditioner is no diagonal, and needs whole gradients"
    cut = cut_of(f, params, U)
    return cut if isinstance(cut, str) else walk_of(cut, params, tokens)


def counted(
    f: Function, params: Tree, one: Any, tokens: dict[str, list[int]], plan: GradientPlan, dense_U: bool = False
) -> Workload:
    """Count on a batch of one, the longest sequence, for sides of known lengths, longest first.

    Parameters and batch may lie on the meta device: no value is looked at.
    """
    made: list[Handles] = []

    def gradient(p: Tree, x: Any) -> Handles:
        handles, _ = handles_of(bare(f), p, x, plan)
        made[:] = [{name: compress(handle, p[name]) for name, handle in handles.items()}]
        return made[0]

    T = max(tokens["E"][0], tokens["U"][0])
    points = [(T, count_cost(gradient, params, one))]
    forming = sum(_forming(handle) for handle in made[0].values()) / T
    sizes = [sum(leaf.numel() * leaf.element_size() for leaf in tensors(handle)) for handle in made[0].values()]
    if len({*tokens["E"], *tokens["U"]}) > 1:
        points += [(t, count_cost(gradient, params, x)) for t, x in _shortened(one, (0.5, 0.25))]
    made.clear()
    leaf = next(iter(params.values()))
    widest = min(1.0, max(sizes) / max(1, points[0][1].kept))
    return Workload(tokens, tree.size(params), leaf.element_size(), forming, Curve(tuple(points)), dense_U, widest)


def _each(batch: Any) -> list[int]:
    counts = lengths(batch)
    return [1] * length(batch) if counts is None else counts.tolist()


def _shortened(one: Any, shares: tuple[float, ...]) -> list[tuple[int, Any]]:
    """Cut the only `Sequences` of a batch of one; a batch that holds several, or is too short, is not cut."""
    found = find_sequences(one)
    if len(found) != 1 or not isinstance(one, Sequences):
        return []
    T = one.input_ids.shape[1]
    cuts = sorted({max(2, round(T * share)) for share in shares} - {T}, reverse=True)
    return [(t, Sequences(*(leaf[:, :t] for leaf in one))) for t in cuts]


def _forming(handle: Any) -> float:
    """Count the operations that multiply out one sequence's factors."""
    match handle:
        case Sum(parts) | Concat(parts):
            return sum(_forming(part) for part in parts)
        case Factored(inputs, cotangents):
            return 2.0 * inputs.shape[1] * inputs.shape[2] * cotangents.shape[2]
        case SparseRows():
            return 0.0
        case _:
            return 0.0
