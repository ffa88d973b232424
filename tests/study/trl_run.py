"""A run of TRL's GRPOTrainer that kept every checkpoint, and what each of its steps was given.

The trainer is TRL's own, with its AdamW, its schedule and its clipping. Only what `compute_loss` receives is written
down, so that the update batch of a step is what the trainer differentiated, and not what we would have drawn.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PrinterCallback, Qwen2Config, Qwen2ForCausalLM

from fkernel import checkpoint
from fkernel.func import pad
from fkernel.rollout import (
    GeneratedBatch,
    Provenance,
    SampleGenerator,
    Sampling,
    SequenceRecord,
    jsonl,
    loss_weights,
    score,
)
from tests.checkpoint.writers import TOKENIZER

LONGEST = 6
SAMPLING = Sampling(temperature=1.0, max_new_tokens=LONGEST)
SEEN = [f"{a}+{b}=" for a in range(1, 20) for b in range(2, 30, 3)]
HELD_OUT = [f"{a}+{b}=" for a in range(1, 20, 3) for b in range(3, 30, 3)]
"""Prompts of four to six tokens, so that TRL pads them."""
STEPS, WARMUP, DECAY = 8, 2, 1.0
"""A decay of 1, so that it is felt where weights are this small."""


class Asked(NamedTuple):
    """How a run is made.

    Attributes:
        rule: TRL's loss_type.
        lora: whether an adapter is trained, and not the model.
        schedule: of the learning rate, after a linear warmup.
        peak: the learning rate that it comes down from.
        max_norm: of gradient clipping.
        accumulation: micro-batches a step.
        padding: whether the padding token may be sampled, in the middle of a response too.
        dtype: of the weights, and so of the optimizer's moments.
        options: of TRL's configuration, beside or instead of what is given below: ((name, value), …).
    """

    rule: str
    lora: bool
    schedule: str
    peak: float
    max_norm: float
    accumulation: int = 1
    padding: bool = False
    dtype: str = "float32"
    options: tuple[tuple[str, Any], ...] = ()


class Trained(NamedTuple):
    """What a run left.

    Attributes:
        spec: how it was made.
        path: where checkpoint-1, checkpoint-2, … are.
        base: the base model's directory; None where no adapter was trained.
        given: {steps taken: micro-batches of the next step, as `compute_loss` received them}.
        log: {steps taken after it: what the trainer logged of a step}.
        weights: {steps taken: (ω, η or None) of each micro-batch, [b t] of its completions, as autograd handed them
            back at the trainer's log-probabilities and entropies}.
    """

    spec: Asked
    path: Path
    base: Path | None
    given: dict[int, list[dict[str, torch.Tensor]]]
    log: dict[int, dict[str, float]]
    weights: dict[int, list[list[torch.Tensor | None]]]

    def checkpoint(self, at: int) -> dict[str, Any]:
        """A checkpoint, as plans name it."""
        place = {"path": str(self.path / f"checkpoint-{at}")}
        return place if self.base is None else {**place, "base": str(self.base)}

    def plan(self, at: int, update: Path, E: GeneratedBatch, **changes: Any) -> dict[str, Any]:
        """A plan about the step that was taken at a checkpoint; keys may be replaced."""
        return {
            "checkpoint": self.checkpoint(at),
            "update": {"kind": "from_file", "path": str(update)},
            "step": {"max_norm": self.spec.max_norm, "after": self.checkpoint(at + 1)},
            "requests": [{"kind": "payload", "name": "held_out", "batch": E}],
            "self_kernel": False,
            "storage": {"persist": False, "pictures": False},
            "out": str(self.path.parent / "study"),
            **changes,
        }


def policy() -> Any:
    """A Qwen2 whose weights are large enough that its decay is felt."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=15,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config)


def trained(place: Path, spec: Asked) -> Trained:
    """Train for eight steps, and save after each."""
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    given: dict[int, list[dict[str, torch.Tensor]]] = {}
    weights: dict[int, list[list[torch.Tensor | None]]] = {}

    class Watched(GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *rest: Any, **others: Any) -> Any:
            found = super()._get_per_token_logps_and_entropies(*rest, **others)
            if not found[0].requires_grad:
                return found
            kept: list[torch.Tensor | None] = [None, None]
            weights.setdefault(self.state.global_step, []).append(kept)
            for i, leaf in enumerate(found[:2]):
                if leaf is not None and leaf.requires_grad:
                    leaf.register_hook(lambda g, i=i: kept.__setitem__(i, g.clone()))
            return found

        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **others: Any) -> Any:
            kept = {name: leaf.clone() for name, leaf in inputs.items() if isinstance(leaf, torch.Tensor)}
            given.setdefault(self.state.global_step, []).append(kept)
            return super().compute_loss(model, inputs, *rest, **others)

    model, base, options = policy(), None, dict[str, Any]()
    if spec.lora:
        from peft import LoraConfig

        base = place / "base"
        model.save_pretrained(base)
        TOKENIZER.save_pretrained(base)
        model = Qwen2ForCausalLM.from_pretrained(base)
        # Both factors begin at random, as those of an adapter that has been trained: with B = 0 decay would do nothing.
        options["peft_config"] = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False
        )
    if dict(spec.options).get("beta") or spec.dtype != "float32":
        # TRL reads the reference from where the model came from; and `.to(bfloat16)` would round rotary frequencies.
        model.save_pretrained(place / "start")
        model = Qwen2ForCausalLM.from_pretrained(place / "start", dtype=getattr(torch, spec.dtype))
    settings: dict[str, Any] = {
        "output_dir": str(place / "run"),
        "loss_type": spec.rule,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": spec.accumulation,
        "num_generations": 4,
        "max_completion_length": LONGEST,
        "temperature": 1.0,
        "generation_kwargs": None if spec.padding else {"suppress_tokens": [TOKENIZER.pad_token_id]},
        "beta": 0.0,
        "num_iterations": 1,
        "max_steps": STEPS,
        "save_steps": 1,
        "learning_rate": spec.peak,
        "lr_scheduler_type": spec.schedule,
        "warmup_steps": WARMUP,
        "weight_decay": DECAY,
        "max_grad_norm": spec.max_norm,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 0,
    }
    args = GRPOConfig(**{**settings, **dict(spec.options)})
    run = Watched(
        model=model,
        reward_funcs=lambda completions, **_: [float(sum(map(text.count, "13579"))) for text in completions],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in SEEN]),
        processing_class=TOKENIZER,
        **options,
    )
    run.remove_callback(PrinterCallback)
    run.train()
    log = {int(row["step"]): row for row in run.state.log_history if "grad_norm" in row}
    return Trained(spec, place / "run", base, given, log, weights)


