"""The task is the same for a seed, its splits share nothing, and only the exact answer is rewarded."""

from dataclasses import FrozenInstanceError, replace

import pytest

from fkernel.demo.task import Problem, TaskConfig, addition, reward, splits, subtraction


def test_splits_are_disjoint_and_cover_the_task() -> None:
    train, held_out = splits(TaskConfig())
    names = [p.id for p in train + held_out]
    assert len(names) == len(set(names)) == 2 * 90 * 90
    assert len(held_out) == 1000
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}


def test_splits_depend_on_the_seed_alone() -> None:
    config = TaskConfig(seed=3)
    assert splits(config) == splits(TaskConfig(seed=3))
    assert splits(config) != splits(replace(config, seed=4))


def test_every_prompt_has_six_characters_and_the_right_answer() -> None:
    train, held_out = splits(TaskConfig())
    assert {len(p.prompt) for p in train + held_out} == {6}
    for p in train + held_out:
        a, sign, b = int(p.prompt[:2]), p.prompt[2], int(p.prompt[3:5])
        assert int(p.answer) == (a + b if sign == "+" else a - b)


@pytest.mark.parametrize("text", ["", "0122", "122 ", "+122", "12", "1222", "122<pad>"])
def test_anything_but_the_answer_earns_nothing(text: str) -> None:
    assert reward(addition(37, 85), text) == 0.0


def test_the_answer_earns_one() -> None:
    assert reward(addition(37, 85), "122") == 1.0
    assert reward(subtraction(37, 85), "-48") == 1.0


def test_problems_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Problem("a", "b", "c").answer = "d"  # type: ignore[misc]


@pytest.mark.parametrize(
    "bad", [{"low": 9}, {"high": 100}, {"low": 50, "high": 40}, {"held_out": 0}, {"held_out": 16200}]
)
def test_impossible_tasks_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="got"):
        TaskConfig(**bad)
