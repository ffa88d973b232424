"""REINFORCE steps with group-mean advantages and `torch.optim.AdamW`; the last one is saved.

    A_u = r_u − mean of r over u's group
    L   = −(1/N) Σ_u A_u S_u                     N sequences, so every loss weight w_u is 1/N
    g   = c ∇L,   c = min(1, max_norm / (‖∇L‖ + 1e-6))

The checkpoint is saved after the last step's batch was sampled and before the step.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor, nn

from fkernel.demo.export import write_before_step, write_model
from fkernel.demo.progress import silent
from fkernel.errors import DemoError
from fkernel.rollout import GeneratedBatch, SampleGenerator


@dataclass(frozen=True)
class ReinforceConfig:
    """The steps.

    Attributes:
        steps: optimizer steps, at least 2, since a first step has no momentum; the last one is saved.
        prompts: training problems per step (groups).
        completions: responses per problem (the size of a group).
        lr: AdamW's learning rate, constant.
        weight_decay: AdamW's decoupled decay, on all parameters.
        max_norm: gradient clipping.
        temperature: τ of sampling and of S.
        max_new_tokens: tokens a response may have, EOS included.
        min_groups: groups of the last batch that must hold both right and wrong answers; the others have
            advantage zero throughout.
        seed: seed of all sampling.
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
        """Check that the last step has momentum and advantages."""
        if self.steps < 2 or self.completions < 2:
            raise ValueError(
                f"steps and completions must be at least 2; got {self.steps} and {self.completions}: "
                "a first step has no momentum, and a group of one has advantage zero"
            )


@dataclass(frozen=True)
class StepInfo:
    """Statistics of one step.

    Attributes:
        step: number of this step; the first is 1.
        mean_reward: mean reward of its batch.
        groups_with_signal: groups whose rewards differ.
        loss: L.
        gradient_norm: ‖∇L‖ before clipping.
        clip_factor: c, the clipping factor; at most 1.
    """

    step: int
    mean_reward: float
    groups_with_signal: int
    loss: float
    gradient_norm: float
    clip_factor: float


def sequence_logprob(model: nn.Module, batch: GeneratedBatch, temperature: float) -> Tensor:
    """S(x) = Σ over the response of log softmax(logits / τ) at the token that was sampled.

    Plain torch, independent of the engine that explains the step.

    Args:
        model: a Hugging Face causal language model in eval mode.
        batch: n sequences.
        temperature: τ.

    Returns:
        [n], nats.
    """
    input_ids, attention_mask, response_mask = batch.sequences
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    logp = torch.log_softmax(logits[:, :-1] / temperature, dim=-1)  # [n t-1 v]: position i predicts token i+1
    picked = logp.gather(-1, input_ids[:, 1:, None])[..., 0]
    return (picked * response_mask[:, 1:]).sum(-1)


def backward(model: nn.Module, batch: GeneratedBatch, temperature: float) -> float:
    """Replace the model's gradients by ∇L of one batch, unclipped; return L."""
    model.zero_grad(set_to_none=True)
    loss = -(batch.weighted_advantages * sequence_logprob(model, batch, temperature)).sum()
    loss.backward()
    return loss.item()


def clip(model: nn.Module, max_norm: float) -> tuple[float, float]:
    """Clip the model's gradients in place.

    Args:
        model: a model with gradients.
        max_norm: the threshold.

    Returns:
        ``(norm, factor)``: the norm before clipping, and the clipping factor.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm, error_if_nonfinite=True).item()
    return norm, min(1.0, max_norm / (norm + 1e-6))


def reinforce(
    policy: SampleGenerator, config: ReinforceConfig, directory: Path, progress: Progress | None = None
) -> list[StepInfo]:
    """Take ``config.steps`` steps and save the last one.

    Writes ``model/``, ``optimizer.pt`` and ``update/`` before the last step, ``after/model/`` after it.

    Args:
        policy: the supervised policy with its problems, those of "train" among them; its model is changed in place.
        config: the steps.
        directory: where to write; an existing one.
        progress: progress bars; None for none.

    Returns:
        One `StepInfo` per step.

    Raises:
        RolloutError: there are fewer problems than a step asks for.
        DemoError: too few groups of the last batch hold both right and wrong answers.
    """
    progress = progress or silent()
    bar = progress.add_task("REINFORCE", total=config.steps)
    model = policy.model
    # Named parameters, so that the state_dict records which moments are whose.
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=config.lr, weight_decay=config.weight_decay)
    steps: list[StepInfo] = []
    for step in range(1, config.steps + 1):
        seed = config.seed * config.steps + step  # unique to every batch of every run
        batch = policy.generate_update_batch(config.prompts, config.completions, seed=seed, reward_cfg="exact")
        signal = len(set(batch.groups[batch.advantages != 0].tolist()))
        if step == config.steps:
            _require_signal(signal, config)
            write_before_step(directory, policy, optimizer, batch)
        loss = backward(model, batch, config.temperature)
        norm, factor = clip(model, config.max_norm)
        optimizer.step()
        steps.append(StepInfo(step, batch.rewards.mean().item(), signal, loss, norm, factor))
        progress.update(bar, completed=step, description=f"REINFORCE    reward {steps[-1].mean_reward:.3f}")
    write_model(directory / "after" / "model", policy)
    return steps


def _require_signal(groups: int, config: ReinforceConfig) -> None:
    if groups < config.min_groups:
        raise DemoError(
            f"only {groups} of {config.prompts} groups of the last batch hold both right and wrong answers, "
            f"at least {config.min_groups} are needed for a gradient worth explaining; train to an accuracy "
            "nearer 50 % or use another seed"
        )