def update_batch(run: Trained, step: int, policy_at: int | None = None) -> GeneratedBatch:
    """What the trainer was given for a step, as a batch of a checkpoint: that step's own, or another's."""
    at = run.checkpoint(step if policy_at is None else policy_at)
    loaded = checkpoint.load(**at)
    spec, microbatches = run.spec, run.given[step]
    parts = [GeneratedBatch(_records(each), loaded.provenance.fingerprint, SAMPLING) for each in microbatches]
    weighted = [
        part.with_values(
            "weight",
            loss_weights(
                [len(record.response_ids) for record in part],
                spec.rule,
                max_completion_length=LONGEST,
                accumulation=spec.accumulation,
                tokens=int(each["num_items_in_batch"]),
            ),
        )
        for part, each in zip(parts, microbatches, strict=True)
    ]
    records = [record for part in weighted for record in part]
    told = score(loaded.model, pad([r.prompt_ids for r in records], [r.response_ids for r in records]), SAMPLING)
    known = [replace(record, **each._asdict()) for record, each in zip(records, told, strict=True)]
    return GeneratedBatch(_named(known), loaded.provenance.fingerprint, SAMPLING)


def token_weights(run: Trained, step: int, U: GeneratedBatch) -> GeneratedBatch:
    """The same batch, with what autograd handed back at the trainer's log-probabilities and entropies as the loss."""
    mask, laid = U.sequences.response_mask, []
    for i in (0, 1):
        whole = torch.zeros(mask.shape)
        rows = [
            row[m.bool()]
            for each, inputs in zip(run.weights[step], run.given[step], strict=True)
            for row, m in zip(_or_zeros(each[i], inputs), inputs["completion_mask"], strict=True)
        ]
        whole[mask] = torch.cat(rows)
        laid.append(whole)
    return U.with_token_weights({"loss": laid[0]}, {"loss": laid[1]} if laid[1].any() else None)


