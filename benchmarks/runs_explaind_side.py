"""ExPLAIND's side: its modular-addition transformer trained by its AdamW with history, and its path kernel's answer.

Run as `python -m benchmarks.runs_explaind_side FOLDER STEPS LR` in `.venv-peers`; imports nothing of this library. The
run goes to FOLDER/run.pt: θ before every step and after the last, the optimizer's moments, batches, test inputs; what
was predicted, and in which CPU time, to FOLDER/theirs.pt.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from pathlib import Path
from typing import Any

import torch
from explaind.data_paths import DataPath  # pyright: ignore[reportMissingImports]
from explaind.epk_model import ExactPathKernelModel  # pyright: ignore[reportMissingImports]
from explaind.model_paths import ModelPath  # pyright: ignore[reportMissingImports]
from explaind.modulo_model.loss import RegularizedCrossEntropyLoss  # pyright: ignore[reportMissingImports]
from explaind.modulo_model.model import SingleLayerTransformerClassifier  # pyright: ignore[reportMissingImports]
from explaind.optimizer_paths import AdamWOptimizerPath  # pyright: ignore[reportMissingImports]

MODULUS, TRAIN, BATCH, TESTS = 13, 64, 16, 4
TOKENS = MODULUS + 2
POINTS = (100, 2)
DECAY = 0.1


class Pairs(torch.utils.data.Dataset):
    """(a, +, b, =) and (a + b) mod P."""

    def __init__(self, pairs: torch.Tensor) -> None:
        a, b = pairs.unbind(1)
        self.data = torch.stack([a, torch.full_like(a, MODULUS), b, torch.full_like(a, MODULUS + 1)], 1)
        self.targets = ((a + b) % MODULUS).tolist()

    def __getitem__(self, i: int) -> Any:
        """A pair."""
        return self.data[i], self.targets[i]

    def __len__(self) -> int:
        """Count them."""
        return len(self.data)


class Kernel(ExactPathKernelModel):
    """Its kernel; where nothing is evaluated on the way, its store of evaluations is made here."""

    def exact_path_kernel_step_test(self, *rest: Any, prev_eval: Any = None, **others: Any) -> Any:
        """One step of it."""
        return super().exact_path_kernel_step_test(*rest, prev_eval={} if prev_eval is None else prev_eval, **others)


def main(folder: Path, steps: int, lr: float) -> None:
    """Train, predict, write."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pairs = torch.cartesian_prod(torch.arange(MODULUS), torch.arange(MODULUS))
    pairs = pairs[torch.randperm(len(pairs))]
    train, tests = Pairs(pairs[:TRAIN]), Pairs(pairs[TRAIN : TRAIN + TESTS])
    model = ModelPath(SingleLayerTransformerClassifier(TOKENS), device="cpu", output_dim=TOKENS)
    options: dict[str, Any] = {"lr": lr, "betas": (0.9, 0.98), "weight_decay": DECAY, "device": "cpu"}
    optimizer = AdamWOptimizerPath(model, **options)
    loader = torch.utils.data.DataLoader(train, batch_size=BATCH, shuffle=True)
    data, loss = DataPath(loader, full_batch=False), RegularizedCrossEntropyLoss(alpha=0.0)
    while len(model.checkpoints) <= steps:
        for batch in data.dataloader:
            x, y = data.get_batch(batch)
            optimizer.zero_grad()
            loss(model.forward(x), y).backward()
            optimizer.step()
            model.log_checkpoint()
            optimizer.log_checkpoint()
    theirs = [predicted(model, optimizer, loss, data, tests.data, points) for points in POINTS]
    optimizer_states = [{key: dict(kept[key]) for key in ("exp_avg", "exp_avg_sq")} for kept in optimizer.checkpoints]
    torch.save(
        {
            "params": model.checkpoints,
            "states": optimizer_states,
            "batches": data.checkpoints,
            "tests": tests.data,
            "options": options,
        },
        folder / "run.pt",
    )
    torch.save(theirs, folder / "theirs.pt")


def predicted(model: Any, optimizer: Any, loss: Any, data: Any, tests: torch.Tensor, points: int) -> dict[str, Any]:
    """Its prediction after the last step, and the credit of every example, with so many points a step."""
    kernel = Kernel(
        model=model, optimizer=optimizer, loss_fn=loss, data_path=data, device="cpu", integral_eps=1 / points,
        early_integral_eps=1 / points, evaluate_predictions=False, keep_param_wise_kernel=False,
    )  # fmt: skip
    begun = time.process_time()
    after, before, credit, *_ = kernel.predict(tests, keep_kernel_matrices=True)
    seconds = time.process_time() - begun
    real = model.forward(tests, step=len(model.checkpoints) - 1)
    result = {"predicted": after.detach(), "before": before.detach(), "after": real.detach(), "seconds": seconds}
    return {**result, "points": points, "attributed": {name: leaf.detach() for name, leaf in credit.items()}}


if __name__ == "__main__":
    with contextlib.redirect_stdout(io.StringIO()):
        main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
