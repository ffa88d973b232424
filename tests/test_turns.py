"""Every test has its turn, and whoever names a test gets it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests import turns

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
