"""An undocumented public name fails the build.

The public names are those in `__all__` of each room (`coverage_rooms` in conf.py); where a room has none, the public
functions and classes that it defines. A name is documented when the Python domain holds it, under this name or under
another public name of the same object: `fkernel.BatchError` and `fkernel.errors.BatchError` are one thing, and are
described once.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

logger = logging.getLogger(__name__)


def public_names(rooms: Iterable[str]) -> dict[str, Any]:
    """Return {dotted name: object} of everything public in the rooms.

    Example:
        >>> "fkernel.tree.dot" in public_names(["fkernel.tree"])
        True
    """
    return {f"{room}.{name}": value for room in rooms for name, value in _members(import_module(room))}


def undocumented(public: Mapping[str, Any], documented: Iterable[str]) -> list[str]:
    """Return the public names whose object is described under none of its names.

    Example:
        >>> thing = object()
        >>> undocumented({"a.thing": thing, "b.thing": thing, "b.other": object()}, ["a.thing"])
        ['b.other']
    """
    documented = set(documented)
    described = {id(value) for name, value in public.items() if name in documented}
    return sorted(name for name, value in public.items() if id(value) not in described)


def documented_twice(public: Mapping[str, Any], documented: Iterable[str]) -> list[str]:
    """Return the public names of objects that are described under more than one of their names.

    Example:
        >>> thing = object()
        >>> documented_twice({"a.thing": thing, "b.thing": thing}, ["a.thing", "b.thing"])
        ['a.thing', 'b.thing']
    """
    documented = set(documented)
    found = [(name, id(value)) for name, value in public.items() if name in documented]
    places = [place for _, place in found]
    return sorted(name for name, place in found if places.count(place) > 1)


def _members(module: Any) -> list[tuple[str, Any]]:
    if hasattr(module, "__all__"):
        return [(name, getattr(module, name)) for name in module.__all__]
    own = [(name, value) for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    named = [(name, value) for name, value in own if not name.startswith("_")]
    return [(name, value) for name, value in named if inspect.isfunction(value) or inspect.isclass(value)]


def _check(app: Sphinx, env: BuildEnvironment) -> None:
    domain: Any = env.get_domain("py")
    documented = {name for name, entry in domain.objects.items() if not entry.aliased} | set(domain.modules)
    public = public_names(app.config.coverage_rooms)
    for name in undocumented(public, documented):
        room = name.rpartition(".")[0]
        logger.warning("%s is public and not documented: describe it on the page of %s under docs/api/.", name, room)
    for name in documented_twice(public, documented):
        logger.warning("%s is documented under another name too: describe it on one page of docs/api/.", name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the check to the moment when all pages have been read."""
    app.add_config_value("coverage_rooms", [], "env")
    app.connect("env-check-consistency", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
