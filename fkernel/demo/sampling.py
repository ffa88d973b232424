"""Sampling: responses that the policy really wrote, named, scored and cut at their EOS."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from fkernel.demo.task import Problem, reward
from fkernel.demo.tokenizer import EOS, PAD, decode, encode, token_id


@dataclass(frozen=True)
class Sample:
    """One response to one problem.

    Attributes:
        id: display name, ``<prefix>-<group>-<completion>``, e.g. ``U-004-03``.
        group: index of the problem in its batch; the completions of one problem share it.
        problem: what was asked.
        prompt_ids: tokens of the prompt.
        response_ids: tokens of the response, the EOS that ended it included, nothing after it.
        text: the response without its EOS.
        truncated: no EOS came within the allowed number of tokens.
        reward: 1.0 for the exact answer followed by EOS, else 0.0.
    """

    id: str
    group: int
    problem: Problem
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    text: str
    truncated: bool
    reward: float


@contextmanager
def forked_rng(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator inside the block, and leave it as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that one also seeds every accelerator, which the fork above does not restore.
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def evaluating(model: Qwen2ForCausalLM) -> Iterator[None]:
    """Put the model in eval mode inside the block, and back into the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def sample(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    completions: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    prefix: str = "S",
    batch_size: int = 256,
) -> list[Sample]:
    """Sample ``completions`` responses to each problem from softmax(logits / temperature), nothing truncated.

    Args:
        model: the policy, on the CPU.
        tokenizer: the demo's tokenizer.
        problems: what to ask; their prompts have one length, so that no prompt is padded.
        completions: responses a problem.
        temperature: τ > 0.
        max_new_tokens: tokens a response may have, EOS included.
        seed: the same seed (and batch_size) gives the same samples; the caller's random state is untouched.
        prefix: first part of the display ids.
        batch_size: sequences generated at once.

    Returns:
        ``len(problems) * completions`` samples, problem by problem.
    """
    asked = [(g, k, problem) for g, problem in enumerate(problems) for k in range(completions)]
    pad, eos = token_id(tokenizer, PAD), token_id(tokenizer, EOS)
    samples: list[Sample] = []
    with forked_rng(seed), evaluating(model), torch.no_grad():
        for start in range(0, len(asked), batch_size):
            chunk = asked[start : start + batch_size]
            prompts = torch.tensor([encode(tokenizer, problem.prompt) for _, _, problem in chunk])  # [n p]
            output = _generate(model, prompts, temperature, max_new_tokens, pad, eos)  # [n p+r]
            for (group, k, problem), row in zip(chunk, output[:, prompts.shape[1] :].tolist(), strict=True):
                samples.append(_sample(tokenizer, f"{prefix}-{group:03d}-{k:02d}", group, problem, row, eos))
    return samples


def accuracy(samples: Sequence[Sample]) -> float:
    """Fraction of samples with reward 1."""
    return sum(s.reward for s in samples) / len(samples)


def _generate(
    model: Qwen2ForCausalLM, prompts: Tensor, temperature: float, max_new_tokens: int, pad: int, eos: int
) -> Tensor:
    """Prompts [n p] and their sampled continuations, padded after their EOS: [n p+r]."""
    output = model.generate(  # type: ignore[operator]  # transformers' mixin types it as a module attribute
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        temperature=temperature,
        top_k=0,  # any truncation would sample from another distribution than the one that S scores
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=eos,
    )
    assert isinstance(output, Tensor)
    return output


def _sample(
    tokenizer: PreTrainedTokenizerFast, name: str, group: int, problem: Problem, row: list[int], eos: int
) -> Sample:
    """Cut a generated row after its first EOS, decode it and score it."""
    ended = eos in row
    response = row[: row.index(eos) + 1] if ended else row
    text = decode(tokenizer, response[:-1] if ended else response)
    return Sample(
        id=name,
        group=group,
        problem=problem,
        prompt_ids=tuple(encode(tokenizer, problem.prompt)),
        response_ids=tuple(response),
        text=text,
        truncated=not ended,
        reward=reward(problem, text) if ended else 0.0,
    )
