"""SampleGenerator: samples and scores the batches of a study from one policy, its prompts and its sampling settings."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fkernel.errors import RolloutError
from fkernel.func import pad
from fkernel.rollout.advantages import Advantage
from fkernel.rollout.batch import GeneratedBatch
from fkernel.rollout.guards import (
    check_abstained,
    check_concatenation,
    check_recorded,
    check_room,
    check_truncated,
    encode,
)
from fkernel.rollout.judging import Answer, Panel, RewardConfig, panel_of
from fkernel.rollout.prompts import Prompt, PromptSource, custom
from fkernel.rollout.record import CustomSample, Provenance, SequenceRecord, sequence_id
from fkernel.rollout.sampling import Drawn, Sampling, draw, end_of_sequence, padding, seed_of
from fkernel.rollout.scoring import score
from fkernel.rollout.template import Template, messages_of, render, template_of, writes_special_tokens

RewardWeights = Mapping[str, float] | Sequence[float] | None
"""Weight of each of several reward functions, by name or in their order; 1 each by default."""
Draw = tuple[int, int, Prompt]
"""(group, completion, prompt): one sequence that is to be drawn."""


class SampleGenerator:
    """Samples and scores sequences of one checkpoint.

    Attributes:
        model: the policy.
        tokenizer: its tokenizer.
        fingerprint: of the policy; every batch records it.
        sampling: how responses are drawn.
        template: from a question to the text that the policy reads.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: PromptSource | Mapping[str, PromptSource] | None = None,
        *,
        fingerprint: str | None = None,
        sampling: Sampling | None = None,
        template: str | Template = "gsm8k_r1",
        microbatch: int = 32,
        on_progress: Callable[[int], Any] = lambda n: None,
    ) -> None:
        """Set up a policy, its prompts and how responses are drawn.

        Args:
            model: a causal language model, such as `checkpoint.load(path).model`.
            tokenizer: its tokenizer.
            prompts: a source, or one a split; None where only custom prompts are asked.
            fingerprint: of the checkpoint, `checkpoint.load(path).provenance.fingerprint`.
            sampling: how responses are drawn; temperature 1 and nothing truncated by default.
            template: "gsm8k_r1", "chat", "bare", or a function.
            microbatch: responses that are drawn at once.
            on_progress: called with a number of sequences whenever so many are drawn, and again when they are scored.

        Raises:
            RolloutError: there is no tokenizer, no EOS, or no such template.
        """
        if tokenizer is None:
            raise RolloutError(
                "The checkpoint has no tokenizer, so nothing can be sampled from it; save one beside it."
            )
        end_of_sequence(tokenizer)
        self.model, self.tokenizer, self.fingerprint = model, tokenizer, fingerprint
        self.sampling, self.microbatch, self.on_progress = sampling or Sampling(), microbatch, on_progress
        self.template = template_of(template, tokenizer)
        self._adds = not writes_special_tokens(self.template)
        self._sources = prompts if isinstance(prompts, Mapping) or prompts is None else {prompts.split: prompts}

    def generate_update_batch(
        self,
        batch_size_prompts: int,
        completions_per_prompt: int,
        dataset_split: str = "train",
        seed: int = 0,
        reward_cfg: RewardConfig = "math",
        advantage_cfg: str | Advantage | None = "group_mean",
        weight_cfg: str | None = "sequence",
        reward_weights: RewardWeights = None,
        **weight_options: Any,
    ) -> GeneratedBatch:
        """Draw U: different prompts, several completions each, with rewards, advantages and loss weights.

        Args:
            batch_size_prompts: prompts.
            completions_per_prompt: completions of each.
            dataset_split: which source.
            seed: of prompts and completions.
            reward_cfg: a name, "math", "exact", "gym" or module.function; a function (prompt, response text) -> number,
                or of TRL's signature; or several, {name: reward} or a list. None for none. A response for which it
                returns None has no reward: it is left out of its group's baseline, its advantage is 0, and a warning
                names it. Of several every value is recorded; a response that one of them judged has a reward.
            advantage_cfg: a rule of `fkernel.rollout.advantages`; None for none, as are advantages without rewards.
            weight_cfg: loss weights, by the rules of `fkernel.rollout.advantages.loss_weights`.
            reward_weights: of several rewards: the reward is Σ weight · value; 1 each by default.
            **weight_options: as there.

        Returns:
            Ids are U-000-00, U-000-01, …: draw and completion.

        Raises:
            RolloutError: fewer prompts than asked for, a prompt without room, a reward that fails, or log-probabilities
                that teacher forcing does not reproduce.
        """
        prompts = self._drawn_prompts(batch_size_prompts, dataset_split, seed, "U", with_replacement=False)
        panel = self._panel(reward_cfg, dataset_split, reward_weights)
        batch = self._sampled(prompts, completions_per_prompt, seed, "U", panel)
        if reward_cfg is not None and advantage_cfg is not None:
            batch = batch.with_advantages(advantage_cfg)
        return batch if weight_cfg is None else batch.with_loss_weights(weight_cfg, **weight_options)

    def generate_evaluation_batch(
        self,
        batch_size_prompts: int,
        completions_per_prompt: int = 1,
        with_replacement: bool = True,
        dataset_split: str = "test",
        seed: int = 0,
        reward_cfg: RewardConfig = None,
        reward_weights: RewardWeights = None,
    ) -> GeneratedBatch:
        """Draw E; arguments and errors as in `generate_update_batch`. Ids are E-000-00, …."""
        prompts = self._drawn_prompts(batch_size_prompts, dataset_split, seed, "E", with_replacement)
        panel = self._panel(reward_cfg, dataset_split, reward_weights)
        return self._sampled(prompts, completions_per_prompt, seed, "E", panel)

    def generate_from_prompt_ids(
        self,
        prompt_ids: Sequence[str | int],
        dataset_split: str = "test",
        completions_per_prompt: int = 1,
        seed: int = 0,
        reward_cfg: RewardConfig = None,
        reward_weights: RewardWeights = None,
    ) -> GeneratedBatch:
        """Draw completions of certain prompts, by global_prompt_id or by position in the split. Ids are P-000-00, ….

        Raises:
            RolloutError: an id is not one of the split's.
        """
        prompts = [self._prompt(given, dataset_split) for given in prompt_ids]
        panel = self._panel(reward_cfg, dataset_split, reward_weights)
        return self._sampled(prompts, completions_per_prompt, seed, "P", panel)

    def generate_from_custom_prompts(
        self, prompts: Sequence[str], completions_per_prompt: int = 1, seed: int = 0
    ) -> GeneratedBatch:
        """Draw completions of prompts written by hand, in the same template; marked as custom. Ids are C-000-00, …."""
        return self._sampled(custom(prompts), completions_per_prompt, seed, "C", None)

    def build_custom_sequence(
        self,
        prompt: str | CustomSample,
        response: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        *,
        raw: bool = False,
        ended: bool = True,
        name: str | None = None,
    ) -> GeneratedBatch:
        """Score a prompt and a response that are given, word for word.

        Args:
            prompt: the question, put into the template, or the whole text with `raw`; or a `CustomSample`.
            response: what is to be scored.
            metadata: whatever the caller adds; JSON.
            raw: whether the prompt is the whole text, read as the template's texts are.
            ended: whether the response ends with the tokenizer's EOS, as a sampled one does.
            name: its id; None makes one of its content hash, so that two custom sequences differ wherever they meet.

        Returns:
            A batch of one.

        Raises:
            RolloutError: the response has no token, or there is no room for it.
        """
        given = (
            prompt
            if isinstance(prompt, CustomSample)
            else CustomSample(prompt, response or "", metadata or {}, raw, ended)
        )
        (question,) = custom([given.prompt])
        text, own = given.prompt if given.raw else render(self.template, question), question.global_prompt_id
        prompt_ids = encode(self.tokenizer, text, own, self._adds)
        words = list(self.tokenizer.encode(given.response, add_special_tokens=False)) if given.response else []
        if not words and not given.ended:
            raise RolloutError(f"The response {given.response!r} has no token; there is nothing to score.")
        check_room(self.model, [len(prompt_ids)], len(words) + given.ended, [own])
        check_concatenation(self.tokenizer, text, given.response, prompt_ids + words, own, self._adds)
        response_ids = words + [end_of_sequence(self.tokenizer)] * given.ended
        scored = pad([prompt_ids], [response_ids], padding(self.tokenizer))
        (statistics,) = score(self.model, scored, self.sampling)
        record = SequenceRecord(
            sequence_id="C-000-00",
            prompt_ids=tuple(prompt_ids),
            response_ids=tuple(response_ids),
            prompt=text,
            response=given.response,
            **statistics._asdict(),
            finish="given",
            provenance=Provenance(own, "custom", "custom", 0, 0, custom=True),
            metadata=given.metadata,
        )
        named = replace(record, sequence_id=name or f"C-{record.content_hash}-00")
        return GeneratedBatch((named,), self.fingerprint, None, padding(self.tokenizer))

    def rewards_of(
        self, batch: GeneratedBatch, reward_cfg: RewardConfig, reward_weights: RewardWeights = None
    ) -> list[float | None]:
        """Reward responses that were drawn before, in the batch's order.

        Args:
            batch: drawn from the prompts that the generator has.
            reward_cfg: as in `generate_update_batch`.
            reward_weights: of several rewards.

        Raises:
            RolloutError: a prompt is not one of the generator's, or the reward fails.
        """
        by_split: dict[str, list[SequenceRecord]] = {}
        for record in batch:
            by_split.setdefault(record.provenance.split, []).append(record)
        totals: dict[str, float | None] = {}
        for split, records in by_split.items():
            prompts = [self._prompt(record.provenance.global_prompt_id, split) for record in records]
            panel = self._panel(reward_cfg, split, reward_weights)
            rewarded = records if panel is None else self._rewarded(records, prompts, panel)
            totals |= {record.sequence_id: record.reward for record in rewarded}
        return [totals[record.sequence_id] for record in batch]

    def prompt_tokens(self, split: str) -> list[list[int]]:
        """Tokens of every prompt of a split, in the template.

        Args:
            split: of the prompts.

        Raises:
            RolloutError: there are no prompts of that split, or the template fails on one.
        """
        source = self._source(split)
        prompts = [source[i] for i in range(len(source))]
        return [encode(self.tokenizer, render(self.template, p), p.global_prompt_id, self._adds) for p in prompts]

    def _source(self, split: str) -> PromptSource:
        if not self._sources or split not in self._sources:
            known = ", ".join(map(repr, self._sources or {})) or "none"
            raise RolloutError(f"There are no prompts of the split {split!r}; the generator has {known}.")
        return self._sources[split]

    def _panel(self, given: RewardConfig, split: str, weights: RewardWeights) -> Panel | None:
        return panel_of(given, self._sources[split] if self._sources and split in self._sources else None, weights)

    def _drawn_prompts(self, n: int, split: str, seed: int, prefix: str, with_replacement: bool) -> list[Prompt]:
        source = self._source(split)
        if n < 1 or (n > len(source) and not with_replacement) or not len(source):
            raise RolloutError(f"batch_size_prompts is {n}; {source.name!r} has {len(source)} prompts of {split!r}.")
        stream, places = random.Random(seed_of(seed, "prompts", prefix, split)), range(len(source))
        chosen = stream.choices(places, k=n) if with_replacement else stream.sample(places, n)
        return [source[i] for i in chosen]

    def _prompt(self, given: str | int, split: str) -> Prompt:
        source = self._source(split)
        place, _, number = str(given).rpartition("-")
        if not number.isdecimal() or place not in ("", split) or int(number) >= len(source):
            raise RolloutError(
                f"There is no prompt {given!r} in {source.name!r}; ids run from {source[0].global_prompt_id} to "
                f"{source[len(source) - 1].global_prompt_id}."
            )
        return source[int(number)]

    def _sampled(
        self, prompts: Sequence[Prompt], completions: int, seed: int, prefix: str, panel: Panel | None
    ) -> GeneratedBatch:
        """Draw, score and reward; log-probabilities recorded at sampling must equal those of teacher forcing."""
        if completions < 1:
            raise RolloutError(f"completions_per_prompt is {completions}; expected at least 1.")
        texts = [render(self.template, prompt) for prompt in prompts]
        names = [prompt.global_prompt_id for prompt in prompts]
        prompt_ids = [encode(self.tokenizer, text, name, self._adds) for text, name in zip(texts, names, strict=True)]
        check_room(self.model, [len(ids) for ids in prompt_ids], self.sampling.max_new_tokens, names)
        draws: list[Draw] = [(g, k, prompt) for g, prompt in enumerate(prompts) for k in range(completions)]
        seeds = [seed_of(seed, prefix, g, k) for g, k, _ in draws]
        each = [prompt_ids[g] for g, _, _ in draws]
        drawn = draw(self.model, self.tokenizer, each, seeds, self.sampling, self.microbatch, self.on_progress)
        batch = pad(each, [one.response_ids for one in drawn], padding(self.tokenizer))
        records = []
        for (g, k, prompt), one, known in zip(draws, drawn, score(self.model, batch, self.sampling), strict=True):
            name = sequence_id(prefix, g, k)
            check_recorded(one.logprobs, known.logprobs, name)
            records.append(
                SequenceRecord(
                    sequence_id=name,
                    prompt_ids=tuple(prompt_ids[g]),
                    response_ids=one.response_ids,
                    prompt=texts[g],
                    response=self._text(one),
                    logprobs=known.logprobs,
                    logqs=one.logqs,
                    entropies=known.entropies,
                    finish=one.finish,
                    provenance=Provenance(
                        prompt.global_prompt_id, prompt.split, prompt.source, g, k, prompt.split == "custom", seed
                    ),
                )
            )
        self.on_progress(len(records))
        check_truncated(records)
        if panel is not None:
            records = self._rewarded(records, [prompt for _, _, prompt in draws], panel)
            check_abstained(records, panel.name)
        return GeneratedBatch(tuple(records), self.fingerprint, self.sampling, padding(self.tokenizer))

    def _rewarded(
        self, records: Sequence[SequenceRecord], prompts: Sequence[Prompt], panel: Panel
    ) -> list[SequenceRecord]:
        """Set each record's reward, or that it abstains, and the value of each of several reward functions."""
        answers = []
        for prompt, record in zip(prompts, records, strict=True):
            asked = messages_of(self.template, prompt) or record.prompt
            completion = self.tokenizer.decode(list(record.response_ids), skip_special_tokens=True)
            one = Answer(record.sequence_id, prompt, record.response, asked, completion, record.response_ids)
            answers.append(one)
        return [
            replace(record, reward=r.total, abstained=r.total is None, rewards=r.values, reward_weights=r.weights)
            for record, r in zip(records, panel.rewarded(answers), strict=True)
        ]

    def _text(self, one: Drawn) -> str:
        ids = one.response_ids[:-1] if one.finish == "eos" else one.response_ids
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)
