"""From prompts to sequences that can be trusted: sources, templates, sampling, rewards, advantages, records, files."""

from fkernel.rollout.advantages import Advantage, loss_weights
from fkernel.rollout.batch import GeneratedBatch
from fkernel.rollout.files import content_of_batch, load_batch, save_batch
from fkernel.rollout.generator import SampleGenerator
from fkernel.rollout.guards import check_recorded, check_temperature
from fkernel.rollout.prompts import Gym, Prompt, PromptSource, Rows, dataset, jsonl
from fkernel.rollout.record import CustomSample, Provenance, SequenceRecord
from fkernel.rollout.rewards import Reward
from fkernel.rollout.sampling import Sampling
from fkernel.rollout.scoring import TokenStatistics, score
from fkernel.rollout.template import Template

__all__ = [
    "Advantage",
    "CustomSample",
    "GeneratedBatch",
    "Gym",
    "Prompt",
    "PromptSource",
    "Provenance",
    "Reward",
    "Rows",
    "SampleGenerator",
    "Sampling",
    "SequenceRecord",
    "Template",
    "TokenStatistics",
    "check_recorded",
    "check_temperature",
    "content_of_batch",
    "dataset",
    "jsonl",
    "load_batch",
    "loss_weights",
    "save_batch",
    "score",
]
