"""A study's results and their directory, which is readable without this library.

<directory>/
  results.json       every request: sequences, effects, top contributors, diagnostics; schema-versioned, written last
  kernel.npz         arrays with the ids of their rows and columns; loads without pickle
  plan.json          what ran, every default filled in
  environment.json   versions, machine, revision, seeds, the plan's hash
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from fkernel.errors import ResultsError
from fkernel.io import atomic_file
from fkernel.study.loss_terms import PART
from fkernel.study.outcome import (
    EFFECTS,
    AnalysisResult,
    Entry,
    RequestResult,
    SelfKernel,
    SequenceInfo,
    as_record,
    asked_for,
)
from fkernel.study.sealed import RECORD, check_agrees, check_arrays, read_files, write_files
from fkernel.study.shown import results_text
from fkernel.study.tables import to_frame, to_xarray

SCHEMA = 5
BATCHES = "batches"
"""Folder beside the results with every request's batch."""
OWN = "update_batch"
"""Prefix of K_UU's arrays; no request may have this name."""
_ARRAYS = ("batch", *EFFECTS, "squared_norms", "diagonal", "top", "top_contributions", "kernel", "contributions")
INFO = TypeAdapter(SequenceInfo)
_OWN = ("eigenvalues", "squared_norms", "diagonal", "kernel")


@dataclass(frozen=True, eq=False, repr=False)
class FisherKernelResults:
    """The results of a plan.

    Attributes:
        plan: as run, every default filled in.
        environment: versions, machine, certificates.
        update: U, n_U sequences.
        step: facts of the step: c, ‖∇L‖, and so on.
        self_kernel: K_UU; None unless the plan asks for it.
        requests: {name: result}, in the plan's order.
        analyses: {name: AnalysisResult} of U itself: "health", "structure".
    """

    plan: dict[str, Any]
    environment: dict[str, Any]
    update: tuple[SequenceInfo, ...]
    step: dict[str, Any]
    self_kernel: SelfKernel | None
    requests: dict[str, RequestResult]
    analyses: dict[str, AnalysisResult] = field(default_factory=dict)

    def __repr__(self) -> str:
        """One screen: the requests."""
        return results_text(self)

    def _repr_html_(self) -> str:
        """The requests' tables, for notebooks."""
        return "".join(result._repr_html_() for result in self.requests.values())

    def __getitem__(self, name: str) -> RequestResult:
        """The result of one request.

        Raises:
            ResultsError: there is none of that name.
        """
        if name not in self.requests:
            raise ResultsError(f"There is no request {name!r}; these results have {', '.join(self.requests)}.")
        return self.requests[name]

    def analysis(self, name: str) -> AnalysisResult:
        """The result of an analysis of U, "health" or "structure".

        Raises:
            ResultsError: it was not asked for.
        """
        return asked_for(self.analyses, name, "The update batch")

    @property
    def units(self) -> str:
        """Unit of contributions: "nats", or "bare" where P is not calibrated."""
        return "nats" if self.plan["preconditioner"]["calibrated"] else "bare"

    @property
    def contributions(self) -> Any:
        """The contributions of all requests that captured them, an `xarray.DataArray` over (eval, update).

        `results.contributions.sel(eval="E-003-00")` is what U did to one sequence.

        Raises:
            ResultsError: none was captured, or xarray is not installed.
        """
        dataset = self.to_xarray()
        if "contributions" not in dataset:
            raise ResultsError("No request kept its contributions; ask for capture: {kernel: true} in the plan.")
        return dataset["contributions"]

    def to_xarray(self, request: str | None = None) -> Any:
        """An `xarray.Dataset` with dimensions eval and update, ids as coordinates.

        Args:
            request: one request's name; None concatenates all, with the coordinate `request`.

        Raises:
            ResultsError: xarray is not installed, or there is no such request.
        """
        return to_xarray(self.update, self.units, self._some(request))

    def to_netcdf(self, path: str | Path, request: str | None = None) -> Path:
        """Write `to_xarray` to a NetCDF file.

        Raises:
            ResultsError: as `to_xarray`.
        """
        with atomic_file(Path(path)) as temporary:
            self.to_xarray(request).to_netcdf(temporary)
        return Path(path)

    def to_frame(self, request: str | None = None) -> Any:
        """A pandas table, one row per sequence of E: texts, effects, the largest contributor.

        Raises:
            ResultsError: pandas is not installed, or there is no such request.
        """
        return to_frame(self._some(request))

    def _some(self, request: str | None) -> list[RequestResult]:
        return [*self.requests.values()] if request is None else [self[request]]

    def save_results(self, directory: str | Path) -> Path:
        """Write the four files atomically, results.json last, with checksums of the others and its own.

        Returns:
            The directory.

        Raises:
            ResultsError: something is no JSON or no finite number; what was there before is kept.
        """
        return write_files(Path(directory), self.plan, self.environment, self._record(), self._arrays())

    @classmethod
    def load(cls, directory: str | Path) -> FisherKernelResults:
        """Read what `save_results` wrote.

        Raises:
            ResultsError: a file is missing, unreadable, or of another schema than this version's.
        """
        place = Path(directory)
        written = read_files(place, SCHEMA)
        try:
            results = _read(*written, cls)
            check_agrees(results._record(), written.record, place / RECORD)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            if isinstance(error, ResultsError):
                raise
            raise ResultsError(f"{place} is damaged: {type(error).__name__} {error}.") from error
        return results

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {"update_ids": _ids(self.update)}
        own = self.self_kernel
        if own is not None:
            arrays[f"{OWN}/ids"] = np.array(own.ids, dtype=np.str_)
            arrays |= {f"{OWN}/{name}": v for name in _OWN if (v := getattr(own, name)) is not None}
        arrays |= _analysed(OWN, self.analyses)
        for name, result in self.requests.items():
            arrays[f"{name}/evaluation_ids"] = _ids(result.evaluation)
            arrays |= {f"{name}/{key}": v for key in _ARRAYS if (v := getattr(result, key)) is not None}
            arrays |= {f"{name}/{PART}{part}": v for part, v in result.parts.items()}
            arrays |= _analysed(name, result.analyses)
            if result.update_diagonal is not None:
                arrays["update_diagonal"] = result.update_diagonal
        return arrays

    def _record(self) -> dict[str, Any]:
        own = self.self_kernel
        scalars = ("effective_rank", "participation", "same_prompt", "cross_prompt", "norm_ratio")
        return {
            "schema": SCHEMA,
            "units": f"{self.units}; positive raises the log-probability of the row's sequence",
            "step": self.step,
            "update": [as_record(info) for info in self.update],
            "self_kernel": None if own is None else {name: getattr(own, name) for name in scalars},
            "analyses": {name: result.facts for name, result in self.analyses.items()},
            "requests": {name: _request(result) for name, result in self.requests.items()},
        }


