"""Real trainers of supervised and preference learning: a tiny Qwen2, and what their batches were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback

from fkernel.record import Recorder, Recording
from tests.checkpoint.writers import TOKENIZER
from tests.study.trl_run import SEEN, policy

STEPS = 3
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "save_steps": 1,
    "learning_rate": 1e-2,
    "max_grad_norm": 0.3,
    "weight_decay": 0.1,
    "bf16": False,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "report_to": [],
    "disable_tqdm": True,
    "logging_steps": 1,
    "seed": 0,
}


def answer(prompt: str) -> str:
    """The sum that a prompt asks for."""
    return str(sum(map(int, prompt.rstrip("=").split("+"))))


def adapter(lora: bool) -> dict[str, Any]:
    """A LoRA configuration, as TRL's trainers take it."""
    if not lora:
        return {}
    from peft import LoraConfig

    return {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")}


def sft(place: Path, lora: bool = False, data: Any = None, model: Any = None, more: Any = None, **options: Any) -> Any:
    """TRL's SFTTrainer on prompts and completions."""
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    rows = data or [{"prompt": prompt, "completion": answer(prompt)} for prompt in SEEN]
    made = SFTTrainer(
        model=model or policy(),
        args=SFTConfig(**{**SETTINGS, "output_dir": str(place / "run"), "gradient_checkpointing": False, **options}),
        train_dataset=Dataset.from_list(rows),
        processing_class=TOKENIZER,
        **adapter(lora),
        **(more or {}),
    )
    made.remove_callback(PrinterCallback)
    return made


def plain(place: Path, collate: Any = None, model: Any = None, **options: Any) -> Any:
    """A Trainer of transformers, whose model computes the loss."""
    from transformers import Trainer, TrainingArguments

    more = {key: options.pop(key) for key in ("compute_loss_func", "eval_dataset") if key in options}
    made = Trainer(
        model=model or policy(),
        args=TrainingArguments(**{**SETTINGS, "output_dir": str(place / "run"), **options}),
        train_dataset=rows(),  # pyright: ignore[reportArgumentType] - a list is a dataset
        data_collator=collate or right,
        processing_class=TOKENIZER,
        **more,
    )
    made.remove_callback(PrinterCallback)
    return made


def rows() -> list[dict[str, list[int]]]:
    """Sequences of several lengths; the loss is about the answer, or about everything in every third one."""
    made = []
    for i, prompt in enumerate(SEEN):
        asked, said = TOKENIZER(prompt).input_ids, [*TOKENIZER(answer(prompt)).input_ids, 1]
        labels = [*asked, *said] if i % 3 == 0 else [*[-100] * len(asked), *said]
        made.append({"input_ids": [*asked, *said], "labels": labels})
    return made


def right(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)
    filling = {"input_ids": 0, "labels": -100}
    out = {
        name: torch.tensor([row[name] + [filling[name]] * (width - len(row[name])) for row in rows]) for name in filling
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return out | {"attention_mask": (torch.arange(width) < lengths[:, None]).long()}


def dpo(place: Path, lora: bool = False, **options: Any) -> Any:
    """TRL's DPOTrainer: the right sum is chosen, its reverse rejected."""
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    policy().save_pretrained(place / "base")
    TOKENIZER.save_pretrained(place / "base")
    data = [{"prompt": p, "chosen": answer(p), "rejected": f"{answer(p)[::-1]}0"} for p in SEEN]
    made = DPOTrainer(
        model=str(place / "base"),
        args=DPOConfig(**{**SETTINGS, "output_dir": str(place / "run"), "gradient_checkpointing": False, **options}),
        train_dataset=Dataset.from_list(data),
        processing_class=TOKENIZER,
        **adapter(lora),
    )
    made.remove_callback(PrinterCallback)
    return made


class Run:
    """A recorded run, and what its compute_loss was given, step by step."""

    def __init__(self, place: Path, trainer: Any, **options: Any) -> None:
        self.place, self.trainer = place, trainer
        self.given: dict[int, list[dict[str, torch.Tensor]]] = {}
        self.weights: dict[int, list[Any]] = {}
        """What autograd handed back at the outputs' log-probabilities, or at their logits, of each pass."""
        Recorder(place / "recording", **{"snapshots": "every", **options}).attach(trainer)
        inner = trainer.compute_loss

        def watched(model: Any, inputs: Any, *rest: Any, **others: Any) -> Any:
            kept = {name: leaf.clone() for name, leaf in inputs.items() if isinstance(leaf, torch.Tensor)}
            self.given.setdefault(trainer.state.global_step, []).append(kept)
            handle = model.register_forward_hook(self._watch)
            try:
                return inner(model, inputs, *rest, **others)
            finally:
                handle.remove()

        trainer.compute_loss = watched
        trainer.train()
        self.recording = Recording.open(place / "recording")
        self.log = [row for row in trainer.state.log_history if "grad_norm" in row]

    def _watch(self, _: Any, __: Any, out: Any) -> None:
        leaf = out.log_probs if getattr(out, "log_probs", None) is not None else out.logits
        if leaf.requires_grad:
            kept: list[Any] = [leaf.detach().clone(), None]
            self.weights.setdefault(self.trainer.state.global_step, []).append(kept)
            leaf.register_hook(lambda g: kept.__setitem__(1, g.clone()))
