"""A small policy with a past, an update batch that it really wrote, and the step that was really taken on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fkernel import checkpoint
from fkernel.func import pad
from fkernel.rollout import GeneratedBatch, SampleGenerator, Sampling, jsonl, save_batch
from tests.rollout.conftest import byte_tokenizer, policy

PROMPTS = [f"{a}+{b}=" for a in range(3, 6) for b in range(4, 7)]
MAX_NORM = 0.05
SAMPLING = {"temperature": 1.0, "max_new_tokens": 6}


def brevity(prompt: Any, response: str) -> float:
    """A reward that tells completions apart: shorter is better, and an even number of bytes better still."""
    return 1.0 / (1 + len(response)) + 0.3 * (len(response.encode()) % 2)


class Run(NamedTuple):
    """What a training run left: checkpoints before and after one step, and the batch of that step."""

    before: Path
    after: Path
    update: Path
    train: Path
    test: Path
    batch: GeneratedBatch

    def plan(self, out: Path, **changes: Any) -> dict[str, Any]:
        """A plan about that step; keys may be replaced."""
        return {
            "checkpoint": {"path": str(self.before)},
            "prompts": [
                {"jsonl": str(self.train), "split": "train"},
                {"jsonl": str(self.test), "split": "test"},
            ],
            "template": "bare",
            "sampling": SAMPLING,
            "update": {"kind": "from_file", "path": str(self.update)},
            "step": {"max_norm": MAX_NORM, "after": {"path": str(self.after)}},
            "requests": [{"kind": "evaluation", "name": "held_out", "batch_size_prompts": 4}],
            "capture": {"kernel": True},
            "storage": {"pictures": False},
            "out": str(out),
            **changes,
        }


def saved(directory: Path, model: Any, tokenizer: Any) -> None:
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="session")
def accounted(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(plan, results) of everything that accounts for a step."""
    from tests.study.accounted import everything

    return everything(run, tmp_path_factory.mktemp("accounted") / "out")


def made(place: Path) -> Run:
    with torch.random.fork_rng():
        model, tokenizer = policy(), byte_tokenizer()
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-4, weight_decay=0.1)
        past = pad([[9, 10, 11]] * 6, [[20 + i, 1] for i in range(6)])
        for _ in range(3):  # a past that leaves no coordinate unseen
            optimizer.zero_grad()
            torch.manual_seed(1)
            (model(past.input_ids).logits * torch.randn(6, past.input_ids.shape[1], 259)).mean().backward()
            optimizer.step()
        optimizer.zero_grad()
    saved(place / "before", model, tokenizer)
    torch.save(optimizer.state_dict(), place / "before" / "optimizer.pt")
    for split, prompts in (("train", PROMPTS[:5]), ("test", PROMPTS[5:])):
        lines = [json.dumps({"question": q, "answer": str(eval(q[:-1]))}) for q in prompts]
        (place / f"{split}.jsonl").write_text("\n".join(lines))
    loaded = checkpoint.load(place / "before")
    generator = SampleGenerator(
        loaded.model,
        loaded.tokenizer,
        jsonl(place / "train.jsonl"),
        fingerprint=loaded.provenance.fingerprint,
        sampling=Sampling(**SAMPLING),
        template="bare",
    )
    batch = generator.generate_update_batch(3, 3, seed=4, reward_cfg=brevity)
    save_batch(batch, place / "update")
    # The step itself, by torch: L = −Σ w A S, clipped.
    U = batch.sequences
    logp = model(U.input_ids).logits[:, :-1].log_softmax(-1).gather(-1, U.input_ids[:, 1:, None])[..., 0]
    (-(batch.weighted_advantages * (logp * U.response_mask[:, 1:]).sum(1)).sum()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()
    saved(place / "after", model, tokenizer)
    return Run(place / "before", place / "after", place / "update", place / "train.jsonl", place / "test.jsonl", batch)
