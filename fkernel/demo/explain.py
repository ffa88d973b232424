"""The plan that explains the demo's last step."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from fkernel.study import FisherKernelPlan, parse_yaml


def demo_plan(directory: Path, out: Path, seed: int = 0) -> FisherKernelPlan:
    """Fill in the package's plan, `fkernel/demo/plan.yaml`.

    Args:
        directory: what `prepare` returned.
        out: directory of the results.
        seed: for sampling.
    """
    template = parse_yaml((resources.files("fkernel.demo") / "plan.yaml").read_text(encoding="utf-8"))
    filled = _filled(template, {"policy": str(directory), "out": str(out)})
    return FisherKernelPlan.model_validate(filled).seeded(seed)


def _filled(value: Any, places: dict[str, str]) -> Any:
    """Substitute paths in a parsed plan; not in its YAML, whose syntax a path may contain."""
    match value:
        case dict():
            return {key: _filled(inner, places) for key, inner in value.items()}
        case list():
            return [_filled(inner, places) for inner in value]
        case str():
            return Template(value).substitute(places)
        case _:
            return value
