"""Docstrings stay as they read in a terminal; this makes them fit for reStructuredText before napoleon sees them.

* `[n, *shape]`, `|Δθ|` and a trailing `_` are text, not markup: they are escaped outside of backticks and examples.
* A block that is indented beneath a paragraph, and a paragraph that is an equation, keep their lines and their columns.
* `Returns: {name: [n]}` has colons that napoleon takes for a type's: the section becomes a field with its text whole.
* `Raises: As `kernel`.` names no exception, so it becomes a sentence.
* A constant without a docstring of its own does not show that of its type.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

from sphinx.application import Sphinx

VERBATIM = (".. code-block:: text", "")
SECTION = re.compile(r"^(Args|Attributes|Example|Raises|Returns|Yields):$")
MARKUP = re.compile(r"(?<!\\)(\*|\||(?<=\w)_(?!\w))")


def plain(lines: Iterable[str]) -> list[str]:
    r"""Return a docstring's lines as reStructuredText that napoleon understands.

    Example:
        >>> plain(["Make J.", "", "    J[x]   one row", "", "Returns:", "    {name: [n, *shape]}."])
        ['Make J.', '', '.. code-block:: text', '', '    J[x]   one row', '', ':returns: {name: [n, \\*shape]}.', '']
    """
    out: list[str] = []
    for name, block in _sections([*lines]):
        if name is None:
            out += _prose(block)
        elif name in ("Returns", "Yields"):
            out += _field(name.lower(), _escaped(_dedented(block)))
        elif name == "Raises" and not re.match(r"\s+[\w, ]+:", block[0]):
            out += [f"Raises {' '.join(line.strip() for line in block).strip()}".replace("Raises As", "Raises as"), ""]
        else:
            out += [f"{name}:", *_escaped(block)]
    return out


def _sections(lines: list[str]) -> Iterator[tuple[str | None, list[str]]]:
    """Cut at `Args:` and its like; what precedes the first one, or is not indented beneath one, is prose (None)."""
    name, block = None, []
    for line in lines:
        header = SECTION.match(line)
        if header or (name and line and not line.startswith(" ")):
            if block:
                yield name, block
            name, block = (header.group(1), []) if header else (None, [line])
        else:
            block.append(line)
    if block:
        yield name, block


def _prose(lines: list[str]) -> list[str]:
    out: list[str] = []
    for first, paragraph in enumerate(_paragraphs(lines)):
        if paragraph[0].startswith("    "):
            out += [*VERBATIM, *paragraph, ""]
        elif first and _is_equation(paragraph):
            out += [*VERBATIM, *(f"    {line}" for line in paragraph), ""]
        else:
            out += [*_escaped(paragraph), ""]
    return out


def _paragraphs(lines: list[str]) -> Iterator[list[str]]:
    """Cut at blank lines, and where indentation begins or ends; indented paragraphs in a row stay together."""
    block: list[str] = []
    for line in lines:
        if block and (not line.strip() or line.startswith("    ") != block[0].startswith("    ")):
            yield block
            block = []
        if line.strip():
            block.append(line)
    if block:
        yield block


def _is_equation(paragraph: list[str]) -> bool:
    return len(paragraph) == 1 and " = " in paragraph[0] and not re.search(r"[.,:]\s*$|`", paragraph[0])


def _field(name: str, lines: list[str]) -> list[str]:
    """Write a section as one field; where every entry is `name: text`, as a list of them."""
    starts = [line for line in lines if line and not line.startswith(" ")]
    if len(starts) > 1 and all(re.match(r"\w+: ", line) for line in starts):
        items = [re.sub(r"^(\w+): ", r"* **\1** – ", line) if line in starts else f"  {line.strip()}" for line in lines]
        return [f":{name}:", *(f"    {item}".rstrip() for item in items), ""]
    first, *rest = lines
    return [f":{name}: {first}", *(f"    {line}".rstrip() for line in rest), *([] if rest and not rest[-1] else [""])]


def _dedented(block: list[str]) -> list[str]:
    return [line[4:] for line in block]


def _escaped(lines: Iterable[str]) -> list[str]:
    """Escape markup outside of backticks (which may span lines) and of examples."""
    out: list[str] = []
    example = inside = False
    for line in lines:
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>>"))
        if example:
            out.append(line)
            continue
        pieces = re.split(r"(`+)", line)
        for i in range(0, len(pieces), 2):
            if i:
                inside = not inside
            if not inside:
                pieces[i] = MARKUP.sub(r"\\\1", pieces[i])
        out.append("".join(pieces))
    return out


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [] if what == "data" and _of_type(obj, lines) else plain(lines)


def _of_type(obj: Any, lines: list[str]) -> bool:
    """Tell whether a docstring is that of the object's type, such as a dict's, and says nothing of the object."""
    first = "\n".join(lines).strip()[:40]
    kinds = (type(obj), getattr(obj, "__origin__", type(obj)))
    return bool(first) and any((inspect.getdoc(kind) or "").startswith(first) for kind in kinds)


def _signature(app: Sphinx, what: str, name: str, obj: Any, options: Any, *texts: str | None) -> tuple[str | None, ...]:
    """Show a type alias by its name where autodoc leaves its own marker inside a generic."""
    return tuple(text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text) for text in texts)


def setup(app: Sphinx) -> dict[str, bool]:
    """Run before napoleon (whose priority is 500)."""
    app.connect("autodoc-process-docstring", _process, priority=400)
    app.connect("autodoc-process-signature", _signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
