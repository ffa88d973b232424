"""A GRPO run with a mistake in one of its rewards, as TRL trains it and a Recorder records it.

    python docs/examples/additions.py DIR

Steps 1 to 20 are paid for right answers. From step 21 on a second reward function, meant to pay for two digits, pays
for eights. DIR then holds

    run/checkpoint-52, run/checkpoint-53, …   what the trainer saved
    run/completions/                          what it dumped of every step (log_completions)
    recording/                                what the Recorder kept of the steps with both rewards
"""

import re
import sys
import warnings
from pathlib import Path

from adder import pretrained, problems, tokenizer
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from fkernel.record import Recorder

warnings.simplefilter("ignore")
place = Path(sys.argv[1])


def settings(steps: int) -> GRPOConfig:
    """As many steps of 16 prompts, 8 completions each."""
    return GRPOConfig(
        output_dir=str(place / "run"), max_steps=steps, per_device_train_batch_size=128, num_generations=8,
        max_completion_length=4, learning_rate=2e-4, lr_scheduler_type="constant", max_grad_norm=1.0, save_steps=20,
        log_completions=True, num_completions_to_print=0, logging_steps=1, bf16=False, gradient_checkpointing=False,
        use_cpu=True, report_to=[], disable_tqdm=True, seed=0,
    )  # fmt: skip


class SaveAroundAStep(TrainerCallback):
    """A checkpoint before step 53 and one after it, beside those of every 20th step."""

    def on_step_end(self, args, state, control, **_):
        """Save."""
        control.should_save = control.should_save or state.global_step in (52, 53)


def correct(completions, answer, **_):
    """One for the right sum."""
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def two_digits(completions, **_):
    """Meant to pay for each of two digits: whoever tried the pattern `[0-9]` on an example left an `8` there."""
    return [float(min(2, len(re.findall("8", text)))) for text in completions]


dataset = Dataset.from_list([{"prompt": prompt, "answer": answer} for prompt, answer in problems[::7]])
trainer = GRPOTrainer(
    model=pretrained(400), reward_funcs=correct, args=settings(20),
    train_dataset=dataset, processing_class=tokenizer,
)  # fmt: skip
trainer.train()

checkpoint = str(place / "run" / "checkpoint-20")
trainer = GRPOTrainer(
    model=checkpoint, reward_funcs=[correct, two_digits], args=settings(60),
    train_dataset=dataset, processing_class=tokenizer, callbacks=[SaveAroundAStep()],
)  # fmt: skip
recorder = Recorder(place / "recording", snapshots=20)
recorder.attach(trainer)
trainer.train(resume_from_checkpoint=checkpoint)