def recorded_microbatches(run: Trained, step: int, U: GeneratedBatch) -> list[dict[str, Any]]:
    """The backward passes of a step, with their padding, as plans take them."""
    passes, start = [], 0
    for each in run.given[step]:
        rows = len(each["advantages"])
        width = each["prompt_ids"].shape[1]
        ids = U.ids[start : start + rows]
        passes.append({"sequence_ids": ids, "prompt_width": width, "width": width + each["completion_ids"].shape[1]})
        start += rows
    return passes


def _or_zeros(weights: torch.Tensor | None, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.zeros(inputs["completion_mask"].shape) if weights is None else weights


def held_out(run: Trained, at: int) -> GeneratedBatch:
    """Completions of prompts that the run never saw, drawn from a checkpoint.

    Those that hold the padding token are left out: the trainer never draws it (`suppress_tokens`), so that its
    embedding is nearly nothing, and log π has no useful Taylor series where an RMSNorm divides by nearly nothing.
    """
    loaded = checkpoint.load(**run.checkpoint(at))
    file = run.path.parent / "held_out.jsonl"
    file.write_text("\n".join(json.dumps({"question": prompt, "answer": ""}) for prompt in HELD_OUT))
    generator = SampleGenerator(
        loaded.model,
        loaded.tokenizer,
        jsonl(file, "test"),
        fingerprint=loaded.provenance.fingerprint,
        sampling=SAMPLING,
        template="bare",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is left out below, and of responses cut as the trainer's are
        drawn = generator.generate_evaluation_batch(len(HELD_OUT), seed=1, with_replacement=False)
    return drawn.clone_with_subset(lambda record: TOKENIZER.pad_token_id not in record.response_ids)


def _records(given: dict[str, torch.Tensor]) -> tuple[SequenceRecord, ...]:
    """One record a row: prompts lose the padding on their left, completions what follows their EOS."""
    records = []
    for row, advantage in enumerate(given["advantages"].tolist()):
        prompt = tuple(given["prompt_ids"][row][given["prompt_mask"][row].bool()].tolist())
        response = tuple(given["completion_ids"][row][given["completion_mask"][row].bool()].tolist())
        ended = response[-1] == TOKENIZER.eos_token_id
        records.append(
            SequenceRecord(
                sequence_id=f"row-{row:02d}",
                prompt_ids=prompt,
                response_ids=response,
                prompt=str(TOKENIZER.decode([*prompt])),
                response=str(TOKENIZER.decode([*response[: len(response) - ended]])),
                logprobs=(),
                logqs=(),
                entropies=(),
                finish="eos" if ended else "length",
                provenance=Provenance("", "train", "trl", 0, row),
                advantage=advantage,
            )
        )
    return tuple(records)


def _named(records: list[SequenceRecord]) -> tuple[SequenceRecord, ...]:
    """Number the groups, whose rows TRL has shuffled: completions of one prompt belong together."""
    groups: dict[tuple[int, ...], int] = {}
    seen: dict[int, int] = {}
    named = []
    for record in records:
        group = groups.setdefault(record.prompt_ids, len(groups))
        completion = seen[group] = seen.get(group, -1) + 1
        place = replace(record.provenance, global_prompt_id=record.prompt, group=group, completion=completion)
        named.append(replace(record, sequence_id=f"U-{group:03d}-{completion:02d}", provenance=place))
    return tuple(named)
