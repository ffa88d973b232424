"""The policy: a small Qwen2, trained by supervision until about half of its answers are right.

Training stops by accuracy, not by steps: REINFORCE learns from groups with both right and wrong completions.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from fkernel.demo.progress import silent
from fkernel.errors import DemoError
from fkernel.func import pad
from fkernel.rollout import SampleGenerator, TablePrompts

IGNORED = -100  # cross_entropy's ignore_index


@dataclass(frozen=True)
class PolicyConfig:
    """Shape of the model.

    Attributes:
        layers: transformer layers.
        width: hidden size.
        heads: attention heads (as many key-value heads).
        mlp: inner width of the gated MLP.
        initializer_range: standard deviation of the initial weights.
        seed: seed of the initial weights.
    """

    layers: int = 4
    width: int = 128
    heads: int = 4
    mlp: int = 344
    initializer_range: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class SupervisionConfig:
    """How the model is trained, and when that stops.

    Attributes:
        batch: problems per step, drawn with replacement.
        lr: peak learning rate, reached linearly over ``warmup`` steps and then kept.
        warmup: steps of warm-up.
        weight_decay: AdamW's decay.
        beta2: AdamW's second β.
        max_norm: gradient clipping.
        max_steps: budget of steps.
        check_every: steps between two accuracy checks.
        check_problems: held-out problems sampled at a check, one completion each.
        stop_at: training stops at the first check with at least this accuracy.
        band: accuracy that the policy must end with, inclusive.
        seed: seed of the batches and of the checks.
    """

    batch: int = 128
    lr: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.01
    beta2: float = 0.98
    max_norm: float = 1.0
    max_steps: int = 4000
    check_every: int = 20
    check_problems: int = 512
    stop_at: float = 0.55
    band: tuple[float, float] = (0.4, 0.8)
    seed: int = 0


@dataclass(frozen=True)
class Supervised:
    """The result of supervision.

    Attributes:
        steps: steps taken.
        loss: cross-entropy of the last batch, nats per token.
        accuracy: sampled exact match at the last check.
    """

    steps: int
    loss: float
    accuracy: float


def build_model(config: PolicyConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A fresh fp32 model: tied embeddings, eager attention, no dropout. Global random state is untouched.

    It stays in eval mode; it has no dropout, so that training and explanation use the same forward.
    """
    model_config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=config.width,
        intermediate_size=config.mlp,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=64,
        initializer_range=config.initializer_range,
        attention_dropout=0.0,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        attn_implementation="eager",  # type: ignore[call-arg]  # undeclared keyword
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which also seeds accelerators, and the fork above does not restore those.
        torch.default_generator.manual_seed(config.seed)
        return Qwen2ForCausalLM(model_config).eval()


def count_parameters(model: torch.nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def supervised_tensors(tokenizer: Any, problems: TablePrompts) -> tuple[Tensor, Tensor]:
    """Problems as inputs and next-token targets.

    Args:
        tokenizer: the demo's tokenizer.
        problems: n problems with their answers.

    Returns:
        ``(inputs, targets)``, both [n t] int64: ``targets[:, i]`` is the token after ``inputs[:, i]``, for answer
        and EOS; elsewhere it is `IGNORED`. Inputs are right-padded, so a causal model needs no attention mask.
    """
    pairs = [
        (tokenizer.encode(each.question), tokenizer.encode(f"{each.answer}{tokenizer.eos_token}")) for each in problems
    ]
    batch = pad([question for question, _ in pairs], [answer for _, answer in pairs], tokenizer.pad_token_id)
    targets = batch.input_ids.masked_fill(~batch.response_mask, IGNORED)
    return batch.input_ids[:, :-1], targets[:, 1:]


def supervise(
    policy: SampleGenerator,
    prompts: Mapping[str, TablePrompts],
    config: SupervisionConfig,
    progress: Progress | None = None,
) -> Supervised:
    """Train a policy in place by cross-entropy until its sampled accuracy reaches ``config.stop_at``.

    Args:
        policy: the policy, which samples from the same problems.
        prompts: problems to learn from, "train", and to check on, "test", of which the first
            ``config.check_problems`` are used.
        config: hyperparameters.
        progress: progress bars; None for none.

    Returns:
        Steps taken, last loss and last accuracy.

    Raises:
        DemoError: the accuracy is outside ``config.band`` when training stops or its budget ends.
    """
    progress = progress or silent()
    bar = progress.add_task("supervision", total=config.max_steps)
    model, checked = policy.model, range(min(config.check_problems, len(prompts["test"])))
    inputs, targets = supervised_tensors(policy.tokenizer, prompts["train"])
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / config.warmup))
    result = Supervised(0, math.nan, math.nan)
    for step in range(1, config.max_steps + 1):
        rows = torch.randint(len(inputs), (config.batch,), generator=generator)
        loss = _supervised_step(model, optimizer, inputs[rows], targets[rows], config.max_norm)
        schedule.step()
        if step % config.check_every == 0 or step == config.max_steps:
            result = Supervised(step, loss, _accuracy(policy, checked, config.seed + step))
            text = f"supervision  loss {loss:.3f}  accuracy {result.accuracy:4.0%} (until {config.stop_at:.0%})"
            progress.update(bar, description=text)
            if result.accuracy >= config.stop_at:
                break
        progress.update(bar, completed=step)
    progress.update(bar, total=result.steps, completed=result.steps)
    _require_band(result, config)
    return result


def _supervised_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    max_norm: float,
) -> float:
    """One clipped step on inputs and targets [n t]; the loss before it, in nats per token."""
    logits = model(input_ids=inputs, use_cache=False).logits  # [n t v]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return loss.item()


def _accuracy(policy: SampleGenerator, problems: Sequence[int], seed: int) -> float:
    """Sampled exact match on some held-out problems, one completion each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an untrained policy samples padding, and does not stop
        return policy.generate_from_prompt_ids(problems, seed=seed, reward_cfg="exact").rewards.mean().item()


def _require_band(result: Supervised, config: SupervisionConfig) -> None:
    """Raise unless the accuracy lies in the band."""
    low, high = config.band
    if low <= result.accuracy <= high:
        return
    advice = (
        "raise max_steps or lr" if result.accuracy < low else "lower check_every or lr, so that no check jumps over it"
    )
    raise DemoError(
        f"supervision ended after {result.steps} of at most {config.max_steps} steps with a sampled accuracy "
        f"of {result.accuracy:.1%} (loss {result.loss:.3f}), outside of the band {low:.0%} to {high:.0%} "
        f"that REINFORCE needs; {advice}"
    )
