"""Every test has its turn, and whoever names a test gets it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jaxtyping import TypeCheckError

import fkernel
from tests import turns, typecheck

ROOT = Path(fkernel.__file__).parent
SOURCES = pytest.Config.ArgsSource


def item(n: int | None) -> Any:
    marks = {} if n is None else {"turns": pytest.mark.turns(n).mark}
    return SimpleNamespace(get_closest_marker=marks.get)


def config(source: Any = SOURCES.TESTPATHS, keyword: str = "", markexpr: str = "") -> Any:
    return SimpleNamespace(args_source=source, option=SimpleNamespace(keyword=keyword, markexpr=markexpr))


@pytest.mark.parametrize("first", [0, 7, 384])
def test_each_is_tried_once_in_as_many_runs_as_it_says(first):
    shares = (None, 4, 4, 3, None, 4, 3, 4, 4, 3, 3)
    items = [*map(item, shares)]
    tried = dict.fromkeys(range(len(items)), 0)
    for turn in range(first, first + 12):
        left = turns.waiting(items, turn)
        for k, each in enumerate(items):
            tried[k] += each not in left
    assert tried == {
        k: 12 // (each.get_closest_marker("turns") or pytest.mark.turns(1)).args[0] for k, each in enumerate(items)
    }
    assert turns.waiting(items, None) == []


def test_a_selection_is_run_whole(monkeypatch):
    monkeypatch.setattr(turns, "ALL", False)
    assert isinstance(turns.turn_of(config()), int)
    assert turns.turn_of(config(source=SOURCES.ARGS)) is None
    assert turns.turn_of(config(keyword="adam")) is None
    assert turns.turn_of(config(markexpr="turns")) is None
    monkeypatch.setattr(turns, "ALL", True)
    assert turns.turn_of(config()) is None


def test_every_module_is_checked_once_in_as_many_runs_as_there_are_turns(monkeypatch):
    modules = [".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in ROOT.rglob("*.py")]
    left = []
    for turn in range(5, 5 + typecheck.TURNS):
        monkeypatch.setattr(typecheck, "turn", turn)
        left.append({module for module in modules if typecheck.waits(module)})
    assert all(sum(module in each for each in left) == typecheck.TURNS - 1 for module in modules)
    monkeypatch.setattr(typecheck, "turn", None)
    assert not any(map(typecheck.waits, modules))


@pytest.mark.parametrize("turn", [None, *range(typecheck.TURNS)])
def test_annotations_are_executed_in_their_turn(turn, monkeypatch):
    def half(x: int) -> float:
        return x / 2

    half.__qualname__ = "half"  # as a function of a module
    monkeypatch.setattr(typecheck, "turn", turn)
    call: Any = typecheck.checked(half, typechecker=typecheck.check)
    with nullcontext() if typecheck.waits(__name__) else pytest.raises(TypeCheckError):
        assert call(3.0) == 1.5
