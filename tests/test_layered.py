"""What is asked of two sides, layer by layer: whichever side is held, in tiles of any size, along any path."""

from __future__ import annotations

import pytest
import torch

import fkernel as fk
from fkernel.engine.batching import SortedBatch
from fkernel.engine.path import NODES
from fkernel.engine.planning import Strategy, choose
from fkernel.engine.planning.machine import Rates
from fkernel.engine.planning.walking import tiles_of, walk_of
from fkernel.engine.problem import Problem, blocks
from fkernel.func.handles.products import ProductSpec, RowSpec
from fkernel.func.inputs.batch import take
from fkernel.func.layers.cutting import cut_of
from tests.cases import EXAMPLES
from tests.laws import close

CASE = EXAMPLES[1]
RATES = Rates(flops=1e11, moved=1e10, call=5e-6, forming=1e11, write=1e9, read=2e9)


def spec(case) -> ProductSpec:
    """A kernel with a diagonal, by parts, and of each side by itself something else."""
    D = {name: leaf.abs() + 0.1 for name, leaf in case.tree(21).items()}
    of_E, of_U = RowSpec({"along": case.tree(22)}, {"norm": None}), RowSpec({"along": case.tree(24)}, {"norm": D})
    return ProductSpec({"D": D, "plain": None}, of_E, of_U, key=lambda name: name.split(".")[0])


def collected(problem: Problem, strategy: Strategy) -> dict[str, torch.Tensor]:
    """All of it, in the caller's order; U by itself is the first block's."""
    assert problem.U is not None
    n, m, found = len(problem.E), len(problem.U), list(blocks(problem, strategy))
    sums = {what: torch.full((n, m), torch.nan, dtype=torch.float64) for what in ("D", "plain")}
    sums |= {f"E {what}": torch.full((n,), torch.nan, dtype=torch.float64) for what in ("along", "norm")}
    for block in found:
        for what in ("D", "plain"):
            sums[what][block.at] = block.kernel(what)
        for what in ("along", "norm"):
            sums[f"E {what}"][block.at] = block.rows(what)
    return sums | {f"U {what}": found[0].columns(what) for what in ("along", "norm")}


@pytest.mark.turns(6)
@pytest.mark.parametrize("path", NODES)
@pytest.mark.parametrize("held", ["E", "U"])
def test_tiles_of_either_side_along_any_path_give_what_whole_sequences_give(held, path):
    S, params, E, U = CASE.engine(fk)
    T, step = max(E.input_ids.shape[1], U.input_ids.shape[1]), CASE.tree(23, 0.05)
    problem = Problem(params, SortedBatch("E", E, S), SortedBatch("U", U, S), spec(CASE), path, step)
    expected = collected(problem, Strategy("sequences", "E", None, None, None))
    for tile, block, tokens, every in ((None, None, 0, 1), (T, None, 0, 2), (T, 2 * T, 2 * T, 1), (None, T, T, 2)):
        found = collected(problem, Strategy("layers", held, tile, block, tokens, every))
        for what, sums in expected.items():
            close(found[what], sums, 1e-12)


@pytest.mark.parametrize("held", ["E", "U"])
def test_a_side_with_itself_in_tiles(held):
    S, params, _, U = CASE.engine(fk)
    side = SortedBatch("U", U, S)
    problem = Problem(params, side, side, spec(CASE))
    expected = collected(problem, Strategy("sequences", "E", None, None, None))
    for tile in (None, U.input_ids.shape[1]):
        found = collected(problem, Strategy("layers", held, tile, None, 0))
        for what, sums in expected.items():
            close(found[what], sums, 1e-12)


def test_tiles_take_less_memory_and_more_time():
    S, params, _, U = CASE.engine(fk)
    cut = cut_of(S, params, U)
    assert not isinstance(cut, str)
    tokens = {"E": [8] * 6, "U": [8] * 3}
    walk = walk_of(cut, params, tokens)

    def forecast(held: str, tile: int | None) -> tuple[int, float]:
        seconds = walk.seconds(tokens, 1000, 8, RATES, 1, 0, held, tile)
        return walk.memory(tokens, 8, 1, 0, held, tile), seconds

    whole, halves, ones = (forecast("E", tile) for tile in (None, 24, 8))
    assert whole[0] > halves[0] > ones[0]
    assert whole[1] < halves[1] < ones[1]
    assert forecast("U", None)[0] < whole[0]  # the smaller side is held for less
    assert forecast("E", 48) == whole
    passing = walk.memory(tokens, 8, 1, 0, "E", None, 8), walk.seconds(tokens, 1000, 8, RATES, 1, 0, "E", None, 8)
    assert passing[0] < whole[0]
    assert passing[1] > whole[1]


def test_tiles_hold_every_sequence_once():
    counts = [9, 5, 5, 4, 1, 1]
    for tile in (None, 1, 5, 9, 10, 25):
        tiles = tiles_of(counts, tile)
        assert [i for rows in tiles for i in range(rows.start, rows.stop)] == [*range(6)]
        assert tile is None or all(sum(counts[rows]) <= tile or rows.stop - rows.start == 1 for rows in tiles)


def test_with_no_grant_the_smaller_side_is_held():
    S, params, E, _ = CASE.engine(fk)
    one, half = take(E, slice(0, 1)), fk.tree.cast(params, torch.bfloat16)
    assert choose(S, half, E, one, None, 8, False, False).held == "U"
    assert choose(S, half, one, E, None, 8, False, False).held == "E"
