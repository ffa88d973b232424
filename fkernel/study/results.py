"""One explained step as a finished result: arrays by sequence id, with the texts, ready to be shown or saved.

<directory>/
  results.json   everything but the matrices, schema-versioned; written last
  kernel.npz     K and C [n_E n_U], the effects [n_E], and the ids of rows and columns; loads without pickle
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from fkernel.errors import FKernelError
from fkernel.kernel import Calibration, calibrate

SCHEMA = 1
_EFFECTS = ("momentum", "decay", "curvature", "realised")


class ResultsError(FKernelError, ValueError):
    """A results directory is missing, incomplete, or of a newer schema."""


@dataclass(frozen=True)
class SequenceInfo:
    """A sequence as people know it.

    Attributes:
        id: display id, such as U-004-03.
        prompt: the prompt's text.
        response: the response's text.
        logprob: S before the step, nats.
        reward: None where none was given.
        advantage: A_u; None for evaluation sequences.
        weight: w_u, the loss weight; None for evaluation sequences.
    """

    id: str
    prompt: str
    response: str
    logprob: float
    reward: float | None = None
    advantage: float | None = None
    weight: float | None = None


@dataclass(frozen=True, eq=False)
class StepResults:
    """What one optimizer step did to every sequence of E, and which sequence of U did it. All in nats.

    Attributes:
        evaluation: the rows, n_E sequences.
        update: the columns, n_U sequences.
        kernel: [n_E n_U] ⟨∇S_e, P_step ∇S_u⟩, nats per unit of c·w_u·A_u.
        contributions: [n_E n_U] C, nats.
        momentum: [n_E] nats.
        decay: [n_E] nats.
        curvature: [n_E] nats, ½ ΔθᵀH_eΔθ.
        realised: [n_E] nats, S after the step minus S before.
        step: what is known of the step: clip, grad_norm, lr, ….
        environment: versions, threads, dtype.
    """

    evaluation: tuple[SequenceInfo, ...]
    update: tuple[SequenceInfo, ...]
    kernel: np.ndarray
    contributions: np.ndarray
    momentum: np.ndarray
    decay: np.ndarray
    curvature: np.ndarray
    realised: np.ndarray
    step: dict[str, Any]
    environment: dict[str, Any]

    @property
    def batch(self) -> np.ndarray:
        """[n_E] nats: Σ_u C_eu, what the update batch did."""
        return self.contributions.sum(1)

    @property
    def first_order(self) -> np.ndarray:
        """[n_E] nats: batch + momentum + decay."""
        return self.batch + self.momentum + self.decay

    @property
    def second_order(self) -> np.ndarray:
        """[n_E] nats: first order + curvature."""
        return self.first_order + self.curvature

    @property
    def calibration(self) -> dict[str, Calibration]:
        """The prediction held against the step really taken: K·A alone, first order, second order."""
        predictions = {"batch": self.batch, "first_order": self.first_order, "second_order": self.second_order}
        realised = torch.from_numpy(self.realised)
        return {name: calibrate(torch.from_numpy(p), realised) for name, p in predictions.items()}

    def top_contributors(self, row: int, k: int = 3) -> list[tuple[SequenceInfo, float]]:
        """Return the k update sequences that moved one evaluation sequence most, with their nats, largest first."""
        order = np.argsort(-np.abs(self.contributions[row]), kind="stable")[:k]
        return [(self.update[u], float(self.contributions[row, u])) for u in order]

    def save(self, directory: str | Path) -> Path:
        """Write `results.json` and `kernel.npz`; each file appears whole or not at all, the JSON last.

        Returns:
            The directory.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        arrays = {name: getattr(self, name) for name in ("kernel", "contributions", *_EFFECTS)}
        arrays["evaluation_ids"] = np.array([s.id for s in self.evaluation], dtype=np.str_)
        arrays["update_ids"] = np.array([s.id for s in self.update], dtype=np.str_)
        with _whole(directory / "kernel.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        with _whole(directory / "results.json") as temporary:
            text = json.dumps(self._to_json(), indent=1, allow_nan=False, ensure_ascii=False)
            temporary.write_text(text + "\n", encoding="utf-8")
        return directory

    @classmethod
    def load(cls, directory: str | Path) -> StepResults:
        """Read what `save` wrote.

        Raises:
            ResultsError: a file is missing or unreadable, or the schema is newer than this version knows.
        """
        directory = Path(directory)
        try:
            data = json.loads((directory / "results.json").read_text(encoding="utf-8"))
            with np.load(directory / "kernel.npz", allow_pickle=False) as file:
                arrays = {name: file[name] for name in ("kernel", "contributions", *_EFFECTS)}
                ids = [file[name].tolist() for name in ("evaluation_ids", "update_ids")]
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise ResultsError(f"{directory} holds no readable results.json and kernel.npz: {error}") from error
        if data.get("schema", 0) > SCHEMA:
            raise ResultsError(f"{directory} was written with schema {data['schema']}; this fkernel reads {SCHEMA}.")
        names = [field.name for field in fields(SequenceInfo)]
        rows, columns = (
            tuple(SequenceInfo(**{k: item[k] for k in names}) for item in data[side])
            for side in ("evaluation", "update")
        )
        if [[s.id for s in side] for side in (rows, columns)] != ids:
            raise ResultsError(f"{directory}: results.json and kernel.npz are about different sequences.")
        return cls(rows, columns, **arrays, step=data["step"], environment=data["environment"])

    def _to_json(self) -> dict[str, Any]:
        effects = ("batch", "momentum", "decay", "curvature", "first_order", "second_order", "realised")
        evaluation = [
            asdict(info)
            | {name: float(getattr(self, name)[row]) for name in effects}
            | {"top_contributors": [{"id": u.id, "nats": nats} for u, nats in self.top_contributors(row)]}
            for row, info in enumerate(self.evaluation)
        ]
        return {
            "schema": SCHEMA,
            "units": "nats; positive raises the log-probability of the row's sequence",
            "calibration": {name: value._asdict() for name, value in self.calibration.items()},
            "step": self.step,
            "environment": self.environment,
            "evaluation": evaluation,
            "update": [asdict(info) for info in self.update],
        }


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A temporary path beside the target, renamed onto it when the block ends well and removed when it does not."""
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp's own mode is private
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
