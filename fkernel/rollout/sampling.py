"""Sample responses with `model.generate`, each sequence with a random generator of its own.

`model.generate` draws one random stream for a whole microbatch, so that a sequence depends on its neighbours. Here each
sequence has a generator of its own, and a token is drawn by the Gumbel-max trick,

    token = argmax_v (log q_v + γ_v),   γ_v = −log ε_v,  ε_v ~ Exp(1)   ⇒   P(token = v) = q_v

inside a logits processor, which also sees q and π where the token was drawn: log q is the sampler's own, not a
recomputation whose top-p set might differ by a rounding.

Source: E. J. Gumbel (1954); C. Maddison, D. Tarlow & T. Minka, "A* sampling" (2014) for the trick.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fkernel.errors import RolloutError
from fkernel.rollout.record import Finish
from fkernel.shapes import Tensor


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: q ∝ π^(1/temperature), cut to the top k tokens and to the least set of mass top_p.

    Attributes:
        temperature: > 0.
        top_p: in (0, 1]; 1 cuts nothing.
        top_k: tokens kept, 0 for all.
        max_new_tokens: tokens a response may have, its EOS included.
        stop_strings: texts that end a response; they belong to it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the numbers."""
        wrong = {
            "temperature": not 0 < self.temperature < float("inf"),
            "top_p": not 0 < self.top_p <= 1,
            "top_k": self.top_k < 0,
            "max_new_tokens": self.max_new_tokens < 1,
        }
        for name, bad in wrong.items():
            if bad:
                expected = {"temperature": "> 0", "top_p": "in (0, 1]", "top_k": "0 (all) or more"}.get(
                    name, "1 or more"
                )
                raise RolloutError(f"{name} is {getattr(self, name)!r}; expected {expected}.")

    @property
    def warpers(self) -> tuple[Any, ...]:
        """What turns π's logits into q's, in the order in which transformers applies them."""
        from transformers.generation import logits_process as warping

        warpers: list[Any] = []
        if self.temperature != 1.0:
            warpers.append(warping.TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            warpers.append(warping.TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            warpers.append(warping.TopPLogitsWarper(self.top_p))
        return tuple(warpers)


class Drawn(NamedTuple):
    """One response, as it was drawn.

    Attributes:
        response_ids: its tokens, up to the one that ended it.
        logprobs: log π of each, temperature 1, as the sampler saw them.
        logqs: log q of each.
        finish: why it ended.
    """

    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    logqs: tuple[float, ...]
    finish: Finish


def draw(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    microbatch: int = 32,
    on_progress: Callable[[int], Any] = lambda n: None,
) -> list[Drawn]:
    """Draw one response to each prompt.

    Args:
        model: a causal language model with `generate`.
        tokenizer: the model's; for its EOS, its padding and its texts.
        prompts: tokens of each prompt.
        seeds: one a prompt; the same seed gives the same response, whatever it shares a microbatch with (up to
            floating-point ties of two tokens).
        sampling: the distribution.
        microbatch: responses under way at once; neighbours in length share one.
        on_progress: called with the number of responses that are done.

    Returns:
        One `Drawn` a prompt, in their order.

    Raises:
        RolloutError: the tokenizer has no EOS.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    done: dict[int, Drawn] = {}
    for start in range(0, len(order), microbatch):
        rows = order[start : start + microbatch]
        drawn = _together(model, tokenizer, [prompts[i] for i in rows], [seeds[i] for i in rows], sampling)
        done.update(zip(rows, drawn, strict=True))
        on_progress(len(rows))
    return [done[i] for i in range(len(prompts))]


def seed_of(*parts: Any) -> int:
    """Derive the seed of one random generator from what identifies it; the same on every machine.

    Example:
        >>> seed_of(0, "U", 3, 1) == seed_of(0, "U", 3, 1), seed_of(0, "U", 3, 1) == seed_of(0, "U", 3, 2)
        (True, False)
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def end_of_sequence(tokenizer: Any) -> int:
    """Return the token that ends a response.

    Raises:
        RolloutError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise RolloutError("The tokenizer has no EOS token, so no response could ever end; set tokenizer.eos_token.")
    return int(tokenizer.eos_token_id)


def padding(tokenizer: Any) -> int:
    """Return the token to pad with; it is masked, so which one does not matter."""
    return int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else end_of_sequence(tokenizer)


def _together(
    model: Any, tokenizer: Any, prompts: list[Sequence[int]], seeds: list[int], sampling: Sampling
) -> list[Drawn]:
    """Draw one microbatch, prompts padded on the left; generate derives positions from the mask."""
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), padding(tokenizer), device=model.device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor([*prompt])
        mask[row, width - len(prompt) :] = 1
    sampler, ends = _Sampler(sampling.warpers, seeds), _Ends(tokenizer, model, len(prompts), sampling.stop_strings)
    with _evaluating(model), torch.no_grad():
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                do_sample=False,  # the sampler has drawn: what it leaves has one finite entry
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=ends.eos.tolist(),
                pad_token_id=padding(tokenizer),
            ),
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([ends]),
        )
    tokens, logprobs, logqs = (torch.stack(column, 1).tolist() for column in (sampler.tokens, sampler.p, sampler.q))
    drawn = []
    for row, (length, finish) in enumerate(ends.ended):
        end = length or len(tokens[row])
        drawn.append(
            Drawn(tuple(tokens[row][:end]), tuple(logprobs[row][:end]), tuple(logqs[row][:end]), finish or "length")
        )
    return drawn


class _Sampler:
    """Draws a token for every row from a generator of its own, and records its log-probability."""

    def __init__(self, warpers: Sequence[Any], seeds: Sequence[int]) -> None:
        self.warpers = warpers
        self.streams = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.tokens, self.p, self.q = list[Tensor](), list[Tensor](), list[Tensor]()

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores = scores.float()
        log_p = scores.log_softmax(-1)
        for warp in self.warpers:
            scores = warp(input_ids, scores)
        log_q = scores.log_softmax(-1)
        tiny = torch.finfo(log_q.dtype).tiny
        noise = [torch.empty(log_q.shape[1]).exponential_(generator=stream).clamp_min(tiny) for stream in self.streams]
        token = (log_q - torch.stack(noise).log().to(log_q.device)).argmax(-1, keepdim=True)
        self.tokens.append(token[:, 0])
        self.p.append(log_p.gather(1, token)[:, 0])
        self.q.append(log_q.gather(1, token)[:, 0])
        return torch.full_like(log_q, -torch.inf).scatter_(1, token, 0.0)


class _Ends:
    """Tells `generate` which rows have ended, and records where and why."""

    def __init__(self, tokenizer: Any, model: Any, n: int, stop_strings: Sequence[str]) -> None:
        own = getattr(model.generation_config, "eos_token_id", None)  # chat models end turns with more than one token
        several = own if isinstance(own, list) else []
        self.eos = torch.tensor(sorted({end_of_sequence(tokenizer), *several}), device=model.device)
        self.tokenizer, self.stop = tokenizer, [*stop_strings]
        # The token that completes a stop string is the last: no more of a response than one can span is looked at.
        self.span = max((len(text.encode()) for text in stop_strings), default=0) + 4
        self.ended: list[tuple[int, Finish | None]] = [(0, None)] * n
        self.length = 0

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        self.length += 1
        ended = torch.isin(input_ids[:, -1], self.eos)
        tails = input_ids[:, -min(self.length, self.span) :].tolist() if self.stop else [[]] * len(input_ids)
        stopped = torch.tensor([self._stops(tail) for tail in tails], device=ended.device)
        for row, (by_eos, by_text) in enumerate(zip(ended.tolist(), stopped.tolist(), strict=True)):
            if self.ended[row][1] is None and (by_eos or by_text):
                self.ended[row] = (self.length, "eos" if by_eos else "stop_string")
        return ended | stopped

    def _stops(self, tail: list[int]) -> bool:
        return bool(self.stop) and any(text in self.tokenizer.decode(tail) for text in self.stop)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Put the model in eval mode, without generation defaults of its own (a repetition penalty would change q)."""
    from transformers import GenerationConfig

    training, own = model.training, model.generation_config
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(training)