def _ids(sequences: tuple[SequenceInfo, ...]) -> np.ndarray:
    return np.array([info.id for info in sequences], dtype=np.str_)


def _request(result: RequestResult) -> dict[str, Any]:
    effects = ("batch", *EFFECTS, "predicted", "squared_norms", "diagonal")
    given = {name: values for name in effects if (values := getattr(result, name)) is not None}
    given |= {PART + part: values for part, values in result.parts.items()}
    rows = [
        as_record(info)
        | {name: float(values[row]) for name, values in given.items()}
        | {"top_contributors": [{"id": u.id, "value": v} for u, v in result.top_contributors(row, _width(result))]}
        for row, info in enumerate(result.evaluation)
    ]
    return {
        "kind": result.kind,
        "calibration": {name: value._asdict() for name, value in result.calibration.items()},
        "selected": [asdict(entry) for entry in result.selected],
        "facts": result.facts,
        "analyses": {name: analysis.facts for name, analysis in result.analyses.items()},
        "evaluation": rows,
    }


def _analysed(whose: str, analyses: Mapping[str, AnalysisResult]) -> dict[str, np.ndarray]:
    return {
        f"{whose}/{analysis}/{name}": values
        for analysis, result in analyses.items()
        for name, values in result.arrays.items()
    }


def _analyses(whose: str, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, AnalysisResult]:
    analyses = {}
    for analysis, its_facts in facts.items():
        start = f"{whose}/{analysis}/"
        own = {name.removeprefix(start): values for name, values in arrays.items() if name.startswith(start)}
        analyses[analysis] = AnalysisResult(own, its_facts)
    return analyses


def _width(result: RequestResult) -> int:
    return 0 if result.top is None else result.top.shape[1]


def _read(
    plan: dict[str, Any],
    environment: dict[str, Any],
    data: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    kind: type[FisherKernelResults],
) -> FisherKernelResults:
    names = [field.name for field in fields(SequenceInfo) if field.name != "times"]

    def infos(rows: Any, ids: np.ndarray) -> tuple[SequenceInfo, ...]:
        sequences = tuple(INFO.validate_python({name: row[name] for name in names}) for row in rows)
        if [info.id for info in sequences] != ids.tolist():
            raise ResultsError("results.json and kernel.npz are about different sequences.")
        return sequences

    update = infos(data["update"], arrays["update_ids"])
    requests = {}
    for name, row in data["requests"].items():
        given = {key: arrays[f"{name}/{key}"] for key in _ARRAYS if f"{name}/{key}" in arrays}
        check_arrays(given, name, len(update))
        if not isinstance(row["facts"], dict):
            raise TypeError(f"the facts of {name!r} are a {type(row['facts']).__name__}")
        start = f"{name}/{PART}"
        parts = {key.removeprefix(start): values for key, values in arrays.items() if key.startswith(start)}
        if "diagonal" in given:
            given["update_diagonal"] = arrays["update_diagonal"]
        evaluation = infos(row["evaluation"], arrays[f"{name}/evaluation_ids"])
        selected = tuple(Entry(**entry) for entry in row["selected"])
        requests[name] = RequestResult(
            name,
            row["kind"],
            evaluation,
            update,
            selected=selected,
            facts=row["facts"],
            analyses=_analyses(name, row["analyses"], arrays),
            parts=parts,
            **given,
        )
    own = None
    if data["self_kernel"] is not None:
        record, given = data["self_kernel"], {key: arrays[f"{OWN}/{key}"] for key in _OWN if f"{OWN}/{key}" in arrays}
        own = SelfKernel(
            ids=tuple(arrays[f"{OWN}/ids"].tolist()),
            effective_rank=record["effective_rank"],
            participation=record["participation"],
            same_prompt=tuple(record["same_prompt"]),
            cross_prompt=tuple(record["cross_prompt"]),
            **given,
        )
    return kind(plan, environment, update, data["step"], own, requests, _analyses(OWN, data["analyses"], arrays))
