"""Results as xarray datasets and pandas tables."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fkernel.errors import ResultsError
from fkernel.study.loss_terms import PART
from fkernel.study.outcome import EFFECTS, RequestResult, SequenceInfo

VECTORS = ("batch", *EFFECTS, "predicted", "squared_norms", "diagonal")
MATRICES = ("kernel", "contributions")


def to_xarray(update: Sequence[SequenceInfo], units: str, requests: Sequence[RequestResult]) -> Any:
    """An `xarray.Dataset` of requests with one U; NaN where a request lacks a quantity."""
    xr = _package("xarray")
    rows = [info for result in requests for info in result.evaluation]
    ids = [info.id for info in rows]
    coordinates = {
        "eval": ids,
        "update": [info.id for info in update],
        "request": ("eval", [result.name for result in requests for _ in result.evaluation]),
        "prompt": ("eval", [info.prompt for info in rows]),
        "response": ("eval", [info.response for info in rows]),
        "advantage": ("update", [np.nan if u.advantage is None else u.advantage for u in update]),
    }
    variables = {}
    vectors = (*VECTORS, *dict.fromkeys(PART + part for result in requests for part in result.parts))
    for names, dimensions in ((vectors, ("eval",)), (MATRICES, ("eval", "update"))):
        for name in names:
            parts = [_array(result, name) for result in requests]
            if any(part is not None for part in parts):
                shape = (len(update),) * (len(dimensions) - 1)
                filled = [
                    np.full((len(result.evaluation), *shape), np.nan) if part is None else part
                    for result, part in zip(requests, parts, strict=True)
                ]
                unit = {"units": units} if name not in ("kernel", "squared_norms", "diagonal") else {}
                variables[name] = (dimensions, np.concatenate(filled), unit)
    return xr.Dataset(variables, coordinates, {"units": units})


def _array(result: RequestResult, name: str) -> np.ndarray | None:
    """An array of a result, a part of its loss included."""
    return result.parts.get(name.removeprefix(PART)) if name.startswith(PART) else getattr(result, name)


def to_frame(requests: Sequence[RequestResult]) -> Any:
    """A pandas table of requests, one row per sequence."""
    pd = _package("pandas")
    rows = []
    for result in requests:
        for row, info in enumerate(result.evaluation):
            entry: dict[str, Any] = {"request": result.name, "id": info.id, "prompt": info.prompt}
            entry |= {"response": info.response, "logprob": info.logprob, "reward": info.reward}
            entry |= {name: float(v[row]) for name in VECTORS if (v := getattr(result, name)) is not None}
            entry |= {PART + part: float(v[row]) for part, v in result.parts.items()}
            for u, value in result.top_contributors(row, 1):
                entry |= {"top_contributor": u.id, "top_contribution": value}
            rows.append(entry)
    return pd.DataFrame(rows).set_index(["request", "id"])


def account_frame(probes: Sequence[SequenceInfo], ledger: Mapping[str, np.ndarray], top: Sequence[Any]) -> Any:
    """A pandas table of a run's probes, one row each."""
    pd = _package("pandas")
    rows = []
    for e, (info, shares) in enumerate(zip(probes, top, strict=True)):
        row: dict[str, Any] = {"id": info.id, "prompt": info.prompt, "response": info.response, "reward": info.reward}
        row |= {name: float(values[e]) for name, values in ledger.items()}
        row |= {"top_contributor": shares[0].id, "top_contribution": shares[0].value} if shares else {}
        rows.append(row)
    return pd.DataFrame(rows).set_index("id")


def account_dataset(
    probes: Sequence[SequenceInfo],
    sequences: Sequence[Mapping[str, Any]],
    ledger: Mapping[str, np.ndarray],
    contributions: np.ndarray,
) -> Any:
    """An `xarray.Dataset` of a run's account, ids as coordinates; nats."""
    xr = _package("xarray")
    coordinates = {
        "probe": [info.id for info in probes],
        "sequence": [row["id"] for row in sequences],
        "step": ("sequence", [row["step"] for row in sequences]),
        "prompt": ("probe", [info.prompt for info in probes]),
        "response": ("probe", [info.response for info in probes]),
    }
    variables: dict[str, Any] = {"contributions": (("probe", "sequence"), contributions, {"units": "nats"})}
    variables |= {name: ("probe", values, {"units": "nats"}) for name, values in ledger.items()}
    return xr.Dataset(variables, coordinates, {"units": "nats"})


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ResultsError(f"This needs {name}: pip install 'fkernel[study]'.") from None
