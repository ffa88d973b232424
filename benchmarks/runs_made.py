"""Recorded runs of TRL's GRPO trainer on additions: what the measurements of runs begin with."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PrinterCallback, Qwen2ForCausalLM

from fkernel.demo import prepare, seeded
from fkernel.demo.policy import PolicyConfig, build_model
from fkernel.demo.task import TaskConfig, splits
from fkernel.demo.tokenizer import build_tokenizer
from fkernel.record import Recorder, Recording

Reward = Callable[..., list[float | None]]
"""A reward function as TRL calls one: completions=, and the columns of the dataset."""
LONGEST = 5


class Setting(NamedTuple):
    """How a run is made.

    Attributes:
        steps: optimizer steps.
        rewards: what is paid; TRL adds them up.
        rows: prompts, with what the reward functions need.
        snapshots: as `Recorder` takes them.
        lora: whether an adapter is trained, and not the model.
        options: of TRL's configuration, beside or instead of what is given below.
    """

    steps: int
    rewards: tuple[Reward, ...]
    rows: list[dict[str, Any]]
    snapshots: str | int = "every"
    lora: bool = False
    options: Mapping[str, Any] = {}


def exact(completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
    """One for the reference answer."""
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def odd_digits(completions: list[str], **_: Any) -> list[float | None]:
    """One for every odd digit: a reward that a random policy gets too."""
    return [float(sum(map(text.count, "13579"))) for text in completions]


def problems(n: int, seed: int = 0, keep: Callable[[str], bool] = lambda question: True) -> list[dict[str, Any]]:
    """Draw n different problems of the demo's task.

    Args:
        n: how many.
        seed: of the draw.
        keep: which questions are wanted.
    """
    rows = [{"prompt": each.question, "answer": str(each.answer)} for each in splits(TaskConfig())["train"]]
    return random.Random(seed).sample([row for row in rows if keep(row["prompt"])], n)


def trained_policy() -> Path:
    """The demo's policy, which gets about half of its answers right; prepared once and cached."""
    return prepare(seeded(0)) / "model"


def small_policy(place: Path) -> Path:
    """A random policy of 0.03M parameters, for tests."""
    tokenizer = build_tokenizer()
    build_model(PolicyConfig(layers=2, width=32, heads=2, mlp=64, initializer_range=0.2), tokenizer).save_pretrained(
        place
    )
    tokenizer.save_pretrained(place)
    return place


def recorded(place: Path, base: Path, setting: Setting) -> Recording:
    """Train from a base policy, and record.

    Args:
        place: a directory for the run.
        base: the policy's directory.
        setting: of the run.
    """
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    given: dict[str, Any] = {
        "output_dir": str(place / "run"),
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": LONGEST,
        "max_steps": setting.steps,
        "save_strategy": "no",
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "seed": 0,
    }
    more: dict[str, Any] = {}
    if setting.lora:
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer: Any = GRPOTrainer(
            model=Qwen2ForCausalLM.from_pretrained(base),
            reward_funcs=[*setting.rewards],
            args=GRPOConfig(**{**given, **setting.options}),
            train_dataset=Dataset.from_list(setting.rows),
            processing_class=build_tokenizer(),
            **more,
        )
        trainer.remove_callback(PrinterCallback)
        Recorder(place / "recording", snapshots=setting.snapshots).attach(trainer)
        torch.manual_seed(0)
        trainer.train()
    return Recording.open(place / "recording")


def probes_of(pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Rows of probes, named by their text."""
    return [{"id": prompt + response, "prompt": prompt, "response": response} for prompt, response in pairs]
