"""Steps written as trainers write them: TRL's by TRL itself, the others' by functions written after their source.

Every function takes the rows of one step, with whatever a trainer has of them, and writes the files of that step. What
a file looks like is cited at `fkernel.record.dumps`; here it is written down again, from the writer's side.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fkernel.record import Recorder, Recording
from tests.checkpoint.writers import TOKENIZER
from tests.record.test_trl import trainer

CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
QUIET = {"log_completions": True, "generation_kwargs": {"suppress_tokens": [TOKENIZER.pad_token_id]}}
PAD = 0


class Trained(NamedTuple):
    """A run of TRL's, dumped and recorded.

    Attributes:
        output: the trainer's output_dir, with checkpoint-1, … and completions.
        recording: of the same run.
    """

    output: Path
    recording: Recording


def trl(place: Path, **options: Any) -> Trained:
    """Train for three steps on 16 completions each."""
    made = trainer(place, lora=False, **{**QUIET, **options})
    Recorder(place / "recording", snapshots="every").attach(made)
    made.train()
    return Trained(place / "run", Recording.open(place / "recording"))


class Row(NamedTuple):
    """One sequence, as trainers have it; the lists are of response tokens.

    Attributes:
        prompt: tokens.
        response: tokens.
        group: of its prompt.
        advantages: A.
        mask: of the loss.
        trainer: log π before the step.
        sampler: log π of the engine.
        reference: log π of the reference.
        reward: one number.
    """

    prompt: list[int]
    response: list[int]
    group: int
    advantages: list[float]
    mask: list[int]
    trainer: list[float]
    sampler: list[float]
    reference: list[float]
    reward: float = 1.0


def some_rows(n: int = 4, seed: int = 0) -> list[Row]:
    """Rows of two groups, with masks that have holes."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        t = int(torch.randint(2, 6, (), generator=g))
        numbers = [(-torch.rand(t, generator=g)).tolist() for _ in range(3)]
        mask = [1, *torch.randint(0, 2, (t - 1,), generator=g).tolist()]
        prompt = torch.randint(2, 15, (3,), generator=torch.Generator().manual_seed(i // 2)).tolist()
        response = torch.randint(2, 15, (t,), generator=g).tolist()
        A = torch.randn(t, generator=g).tolist() if i % 2 else [0.5 - i] * t
        rows.append(Row(prompt, response, i // 2, A, mask, *numbers, reward=float(i)))
    return rows


def write_lines(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def nemo_rl(place: Path, step: int, rows: Sequence[Row], left_out: Sequence[int] = ()) -> Path:
    """As `Logger.log_batched_dict_as_jsonl` writes what `grpo_train` logs: batches of one, padded to the longest."""
    width = max(len(row.prompt) + len(row.response) for row in rows) + 1

    def padded(row: Row, values: Sequence[Any], before: Any) -> list[Any]:
        whole = [before] * len(row.prompt) + [*values]
        return whole + [before] * (width - len(whole))

    lines = []
    for i, row in enumerate(rows):
        whole = [*row.prompt, *row.response]
        sample = {
            "content": "text",
            "rewards": row.reward,
            "input_lengths": len(whole),
            "token_ids": whole + [PAD] * (width - len(whole)),
            "token_loss_mask": padded(row, row.mask, 0),
            "sample_loss_mask": 0.0 if i in left_out else 1.0,
            "advantages": padded(row, row.advantages, 0.0),
            "generation_logprobs": padded(row, row.sampler, 0.0),
            "prev_logprobs": padded(row, row.trainer, 0.0),
        }
        lines.append({name: [value] for name, value in sample.items()} | {"idx": i})
    return write_lines(place / f"train_data_step{step}.jsonl", lines).parent


def prime_rl(place: Path, step: int, rows: Sequence[Row], ranks: int = 2) -> Path:
    """As `TokenExporter.export` writes each rank's sequences, every second one on the second rank."""
    folder = place / "token_exports" / f"step_{step}"
    for rank in range(ranks):
        lines = []
        for i, row in enumerate(rows[rank::ranks]):
            start, t = len(row.prompt), len(row.prompt) + len(row.response)
            nothing = [None] * t
            record = {
                "schema_version": 1,
                "step": step,
                "rank": rank,
                "micro_step": i,
                "micro_sequence_idx": 0,
                "export_sequence_idx": i,
                "env_name": "sums",
                "token_ids": [*row.prompt, *row.response],
                "position_ids": [*range(t)],
                "loss_mask": [False] * start + [bool(m) for m in row.mask],
                "advantages": [0.0] * start + row.advantages,
                "inference_logprobs": [0.0] * start + row.sampler,
                "trainer_logprobs": [-2.7] * start + row.trainer,
                "entropy": [1.0] * t,
                **dict.fromkeys(("mismatch_kl", "importance_ratio", "is_masked"), nothing),
                **dict.fromkeys(("rl_weights", "ce_weights", "ref_kl_weights"), nothing),
            }
            lines.append(record)
        write_lines(folder / f"rank_{rank}.jsonl", lines)
    (folder / "STABLE").touch()
    return place


def open_instruct(place: Path, step: int, rows: Sequence[Row]) -> Path:
    """As `_save_rollouts` appends a step to a shard; one number a sequence."""
    lines = [
        {
            "step": step,
            "sample_idx": i,
            "prompt_idx": row.group,
            "prompt_tokens": row.prompt,
            "response_tokens": row.response,
            "reward": row.reward,
            "advantage": row.advantages[0],
            "finish_reason": "stop",
            "dataset": "sums",
            "ground_truth": None,
            "request_info": {"num_calls": 0, "tool_calleds": False},
            "logprobs": row.sampler,
        }
        for i, row in enumerate(rows)
    ]
    other = {**lines[0], "step": step + 1}
    return write_lines(place / "mine_rollouts_000000.jsonl", [*lines, other]).parent


def slime(place: Path, rollout: int, rows: Sequence[Row], steps: int = 1) -> Path:
    """As `_build_dump_payload` lays samples out, of two data-parallel ranks and one micro-batch each a step."""
    each = len(rows) // steps
    shards, samples = [], []
    for dp in range(2):
        partition = [i for i in range(len(rows)) if i % 2 == dp]
        mine = [[k for k, i in enumerate(partition) if i // each == s] for s in range(steps)]
        shards.append(
            {
                "rank": dp,
                "data_parallel_rank": dp,
                "sample_indices": partition,
                "partition": partition,
                "micro_batch_indices": mine,
                "num_microbatches": [1] * steps,
                "global_batch_sizes": [each] * steps,
            }
        )
    for i, row in enumerate(rows):
        samples.append(
            {
                "data_parallel_rank": i % 2,
                "sample_index": i,
                "rollout_position": i,
                "tokens": torch.tensor([*row.prompt, *row.response]),
                "response_lengths": len(row.response),
                "total_lengths": len(row.prompt) + len(row.response),
                "loss_masks": torch.tensor(row.mask, dtype=torch.int32),
                "truncated": 0,
                "rollout_mask_sums": torch.tensor(sum(row.mask)),
                "advantages": torch.tensor(row.advantages),
                "log_probs": torch.tensor(row.trainer),
                "rollout_log_probs": torch.tensor(row.sampler),
                "ref_log_probs": torch.tensor(row.reference),
            }
        )
    content = {"format_version": 2, "rollout_id": rollout, "rank": 0, "samples": samples, "dp_shards": shards}
    place.mkdir(parents=True, exist_ok=True)
    torch.save({**content, "raw_reward": [row.reward for row in rows]}, place / f"{rollout}.pt")
    return place


def slime_rollout(place: Path, rollout: int, rows: Sequence[Row]) -> Path:
    """As `save_debug_rollout_data` writes `Sample.to_dict` of each."""
    samples = [
        {
            "group_index": row.group,
            "index": i,
            "tokens": [*row.prompt, *row.response],
            "response_length": len(row.response),
            "loss_mask": row.mask,
            "reward": row.reward,
            "rollout_log_probs": row.sampler,
            "remove_sample": False,
            "status": "completed",
            "metadata": {},
        }
        for i, row in enumerate(rows)
    ]
    place.mkdir(parents=True, exist_ok=True)
    torch.save({"rollout_id": rollout, "samples": samples}, place / f"{rollout}.pt")
    return place


def verl(place: Path, step: int, rows: Sequence[Row]) -> Path:
    """As `_log_rollout_data` decodes and `_write_generations` writes them."""
    lines = [
        {
            "input": TOKENIZER.decode(row.prompt, skip_special_tokens=True),
            "output": TOKENIZER.decode(row.response, skip_special_tokens=True),
            "gts": None,
            "score": row.reward,
            "step": step,
            "uid": f"{row.group}_{i}_0",
        }
        for i, row in enumerate(rows)
    ]
    return write_lines(place / f"{step}.jsonl", lines).parent


TOKENS: dict[str, Callable[[Path, int, Sequence[Row]], Path]] = {
    "nemo_rl": nemo_rl,
    "prime_rl": prime_rl,
    "open_instruct": open_instruct,
    "slime": slime,
}
"""Those whose files have tokens."""
