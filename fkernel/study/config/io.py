"""Read a plan from YAML or JSON; each error is one line with its key and the nearest valid name."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from fkernel.errors import PlanError
from fkernel.io import parse_json
from fkernel.study.config.yaml_text import parse_yaml

Plan = TypeVar("Plan", bound=BaseModel)


def read_plan(path: str | Path, kind: type[Plan]) -> Plan:
    """Read and check a plan.

    Args:
        path: a .json file; any other is read as YAML.
        kind: the plan's class.

    Raises:
        PlanError: the file is missing, not YAML or JSON, or not a plan; one line per error.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise PlanError(f"There is no plan at {file}; `fkernel plan init` writes a study's, to edit.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"The plan {file} cannot be read: {error}") from error
    try:
        content = parse_json(text) if file.suffix == ".json" else parse_yaml(text)
    except (ValueError, yaml.YAMLError) as error:
        place = getattr(error, "problem_mark", None)
        where = "" if place is None else f", line {place.line + 1}, column {place.column + 1}"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise PlanError(f"{file}{where}: no {'JSON' if file.suffix == '.json' else 'YAML'} ({problem}).") from error
    if not isinstance(content, dict):
        raise PlanError(f"{file}: expected keys and values, found a {type(content).__name__}.")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise PlanError("\n".join(f"{file}, {line}" for line in explained(error, kind))) from None


def explained(error: ValidationError, kind: type[BaseModel]) -> list[str]:
    """Format each of pydantic's errors as one line.

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
    for detail in error.errors(include_url=False):
        place = ".".join(map(str, detail["loc"])) or "the plan"
        match detail["type"]:
            case "extra_forbidden":
                valid = _keys(kind, detail["loc"][:-1])
                near = get_close_matches(str(detail["loc"][-1]), valid, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(valid)}."
                lines.append(f"{place}: there is no such key; {hint}")
            case "missing":
                lines.append(f"{place}: is missing.")
            case _:
                message = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
                given = "" if isinstance(detail["input"], dict) else f" (it is {detail['input']!r})"
                expected = "expected " if detail["msg"].startswith("Input should be ") else ""
                lines.append(f"{place}: {expected}{message}{given}.")
    return lines


def _keys(kind: type[BaseModel], place: tuple[Any, ...]) -> list[str]:
    """The valid keys at a place in a plan; a part of the place may be the `kind` of a discriminated union."""
    models = [kind]
    for part in place:
        of_kind = [model for model in models if part in _literals(model.model_fields.get("kind"))]
        inside = [
            nested
            for model in models
            if part in model.model_fields
            for nested in _models(model.model_fields[part].annotation)
        ]
        models = of_kind or inside or models
    return sorted({name for model in models for name in model.model_fields})


def _literals(field: Any) -> tuple[Any, ...]:
    return () if field is None else getattr(field.annotation, "__args__", ())


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models(part)]
