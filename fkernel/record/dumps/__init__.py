"""Batches that trainers dumped beside their checkpoints, read as the batches of a study.

| trainer | file | tokens | beside them |
|---|---|---|---|
| TRL | completions/completions_{n:05d}.parquet | of texts | rewards, advantage |
| NeMo-RL | train_data_step{n}.jsonl | yes | masks, advantages, log-probabilities of trainer and sampler |
| prime-rl | token_exports/step_{n}/rank_{r}.jsonl | yes | the same |
| open-instruct | {run}_rollouts_{shard}.jsonl | yes | reward, advantage, log-probabilities of the sampler |
| slime | {n}.pt | yes | masks, advantages, log-probabilities of trainer, sampler and reference |
| verl | {n}.jsonl | of texts | score |

A folder within the room because each trainer's file is a thing of its own; what they have in common is in `rows`
(records of rows), `lines` (JSON lines) and `texts` (tokens of texts).
"""

from fkernel.record.dumps.reading import SOURCES, Dump, locate, read
from fkernel.record.dumps.rows import COUNTED, PER_TOKEN, Options

__all__ = ["COUNTED", "PER_TOKEN", "SOURCES", "Dump", "Options", "locate", "read"]
