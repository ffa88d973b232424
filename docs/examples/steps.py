"""A few recorded steps each of DPO, of GRPO with accumulated gradients, and of GRPO in pure bfloat16.

    python docs/examples/steps.py DIR

DIR then holds a recording each: dpo/, accumulated/ (and start/, the policy before it), bf16-1e-6/ and bf16-1e-3/.
"""

import sys
import warnings
from pathlib import Path

import torch
from adder import pretrained, problems, tokenizer
from datasets import Dataset
from transformers import Qwen2ForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from fkernel.record import Recorder

warnings.simplefilter("ignore")
place = Path(sys.argv[1])
start = str(place / "start")
pretrained(200).save_pretrained(start)
tokenizer.save_pretrained(start)
common = {
    "output_dir": str(place / "run"), "save_strategy": "no", "lr_scheduler_type": "constant", "use_cpu": True,
    "gradient_checkpointing": False, "report_to": [], "disable_tqdm": True, "logging_strategy": "no", "seed": 0,
}  # fmt: skip


def recorded(trainer, name: str) -> None:
    """Train, and record every step with the states around it."""
    Recorder(place / name, snapshots="every").attach(trainer)
    trainer.train()


# ----------------------------------------------------------------------------------------------------------------- DPO
# Chosen is the right sum, rejected the sum that is off by one: both begin with the same digit.

pairs = [
    {"prompt": prompt, "chosen": str(n), "rejected": str(n + 1)} for prompt, n in ((p, int(s)) for p, s in problems)
]
settings = DPOConfig(
    max_steps=8, per_device_train_batch_size=16, learning_rate=1e-4, beta=0.1, bf16=False, max_length=16, **common
)
recorded(
    DPOTrainer(model=start, args=settings, train_dataset=Dataset.from_list(pairs[::5]), processing_class=tokenizer),
    "dpo",
)


# ---------------------------------------------------------------------------------------------------------------- GRPO


def correct(completions, answer, **_):
    """One for the right sum, less for one further off."""
    far = [abs(int("".join(filter(str.isdigit, t)) or 999) - int(a)) for t, a in zip(completions, answer, strict=True)]
    return [1 / (1 + d) for d in far]


dataset = Dataset.from_list([{"prompt": prompt, "answer": answer} for prompt, answer in problems[::7]])


def grpo(model, name: str, **others) -> None:
    """Four recorded steps of 8 prompts, 8 completions each."""
    settings = GRPOConfig(num_generations=8, max_completion_length=4, max_steps=4, **others, **common)
    trainer = GRPOTrainer(
        model=model, reward_funcs=correct, args=settings, train_dataset=dataset, processing_class=tokenizer
    )
    recorded(trainer, name)


grpo(
    start, "accumulated", per_device_train_batch_size=16, gradient_accumulation_steps=4, learning_rate=3e-4,
    beta=0.5, max_grad_norm=0.0, bf16=False,
)  # fmt: skip
for lr in (1e-6, 1e-3):
    model = Qwen2ForCausalLM.from_pretrained(start, dtype=torch.bfloat16)
    grpo(model, f"bf16-{lr:.0e}".replace("e-0", "e-"), per_device_train_batch_size=64, learning_rate=lr, bf16=False)
