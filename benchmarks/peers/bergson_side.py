"""bergson's side: K over the modules that it covers, by its own public pieces, in an environment of its own.

    E    InMemoryCollector without normalizers: every module's unprojected per-sequence gradients, held in memory
    U    InMemoryCollector with `load_from_optimizer`'s AdamNormalizer and a Scorer, which streams U past E

It is what its `build` and `score` commands run, on the same default token budget a batch, but with nothing written to
disk; that was the faster of both. Losses are −S (`loss_reduction="sum"`), and the two signs of K cancel.

Run by `benchmarks.peers.against_bergson` as `python -m benchmarks.peers.bergson_side FOLDER`; imports nothing of this
library, which is not installed there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import bergson  # pyright: ignore[reportMissingImports]
import torch
from bergson.data import allocate_batches  # pyright: ignore[reportMissingImports]
from bergson.score.score_writer import InMemorySequenceScoreWriter  # pyright: ignore[reportMissingImports]
from bergson.utils.worker_utils import setup_model_and_peft  # pyright: ignore[reportMissingImports]
from datasets import Dataset  # pyright: ignore[reportMissingImports]
from torch import Tensor

from benchmarks.peers.case import SEQUENCES
from benchmarks.peers.turns import Answer, serve, timed


class Bergson:
    """A model, its optimizer's second moments and two datasets, loaded once.

    Args:
        folder: as `benchmarks.peers.case.write` leaves it.
    """

    def __init__(self, folder: Path) -> None:
        self.cfg = bergson.IndexConfig(run_path=str(folder / "bergson"), model=str(folder), precision="fp32")
        self.cfg.partial_run_path.mkdir(parents=True, exist_ok=True)
        self.model, targets = setup_model_and_peft(self.cfg)
        assert targets is None  # all modules that it supports
        self.raw = bergson.GradientProcessor(projection_dim=None)
        self.adam = bergson.GradientProcessor(
            normalizers=bergson.load_from_optimizer(self.model, str(folder)), projection_dim=None
        )
        given = torch.load(folder / SEQUENCES)
        self.E, self.U = (dataset(given[side], given["prompt"]) for side in ("E", "U"))

    def collect(self, data: Any, processor: Any, scorer: Any = None) -> Any:
        """Run its hooks over a dataset; the collector then holds gradients, or the scorer scores."""
        collector = bergson.InMemoryCollector(
            model=self.model.base_model, cfg=self.cfg, processor=processor, data=data, scorer=scorer
        )
        batches = allocate_batches(data["length"][:], self.cfg.token_batch_size)
        bergson.CollectorComputer(
            self.model, data, collector=collector, batches=batches, cfg=self.cfg
        ).run_with_collector_hooks()
        return collector

    def build(self) -> dict[str, Tensor]:
        """E's gradients, {module: [n_E, size]}."""
        return self.collect(self.E, self.raw).gradients

    def score(self, gradients: dict[str, Tensor]) -> Tensor:
        """K, [n_E n_U]."""
        writer = InMemorySequenceScoreWriter(len(self.U), len(self.E))
        scorer = bergson.Scorer(gradients, [*gradients], writer, torch.device("cpu"), torch.float32)
        self.collect(self.U, self.adam, scorer)
        return writer.scores.T

    def once(self) -> Answer:
        """Build E, score U, and say how long each took."""
        build, gradients = timed(self.build)
        score, K = timed(lambda: self.score(gradients))
        return {
            "cpu": build.total + score.total,
            "user": build.user + score.user,
            "build": build.total,
            "score": score.total,
            "K": K.tolist(),
            "covered": [self.parameter(module) for module in gradients],
            "version": bergson.__version__,
            "token_batch_size": self.cfg.token_batch_size,
        }

    def parameter(self, module: str) -> str:
        """Name the parameter behind a module, which bergson counts from `model.base_model`."""
        weight = self.model.base_model.get_submodule(module).weight
        return next(name for name, parameter in self.model.named_parameters() if parameter is weight)


def dataset(ids: Tensor, prompt: int) -> Any:
    """Hand over sequences already tokenized; −100 keeps the prompt out of the loss."""
    labels = ids.clone()
    labels[:, :prompt] = -100
    lengths = [ids.shape[1]] * len(ids)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist(), "length": lengths})


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(lambda: Bergson(Path(sys.argv[1])).once)
