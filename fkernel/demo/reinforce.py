"""REINFORCE steps with group-mean advantages, executed by `torch.optim.AdamW`; the last one is kept on disk.

    A_u = r_u − mean of r over u's group
    L   = −(1/N) Σ_u A_u S_u                     N sequences, so every loss weight w_u is 1/N
    g   = c ∇L,   c = min(1, max_norm / (‖∇L‖ + 1e-6))

The checkpoint is taken after the last step's batch was sampled and before its gradient is applied: exactly
the state in which that step can be explained.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

from fkernel.demo.progress import silent
from fkernel.demo.records import Record, write_json, write_records
from fkernel.demo.sampling import Sample, accuracy, sample
from fkernel.demo.score import sequence_logprob, tokens
from fkernel.demo.task import Problem
from fkernel.demo.tokenizer import PAD, token_id
from fkernel.errors import DemoError


@dataclass(frozen=True)
class ReinforceConfig:
    """The steps.

    Attributes:
        steps: optimizer steps, at least 2; the last one is kept. A first step has no momentum to explain.
        prompts: training problems a step (groups).
        completions: responses a problem (the size of a group).
        lr: AdamW's learning rate, constant.
        weight_decay: AdamW's decoupled decay, on all parameters.
        max_norm: gradient clipping.
        temperature: τ of sampling and of S.
        max_new_tokens: tokens a response may have, EOS included.
        min_groups: groups of the last batch that must hold both right and wrong answers; the others have
            advantage zero throughout.
        seed: seed of the problems' order and of all sampling.
    """

    steps: int = 5
    prompts: int = 16
    completions: int = 8
    lr: float = 1e-5
    weight_decay: float = 0.01
    max_norm: float = 1.0
    temperature: float = 1.0
    max_new_tokens: int = 5
    min_groups: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what would make the last step meaningless."""
        if self.steps < 2 or self.completions < 2:
            raise ValueError(
                f"steps and completions must be at least 2; got {self.steps} and {self.completions}: "
                "a first step has no momentum, and a group of one has advantage zero"
            )


@dataclass(frozen=True)
class StepInfo:
    """What one step measured.

    Attributes:
        step: number of this step; the first is 1.
        mean_reward: mean reward of its batch.
        groups_with_signal: groups whose rewards differ.
        loss: L.
        gradient_norm: ‖∇L‖ before clipping.
        clip_factor: c, what clipping multiplied the gradient with; at most 1.
    """

    step: int
    mean_reward: float
    groups_with_signal: int
    loss: float
    gradient_norm: float
    clip_factor: float


def advantages(rewards: Tensor, completions: int) -> Tensor:
    """Reward minus the mean of its group.

    Args:
        rewards: [n], group by group.
        completions: size of a group; divides n.

    Returns:
        [n]; sums to zero in every group.
    """
    grouped = rewards.reshape(-1, completions)
    return (grouped - grouped.mean(1, keepdim=True)).flatten()


def backward(
    model: Qwen2ForCausalLM, samples: Sequence[Sample], advantage: Tensor, pad: int, temperature: float
) -> float:
    """Replace the model's gradients by ∇L of one batch, unclipped.

    Args:
        model: the policy in eval mode.
        samples: N samples.
        advantage: A, [N].
        pad: id of the padding token.
        temperature: τ.

    Returns:
        L.
    """
    model.zero_grad(set_to_none=True)
    loss = -(advantage * sequence_logprob(model, tokens(samples, pad), temperature)).sum() / len(samples)
    loss.backward()
    return loss.item()


