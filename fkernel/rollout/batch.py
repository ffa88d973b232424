"""A batch of records: look up by id or prompt, filter, merge, and convert to the tensors that the engine takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

import torch

from fkernel.errors import RolloutError, listing
from fkernel.func import Sequences, pad
from fkernel.rollout.advantages import Advantage, advantage_of, among_judged, loss_weights
from fkernel.rollout.layout import by_record, check_part, check_same_parts, check_total, laid_out
from fkernel.rollout.record import SequenceRecord
from fkernel.rollout.sampling import Sampling
from fkernel.shapes import Tensor


@dataclass(frozen=True)
class GeneratedBatch:
    """Sequences that were sampled or written by hand, with the checkpoint and the sampling settings that made them.

    Attributes:
        records: the sequences, in order; their ids differ.
        checkpoint: fingerprint of the policy that wrote and scored them; None where there is none.
        sampling: how they were drawn; None for sequences written by hand.
        pad_id: token that `sequences` is padded with.
    """

    records: tuple[SequenceRecord, ...]
    checkpoint: str | None = None
    sampling: Sampling | None = None
    pad_id: int = 0

    def __post_init__(self) -> None:
        """Check that there are sequences, that ids name them, and that token weights have the same parts."""
        if not self.records:
            raise RolloutError("A batch needs at least one sequence.")
        names = [record.sequence_id for record in self.records]
        twice = sorted({name for name in names if names.count(name) > 1}) if len({*names}) < len(names) else []
        if twice:
            raise RolloutError(f"Ids name one sequence each; {listing(twice)} occur(s) more than once.")
        check_same_parts(self.records)

    def __len__(self) -> int:
        """Count the sequences."""
        return len(self.records)

    def __iter__(self) -> Iterator[SequenceRecord]:
        """Iterate over the sequences."""
        return iter(self.records)

    @property
    def ids(self) -> list[str]:
        """Display ids, in order."""
        return [record.sequence_id for record in self.records]

    @cached_property
    def sequences(self) -> Sequences:
        """The tokens, [n t], as the engine takes them."""
        return pad([r.prompt_ids for r in self.records], [r.response_ids for r in self.records], self.pad_id)

    @property
    def groups(self) -> Tensor:
        """[n] int64, which draw of a prompt each sequence belongs to, counted from 0 in this batch.

        Draws are told apart by the ids' stems (U-004 of U-004-03), which two merged batches do not share.
        """
        stems = [record.sequence_id.rpartition("-")[0] for record in self.records]
        number = {stem: i for i, stem in enumerate(dict.fromkeys(stems))}
        return torch.tensor([number[stem] for stem in stems])

    @property
    def rewards(self) -> Tensor:
        """[n] rewards.

        Raises:
            RolloutError: a sequence has none, or its reward abstained.
        """
        return self._numbers("reward")

    @property
    def advantages(self) -> Tensor:
        """[n] advantages.

        Raises:
            RolloutError: a sequence has none.
        """
        return self._numbers("advantage")

    @property
    def weighted_advantages(self) -> Tensor:
        """[n] w·A: what the engine takes as `weights`.

        Raises:
            RolloutError: a sequence has no loss weight, or no advantage.
        """
        return self._numbers("weight") * self.advantages

    @property
    def token_weights(self) -> dict[str, Tensor]:
        """{part: [n t] float64} ω = ∂L/∂log π of each token, laid out as `func.token_logprobs`; {} without any.

        The loss's sign: a positive ω lowers its token. The parts add up to the loss's ω.
        """
        return laid_out(self.records, self.sequences.response_mask, "token_weights")

    @property
    def entropy_weights(self) -> dict[str, Tensor]:
        """{part: [n t] float64} η = ∂L/∂H of each token; {} where no entropy was in the loss."""
        return laid_out(self.records, self.sequences.response_mask, "entropy_weights")

    def with_token_weights(
        self,
        parts: Mapping[str, Tensor],
        entropy: Mapping[str, Tensor] | Tensor | None = None,
        *,
        total: Tensor | None = None,
    ) -> GeneratedBatch:
        """Describe the loss by its token weights, in place of those that the batch had.

        ∇L = Σ_u Σ_t ω_ut ∇log π(u_t) + η_ut ∇H(u_t),   ω = Σ parts

        Args:
            parts: {part: [n t]} ω, laid out as `sequences`; 0 outside of the response.
            entropy: {part: [n t]} η, or one tensor, whose part is named "entropy"; None where there is no such term.
            total: [n t] ω of the whole loss, to which the parts must add up; None to take their sum for it.

        Returns:
            The batch, its advantages and loss weights as they were.

        Raises:
            RolloutError: a part has another shape, is not finite, is not 0 outside of the response, or the parts do not
                add up to `total`; the message names the sequence and the part.

        Example:
            >>> from fkernel.rollout.record import Provenance
            >>> given = Provenance("custom-0", "custom", "custom", 0, 0)
            >>> one = SequenceRecord("U-000-00", (1,), (2,), "a", "b", (-1.0,), (-1.0,), (0.5,), "eos", given)
            >>> batch = GeneratedBatch((one,)).with_token_weights({"advantage": torch.tensor([[0.0, -0.5]])})
            >>> batch.records[0].token_weights
            {'advantage': (-0.5,)}
        """
        mask = self.sequences.response_mask
        η = {} if entropy is None else {"entropy": entropy} if isinstance(entropy, Tensor) else entropy
        ω_of = by_record(parts, self.records, mask, "token_weights")
        η_of = by_record(η, self.records, mask, "entropy_weights")
        if total is not None:
            check_part("total", total, self.records, mask)
            check_total(parts, total, self.records)
        triples = zip(self.records, ω_of, η_of, strict=True)
        return replace(self, records=tuple(replace(r, token_weights=a, entropy_weights=b) for r, a, b in triples))

    def _numbers(self, field: str) -> Tensor:
        self._check(field, self.records)
        return torch.tensor([getattr(record, field) for record in self.records])

    def _check(self, field: str, records: Sequence[SequenceRecord]) -> None:
        missing = [record.sequence_id for record in records if getattr(record, field) is None]
        if missing:
            raise RolloutError(f"{len(missing)} of {len(self)} sequences have no {field}: {listing(missing)}.")

    def by_id(self, sequence_id: str) -> SequenceRecord:
        """Find a sequence by its display id.

        Raises:
            RolloutError: there is none of that id; it names near ones.
        """
        for record in self.records:
            if record.sequence_id == sequence_id:
                return record
        from difflib import get_close_matches

        near = get_close_matches(sequence_id, self.ids, n=3) or self.ids[:3]
        raise RolloutError(f"There is no sequence {sequence_id!r} in this batch of {len(self)}; near: {listing(near)}.")

    def by_prompt(self, global_prompt_id: str) -> list[SequenceRecord]:
        """Find the sequences of a prompt, all its draws together.

        Raises:
            RolloutError: there is none.
        """
        records = [record for record in self.records if record.provenance.global_prompt_id == global_prompt_id]
        if not records:
            raise RolloutError(f"No sequence of this batch belongs to the prompt {global_prompt_id!r}.")
        return records

    def clone_with_subset(self, keep: Iterable[str] | Callable[[SequenceRecord], bool]) -> GeneratedBatch:
        """Keep some sequences, under their own ids and in their own order.

        Args:
            keep: their ids, or a function that tells.

        Raises:
            RolloutError: an id is unknown, or nothing is left.
        """
        if callable(keep):
            return replace(self, records=tuple(record for record in self.records if keep(record)))
        wanted = {self.by_id(name).sequence_id for name in keep}
        return replace(self, records=tuple(record for record in self.records if record.sequence_id in wanted))

    @staticmethod
    def merge(batches: Sequence[GeneratedBatch]) -> GeneratedBatch:
        """Concatenate batches; every sequence keeps its id.

        Raises:
            RolloutError: an id occurs twice, or the batches are of different policies or distributions.
        """
        if not batches:
            raise RolloutError("There is nothing to merge: no batch was given.")
        first = batches[0]
        for batch in batches[1:]:
            if batch.checkpoint != first.checkpoint:
                raise RolloutError(
                    "Batches of two checkpoints cannot be one: their log-probabilities are of two policies."
                )
            if batch.sampling != first.sampling and None not in (batch.sampling, first.sampling):
                raise RolloutError(
                    f"Batches sampled differently cannot be one: {batch.sampling} and {first.sampling}; their log q "
                    f"are of two distributions."
                )
        sampling = next((batch.sampling for batch in batches if batch.sampling), None)
        return replace(first, records=tuple(record for batch in batches for record in batch), sampling=sampling)

    def with_advantages(self, rule: str | Advantage) -> GeneratedBatch:
        """Set advantages from the rewards, by a rule of `fkernel.rollout.advantages`; 0 where the reward abstained.

        Raises:
            RolloutError: there is no such rule, or a sequence has no reward (and did not abstain); or the rule fails,
                gives another shape, or something that is not finite.
        """
        of = advantage_of(rule)
        assert of is not None
        self._check("reward", [record for record in self.records if not record.abstained])
        given = [float("nan") if record.reward is None else record.reward for record in self.records]
        return self.with_values("advantage", among_judged(of, torch.tensor(given), self.groups))

    def with_loss_weights(self, rule: str, **options: Any) -> GeneratedBatch:
        """Set loss weights by a rule of `fkernel.rollout.advantages.loss_weights`; options as there."""
        lengths = [len(record.response_ids) for record in self.records]
        return self.with_values("weight", loss_weights(lengths, rule, groups=self.groups.tolist(), **options))

    def with_values(self, field: str, values: Tensor) -> GeneratedBatch:
        """Set "reward", "advantage" or "weight" of every sequence, [n]."""
        pairs = zip(self.records, values.tolist(), strict=True)
        return replace(self, records=tuple(replace(record, **{field: value}) for record, value in pairs))

    @property
    def diagnostics(self) -> dict[str, Any]:
        """Summary statistics of the batch, as JSON.

        mean_reward and without_signal (share of groups whose rewards are all equal, so that advantages relative to the
        group vanish) are of the sequences that were judged, and None without rewards; abstained is the share of others.
        """
        rewards = [record.reward for record in self.records if record.reward is not None]
        abstained = [record.abstained and record.reward is None for record in self.records]
        known = bool(rewards) and len(rewards) + sum(abstained) == len(self)
        by_group: dict[int, set[float]] = {group: set() for group in self.groups.tolist()}
        for group, record in zip(self.groups.tolist(), self.records, strict=True):
            by_group[group].update([] if record.reward is None else [record.reward])
        return {
            "sequences": len(self),
            "prompts": len({record.provenance.global_prompt_id for record in self.records}),
            "groups": len(by_group),
            "mean_reward": fmean(rewards) if known else None,
            "abstained": fmean(abstained),
            "without_signal": fmean(len(each) < 2 for each in by_group.values()) if known else None,
            "truncated": fmean(record.truncated for record in self.records),
            "length": _spread([len(record.response_ids) for record in self.records]),
            "entropy": _spread([fmean(record.entropies) for record in self.records if record.entropies]),
            "logprob": _spread([record.logprob for record in self.records if record.logprobs]),
        }

    def to_frame(self) -> Any:
        """Make a pandas table, one row a sequence.

        Raises:
            RolloutError: pandas is not installed.
        """
        try:
            import pandas as pd  # an optional package
        except ImportError:
            raise RolloutError("to_frame needs pandas: pip install pandas.") from None
        rows = []
        for record in self.records:
            row = {"sequence_id": record.sequence_id, **asdict(record.provenance)}
            row |= {"prompt": record.prompt, "response": record.response, "tokens": len(record.response_ids)}
            scored = (
                record.logprob if record.logprobs else None,
                fmean(record.entropies) if record.entropies else None,
            )
            row |= {"logprob": scored[0], "entropy": scored[1], "finish": record.finish}
            row |= {"reward": record.reward, "advantage": record.advantage, "weight": record.weight}
            row |= {f"reward:{name}": value for name, value in record.rewards.items()}
            rows.append(row | {"content_hash": record.content_hash})
        return pd.DataFrame(rows).set_index("sequence_id")


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and quartiles; None of nothing."""
    if not values:
        return None
    quarters = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0, 0.25, 0.5, 0.75, 1]).double())
    return {"mean": fmean(values), **dict(zip(("min", "q1", "median", "q3", "max"), quarters.tolist(), strict=True))}
