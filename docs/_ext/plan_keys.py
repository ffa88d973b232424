"""`plan-keys`: a table of a plan model's keys, as the published schema and the model's docstring have them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from functools import cache
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from pydantic import BaseModel
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import fkernel.study
from fkernel.study import FisherKernelPlan


@cache
def models() -> dict[str, type[BaseModel]]:
    """Every plan model, by the name that it has in the schema."""
    for module in pkgutil.walk_packages(fkernel.study.__path__, "fkernel.study."):
        importlib.import_module(module.name)
    found: list[type[BaseModel]] = [BaseModel]
    for each in found:
        found += each.__subclasses__()
    return {each.__name__: each for each in found if each.__module__.startswith("fkernel.")}


@cache
def schema() -> dict[str, Any]:
    """The schema of plans, {model: its part}."""
    whole = FisherKernelPlan.model_json_schema()
    return {**whole["$defs"], "FisherKernelPlan": whole}


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """What the docstrings of a model and of its bases say of keys, {key: text}."""
    said: dict[str, str] = {}
    for each in reversed(model.__mro__):
        _, _, attributes = (inspect.cleandoc(each.__doc__ or "")).partition("\nAttributes:\n")
        for key, text in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", attributes, re.MULTILINE):
            said[key] = " ".join(text.split())
    return said


def takes(part: dict[str, Any]) -> str:
    """Say what a part of the schema lets through, as Markdown.

    Example:
        >>> takes({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]})
        'integer ≥ 0'
        >>> takes({"type": "array", "items": {"enum": ["a", "b"], "type": "string"}})
        'list of (`a` or `b`)'
    """
    if "$ref" in part:
        name = part["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in part:
        return f"`{part['const']}`"
    if "enum" in part:
        return " or ".join(f"`{value}`" for value in part["enum"])
    if options := part.get("anyOf") or part.get("oneOf"):
        return " or ".join(takes(each) for each in options if each.get("type") != "null")
    kind = part.get("type")
    if kind == "array" and "prefixItems" in part:
        return f"[{', '.join(takes(each) for each in part['prefixItems'])}]"
    if kind == "array":
        inner = takes(part.get("items", {}))
        return f"list of ({inner})" if " or " in inner else f"list of {inner}"
    if kind == "object":
        inner = part.get("additionalProperties", True)
        return "keys and values" if inner is True else f"{{name: {takes(inner)}}}"
    names = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {part[key]}" for key, sign in names.items() if key in part]
    words = {"string": "text", "boolean": "true or false", None: "from Python only"}
    return " ".join([words.get(kind, kind), ", ".join(bounds)]).strip()


def rows(name: str) -> list[tuple[str, str, str, str]]:
    """(key, what it takes, default, meaning) of a model's keys; those without a meaning have an empty one."""
    model, part = models()[name], schema()[name]
    said, needed = meanings(model), part.get("required", [])
    out = []
    for key, value in part["properties"].items():
        default = "required" if key in needed else _default(value.get("default"))
        meaning = "which of the kinds it is" if key == "kind" else said.get(key) or value.get("description", "")
        out.append((key, takes(value), default, meaning))
    return out


def _default(value: Any) -> str:
    if value is None or value in ({}, []) or isinstance(value, dict):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _markup(text: str) -> str:
    """A docstring's text as a cell of a Markdown table."""
    pieces = re.split(r"(`[^`]*`)", text)
    quoted = (re.sub(r"([\\*_<>{}\[\]|$])", r"\\\1", each) if i % 2 == 0 else each for i, each in enumerate(pieces))
    return "".join(quoted).replace("|", "\\|")


class PlanKeys(SphinxDirective):
    """A heading's anchor, the first paragraph of the docstring, and a table of keys."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Write them as Markdown, and have it parsed."""
        (name,) = self.arguments
        head = " ".join(inspect.cleandoc(models()[name].__doc__ or "").partition("\nAttributes:\n")[0].split())
        lines = [_markup(head), "", "| key | takes | default | what it is |", "|---|---|---|---|"]
        for key, taken, default, meaning in rows(name):
            lines.append(f"| `{key}` | {taken} | {default} | {_markup(meaning)} |")
        container = nodes.container()
        self.state.nested_parse(StringList(lines, source=name), self.content_offset, container)
        return container.children


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the directive."""
    app.add_directive("plan-keys", PlanKeys)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
