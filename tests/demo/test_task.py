"""The task is the same for a seed, and its splits share nothing."""

from dataclasses import replace

import pytest

from fkernel.demo.task import TaskConfig, problem, splits


def test_splits_are_disjoint_and_cover_the_task() -> None:
    train, held_out = ([each.question for each in prompts] for prompts in splits(TaskConfig()).values())
    assert len({*train, *held_out}) == len(train) + len(held_out) == 2 * 90 * 90
    assert len(held_out) == 1000


def test_splits_depend_on_the_seed_alone() -> None:
    first, same, other = ([*splits(TaskConfig(seed=seed))["train"]] for seed in (3, 3, 4))
    assert first == same
    assert first != other


def test_every_prompt_has_six_characters_and_the_right_answer() -> None:
    for each in (each for prompts in splits(TaskConfig()).values() for each in prompts):
        q = each.question
        a, sign, b = int(q[:2]), q[2], int(q[3:5])
        assert len(q) == 6
        assert q[5] == "="
        assert each.answer == str(a + b if sign == "+" else a - b)
    assert problem(37, "+", 85)["answer"] == "122"


@pytest.mark.parametrize(
    "bad", [{"low": 9}, {"high": 100}, {"low": 50, "high": 40}, {"held_out": 0}, {"held_out": 16200}]
)
def test_impossible_tasks_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="got"):
        replace(TaskConfig(), **bad)
