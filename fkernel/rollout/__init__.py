"""Sample, score and reward responses: prompts, templates, sampling, rewards, advantages, records, batches, files."""

from fkernel.rollout.advantages import Advantage, loss_weights
from fkernel.rollout.batch import GeneratedBatch
from fkernel.rollout.files import MANIFEST, content_of_batch, load_batch, save_batch
from fkernel.rollout.generator import SampleGenerator
from fkernel.rollout.guards import check_recorded, check_temperature
from fkernel.rollout.judging import BatchReward, RewardConfig
from fkernel.rollout.probes import probe_name, probes_of, read_probes
from fkernel.rollout.prompts import Gym, Prompt, PromptSource, TablePrompts, custom, dataset, jsonl
from fkernel.rollout.record import CustomSample, Provenance, SequenceRecord
from fkernel.rollout.reward_parts import split_advantages
from fkernel.rollout.rewards import Reward, dotted
from fkernel.rollout.sampling import Sampling
from fkernel.rollout.scoring import TokenStatistics, score
from fkernel.rollout.template import Template, render

__all__ = [
    "MANIFEST",
    "Advantage",
    "BatchReward",
    "CustomSample",
    "GeneratedBatch",
    "Gym",
    "Prompt",
    "PromptSource",
    "Provenance",
    "Reward",
    "RewardConfig",
    "SampleGenerator",
    "Sampling",
    "SequenceRecord",
    "TablePrompts",
    "Template",
    "TokenStatistics",
    "check_recorded",
    "check_temperature",
    "content_of_batch",
    "custom",
    "dataset",
    "dotted",
    "jsonl",
    "load_batch",
    "loss_weights",
    "probe_name",
    "probes_of",
    "read_probes",
    "render",
    "save_batch",
    "score",
    "split_advantages",
]