def clip(model: torch.nn.Module, max_norm: float) -> tuple[float, float]:
    """Clip the model's gradients in place.

    Args:
        model: a model with gradients.
        max_norm: largest norm that is left alone.

    Returns:
        ``(norm, factor)``: the norm before, and what the gradients were multiplied with.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm, error_if_nonfinite=True).item()
    return norm, min(1.0, max_norm / (norm + 1e-6))


def make_optimizer(model: torch.nn.Module, config: ReinforceConfig) -> torch.optim.AdamW:
    """AdamW over NAMED parameters, so that its state_dict says which moments belong to which parameter."""
    return torch.optim.AdamW(model.named_parameters(), lr=config.lr, weight_decay=config.weight_decay)


def save_model(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write a model and its tokenizer in Hugging Face's format."""
    with _without_transformers_bars():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def reinforce(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    train: Sequence[Problem],
    config: ReinforceConfig,
    directory: Path,
    progress: Progress | None = None,
) -> list[StepInfo]:
    """Take ``config.steps`` real steps with ``model`` and keep the last one.

    Writes ``model/``, ``optimizer.pt`` and ``update.json`` before the last step is applied, ``after/model/``
    afterwards.

    Args:
        model: the supervised policy; changed in place.
        tokenizer: the demo's tokenizer.
        train: problems to draw batches from, without replacement.
        config: the steps.
        directory: where to write; exists.
        progress: where to draw; nothing is drawn without it.

    Returns:
        One `StepInfo` a step.

    Raises:
        ValueError: too few problems for the configuration.
        DemoError: too few groups of the last batch hold both right and wrong answers.
    """
    _require_problems(train, config)
    progress = progress or silent()
    bar = progress.add_task("REINFORCE", total=config.steps)
    pad = token_id(tokenizer, PAD)
    order = random.Random(config.seed).sample(train, config.steps * config.prompts)
    optimizer = make_optimizer(model, config)
    model.eval()  # no layer drops anything in either mode; said so that the explained forward is this one
    infos: list[StepInfo] = []
    for step in range(1, config.steps + 1):
        problems = order[(step - 1) * config.prompts : step * config.prompts]
        batch = _draw(model, tokenizer, problems, config.completions, config, 2 * step, "U")
        advantage = advantages(torch.tensor([s.reward for s in batch]), config.completions)
        if step == config.steps:
            _require_signal(advantage, config)
            save_model(model, tokenizer, directory / "model")
            torch.save(optimizer.state_dict(), directory / "optimizer.pt")
            _write_batch(directory, batch, advantage)
        loss = backward(model, batch, advantage, pad, config.temperature)
        norm, factor = clip(model, config.max_norm)
        optimizer.step()
        infos.append(StepInfo(step, accuracy(batch), _signal(advantage, config.completions), loss, norm, factor))
        progress.update(bar, completed=step, description=f"REINFORCE    reward {infos[-1].mean_reward:.3f}")
    save_model(model, tokenizer, directory / "after" / "model")
    return infos


def write_step(directory: Path, infos: Sequence[StepInfo], config: ReinforceConfig, facts: dict[str, object]) -> None:
    """Write ``step.json``: the last step's numbers, all steps' history, the configuration and further facts.

    Args:
        directory: where.
        infos: what `reinforce` returned.
        config: its configuration.
        facts: anything else worth keeping, JSON-serialisable.
    """
    last = infos[-1]
    write_json(
        directory / "step.json",
        {
            "steps_before": last.step - 1,
            "step": last.step,
            "lr": config.lr,
            "weight_decay": config.weight_decay,
            "temperature": config.temperature,
            "max_norm": config.max_norm,
            "loss": last.loss,
            "gradient_norm": last.gradient_norm,
            "clip_factor": last.clip_factor,
            "groups_with_signal": last.groups_with_signal,
            "history": [asdict(info) for info in infos],
            **facts,
        },
    )


@contextmanager
def _without_transformers_bars() -> Iterator[None]:
    """Keep the library's own bars from drawing into ours; as it was before afterwards."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _draw(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    completions: int,
    config: ReinforceConfig,
    stream: int,
    prefix: str,
) -> list[Sample]:
    """Sample one batch; every batch of a run has its own stream of random numbers."""
    seed = config.seed * 1_000_003 + stream
    return sample(model, tokenizer, problems, completions, config.temperature, config.max_new_tokens, seed, prefix)


def _write_batch(directory: Path, batch: list[Sample], advantage: Tensor) -> None:
    """Write U with its advantages and weights."""
    update = [Record(s, a, 1 / len(batch)) for s, a in zip(batch, advantage.tolist(), strict=True)]
    write_records(directory / "update.json", update)


def _signal(advantage: Tensor, completions: int) -> int:
    """Number of groups whose advantages are not all zero."""
    return int((advantage.reshape(-1, completions) != 0).any(1).sum())


def _require_signal(advantage: Tensor, config: ReinforceConfig) -> None:
    found = _signal(advantage, config.completions)
    if found < config.min_groups:
        raise DemoError(
            f"only {found} of {config.prompts} groups of the last batch hold both right and wrong answers, "
            f"at least {config.min_groups} are needed for a gradient worth explaining; train to an accuracy "
            "nearer 50 % or use another seed"
        )


def _require_problems(train: Sequence[Problem], config: ReinforceConfig) -> None:
    needed = config.steps * config.prompts
    if len(train) < needed:
        raise ValueError(
            f"{config.steps} steps of {config.prompts} prompts need {needed} training problems; got {len(train)}"
        )
