"""A plan's file, YAML or JSON → the plan; every mistake in one line, with its place and the nearest valid name."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from fkernel.errors import PlanError

Plan = TypeVar("Plan", bound=BaseModel)


def read_plan(path: str | Path, kind: type[Plan]) -> Plan:
    """Read and check a plan.

    Args:
        path: a file, .json, or YAML whatever it is called.
        kind: what plan it is.

    Raises:
        PlanError: the file is missing, no YAML or JSON, or not a plan; one line a mistake.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"The plan {file} cannot be read: {error}") from error
    try:
        found = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        place = getattr(error, "problem_mark", None)
        where = "" if place is None else f", line {place.line + 1}, column {place.column + 1}"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise PlanError(f"{file}{where}: no {'JSON' if file.suffix == '.json' else 'YAML'} ({problem}).") from error
    if not isinstance(found, dict):
        raise PlanError(f"{file}: expected keys and values, found a {type(found).__name__}.")
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        raise PlanError("\n".join(f"{file}, {line}" for line in explained(error, kind))) from None


def explained(error: ValidationError, kind: type[BaseModel]) -> list[str]:
    """Say each of pydantic's errors in one line.

    Example:
        >>> class Cup(BaseModel, extra="forbid"):
        ...     size: int = 1
        >>> try:
        ...     Cup.model_validate({"sice": 2})
        ... except ValidationError as error:
        ...     explained(error, Cup)
        ["sice: there is no such key; did you mean 'size'?"]
    """
    lines = []
    for found in error.errors(include_url=False):
        place = ".".join(map(str, found["loc"])) or "the plan"
        match found["type"]:
            case "extra_forbidden":
                valid = _keys(kind, found["loc"][:-1])
                near = get_close_matches(str(found["loc"][-1]), valid, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(valid)}."
                lines.append(f"{place}: there is no such key; {hint}")
            case "missing":
                lines.append(f"{place}: is missing.")
            case _:
                said = found["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
                given = "" if isinstance(found["input"], dict) else f" (it is {found['input']!r})"
                lines.append(
                    f"{place}: expected {said}{given}."
                    if said != found["msg"] and "Value error" not in found["msg"]
                    else f"{place}: {said}{given}."
                )
    return lines


def _keys(kind: type[BaseModel], place: tuple[Any, ...]) -> list[str]:
    """List the valid keys at a place in a plan; a part of it may be the kind that tells models of a union apart."""
    models = [kind]
    for part in place:
        told = [model for model in models if part in _literals(model.model_fields.get("kind"))]
        inside = [
            below
            for model in models
            if part in model.model_fields
            for below in _models(model.model_fields[part].annotation)
        ]
        models = told or inside or models
    return sorted({name for model in models for name in model.model_fields})


def _literals(field: Any) -> tuple[Any, ...]:
    return () if field is None else getattr(field.annotation, "__args__", ())


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Find the models inside of a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models(part)]
