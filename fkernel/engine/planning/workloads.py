"""The work of a kernel between two batches, counted in advance.

Work is counted on one sequence of the greatest length, and for ragged batches on two shorter ones, by running the
engine on fake tensors (`fkernel.engine.planning.work`). The cost of a transformer's pass is a polynomial of second
degree in the number of tokens, so three lengths determine it.
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
from fkernel.func.handles import Concat, Factored, Handles, Sum, compress, tensors
from fkernel.func.inputs import (
    Function,
    Sequences,
    bare,
    computed_like,
    cut,
    find_sequences,
    is_half,
    take,
    token_counts,
    trim,
)
from fkernel.func.layers import cut_of
from fkernel.func.taps import GradientPlan, handles_of
from fkernel.func.trust import plan_of
from fkernel.shapes import Tree

LONG = 1024
"""Sequences of more tokens are computed layer by layer where possible: whole gradients would take gigabytes."""


HALVES = "Weights in half precision are cast layer by layer"


class Ready(NamedTuple):
    """A batch's gradients that are already kept, in microbatches.

    Attributes:
        where: "memory" or "disk".
        token_bytes: bytes of handles per token.
        rows: sequences of the largest microbatch, the fewest that are read at a time.
    """

    where: Literal["memory", "disk"]
    token_bytes: float
    rows: int


class Workload:
    """Counted work.

    Attributes:
        tokens: {"E": tokens of each sequence, "U": …}, longest first.
        size: parameters.
        itemsize: bytes of one.
        forming: floating-point operations to multiply out one token's factors.
        curve: work of one sequence's gradient in handles, by its tokens; None where it was not counted.
        dense_U: whether U's gradients must be dense rows, because the preconditioner is an arbitrary function.
        widest: largest share of the handles' bytes of one parameter.
        walk: the same layer by layer, or the reason why that is impossible.
        ready: batches whose gradients are kept, and not computed.
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
        """Return the same work for sequences of other lengths, where some gradients may be ready."""
        tokens = {side: sorted(counts, reverse=True) for side, counts in (("E", E), ("U", U))}
        load = Workload(
            tokens, self.size, self.itemsize, self.forming, self.curve, self.dense_U, self.widest, self.walk
        )
        load.ready = dict(ready)
        return load

    def gradients(self, t: float) -> Work:
        """Return the work of the gradient of one sequence of t tokens."""
        assert self.curve is not None
        return self.curve(t)

    def impossible(self, name: str) -> str:
        """Say why a strategy is impossible; empty where it is possible."""
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
        """Tokens of the longest sequence, among those whose gradients are computed where there are any."""
        own = {side: counts for side, counts in self.tokens.items() if side not in self.ready}
        return max(max(counts) for counts in (own or self.tokens).values())

    def producing(self, side: str, tokens: int | None, rates: Rates) -> float:
        """Predict the seconds to compute one batch's handles, in microbatches of at most `tokens`, or to read them."""
        counts = self.tokens[side]
        if side in self.ready:
            from_disk = self.ready[side].where == "disk"
            return self.ready[side].token_bytes * sum(counts) / rates.read if from_disk else 0.0
        work = (
            self.gradients(counts[rows.start]).times(rows.stop - rows.start) for rows in _cuts(tuple(counts), tokens)
        )
        return sum(map(rates.seconds, work))

    def multiplying(self, side: str, rates: Rates) -> float:
        """Predict the seconds to multiply out one batch's handles: rows are written, dense leaves copied."""
        n, tokens = len(self.tokens[side]), sum(self.tokens[side])
        return tokens * self.forming / rates.forming + 2.0 * n * self.row / rates.moved

    def kept_by(self, side: str, n: int) -> int:
        """Return the bytes of one sequence's handles, averaged over a batch's n longest."""
        if side in self.ready:
            return int(self.ready[side].token_bytes * sum(self.tokens[side][:n])) // n
        return sum(self.kept(t) for t in self.tokens[side][:n]) // n

    def kept(self, t: int) -> int:
        """Return the bytes of the handles of one sequence of t tokens."""
        return max(0, self.gradients(t).kept)

    def peak(self, t: int) -> int:
        """Return the peak bytes while they are computed."""
        return max(self.gradients(t).peak, self.kept(t))


@lru_cache(64)
def _cuts(counts: tuple[int, ...], tokens: int | None) -> list[slice]:
    """Cut a batch; cached, since many forms of a strategy share a cut."""
    return cut(counts, tokens)


def workload(f: Function, params: Tree, E: Any, U: Any, dense_U: bool = False) -> Workload:
    """Count the work of a kernel between two batches.

    Args:
        f: (params, batch) -> [n].
        params: θ.
        E: the evaluation batch.
        U: the update batch.
        dense_U: whether U's gradients must be dense rows.
    """
    counts = {side: token_counts(batch) for side, batch in (("E", E), ("U", U))}
    tokens = {side: sorted(each, reverse=True) for side, each in counts.items()}
    side, batch = ("E", E) if tokens["E"][0] >= tokens["U"][0] else ("U", U)
    longest = counts[side].index(tokens[side][0])
    one = trim(take(batch, slice(longest, longest + 1)))
    walk = _walk(f, params, U, tokens, dense_U)
    if is_half(params) and isinstance(walk, str):
        raise ModelError(f"{HALVES}, and f cannot be: {walk}. Convert them: fkernel.tree.cast(params, torch.float32).")
    if not isinstance(walk, str) and (is_half(params) or max(tokens["E"][0], tokens["U"][0]) > LONG):
        return Workload(tokens, tree.size(params), computed_like(params).element_size(), 0.0, None, walk=walk)
    load = counted(f, params, one, tokens, plan_of(f, params, U), dense_U)
    load.walk = walk
    return load


def _walk(f: Function, params: Tree, U: Any, tokens: dict[str, list[int]], dense_U: bool) -> Walk | str:
    """Count the same layer by layer, or say why that is impossible."""
    if dense_U:
        return "the preconditioner is no diagonal, and needs whole gradients"
    cut = cut_of(f, params, U)
    return cut if isinstance(cut, str) else walk_of(cut, params, tokens)


def counted(
    f: Function, params: Tree, one: Any, tokens: dict[str, list[int]], plan: GradientPlan, dense_U: bool = False
) -> Workload:
    """Count on a batch of one, the longest sequence, for batches of known lengths, longest first.

    Parameters and batch may be on the meta device: no value is read.
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


def _shortened(one: Any, shares: tuple[float, ...]) -> list[tuple[int, Any]]:
    """Shorten a batch of one that is a `Sequences`; empty for any other batch."""
    if len(find_sequences(one)) != 1 or not isinstance(one, Sequences):
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
        case _:
            return 0.0
