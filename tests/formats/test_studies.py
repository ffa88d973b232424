"""A study begins from any trainer's checkpoint as from one of transformers: the plan names another path."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import fkernel as fk
from fkernel.study import FisherKernelRunner
from tests.formats.family import copied
from tests.formats.places import options_of, place_of

RUNS = (
    "deepspeed_trainer_zero2",
    "deepspeed_trainer_zero3",
    "verl_fsdp1",
    "verl_fsdp2",
    "accelerate_trainer_fsdp2_full",
)


def odd(prompt: str, response: str) -> float:
    """A reward."""
    return float(sum(map(response.count, "13579")))


@pytest.mark.parametrize("run", RUNS)
def test_a_study_of_a_trainers_checkpoint(run, tmp_path):
    """U is sampled from it, its step is predicted and taken in float32, and the two agree."""
    root, truth = copied(run, tmp_path / "run")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"question": "{a}+{b}=", "answer": "{a + b}"}}\n' for a in (1, 2) for b in (3, 4)))
    options = {key: str(value) for key, value in options_of(run, root).items()}
    plan: dict[str, Any] = {
        "checkpoint": {"path": str(place_of(run, root)), **options},
        "prompts": [{"jsonl": str(prompts), "split": "train"}],
        "template": "bare",
        "sampling": {"temperature": 1.0, "max_new_tokens": 4},
        "update": {
            "kind": "update",
            "batch_size_prompts": 2,
            "completions_per_prompt": 4,
            "reward": "tests.formats.test_studies.odd",
            "advantage": "grpo",
            "weights": "dapo",
        },
        "requests": [{"kind": "payload", "name": "held_out", "samples": [{"prompt": "1+3=", "response": "4"}]}],
        "storage": {"pictures": False, "persist": False},
        "out": str(tmp_path / "out"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fk.CheckpointWarning)
        results = FisherKernelRunner(plan).run()
    found: Any = results["held_out"]
    assert np.abs(found.realised).max() > 1e-4
    np.testing.assert_allclose(found.predicted, found.realised, rtol=0.02)
    conditions = [each["kind"] for each in results.environment["conditions"]]
    assert ("masters" in conditions) == bool(truth.rounded)
