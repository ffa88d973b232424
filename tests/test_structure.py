"""The house as DESIGN draws it: imports go downwards, the root is light, names are documented, files are short."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fkernel
from fkernel import analysis, func, precond, tree

PACKAGE = Path(fkernel.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 350

FLOORS = {
    "boundary": 0,
    "distributed": 0,
    "errors": 0,
    "io": 0,
    "shapes": 0,
    "tree": 0,
    "func": 1,
    "precond": 1,
    "engine": 2,
    "analysis": 3,
    "checkpoint": 3,
    "rollout": 4,
    "record": 5,
    "study": 6,
    "report": 7,
    "demo": 8,
    "cli": 9,
    "__main__": 10,
}

# ------------------------------------------------------------------------------------------------------ import floors


def module_name(path: Path, root: Path = PACKAGE) -> str:
    """Name the module that a file holds: fkernel/func/inputs/batch.py → fkernel.func.inputs.batch."""
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    """Name the room of a module, or None for the root itself: fkernel.func.inputs.batch → func."""
    return module.split(".")[1] if "." in module else None


def exported_names(source: str) -> dict[str, str]:
    """Map each name that the root re-exports to the room that it comes from."""
    names: dict[str, str] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                room = room_of(node.module) or alias.name
                if node.module.split(".")[0] == "fkernel":
                    names[alias.asname or alias.name] = room
    return names


def imported_modules(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (line, full name) of every import, wherever it stands: in functions, under TYPE_CHECKING, by importlib."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - (node.level - 1)]
                base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}" if base == "fkernel" else base) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def imported_rooms(
    source: str, module: str, exported: dict[str, str], is_package: bool = False
) -> Iterator[tuple[int, str | None]]:
    """Yield (line, room) of every import from inside the package; None is the whole package at once."""
    for line, name in imported_modules(source, module, is_package):
        if name.split(".")[0] == "fkernel":
            room = room_of(name)
            yield line, exported.get(room, room) if room not in FLOORS and room is not None else room


def breaches(source: str, module: str, exported: dict[str, str], is_package: bool = False) -> list[str]:
    """List the imports of one module that do not go strictly downwards (its own room, and floor 0, are free)."""
    here = room_of(module)
    if here is None:
        return []  # the root exports names
    if here not in FLOORS:
        return [f"{module}: the room {here!r} has no floor; give it one in DESIGN §2 and in FLOORS"]
    found = []
    for line, there in imported_rooms(source, module, exported, is_package):
        where = f"{module}:{line}"
        if there is None:  # the root stands as high as the highest room that it exports
            root = max(FLOORS[room] for room in exported.values())
            if root >= FLOORS[here]:
                found.append(f"{where} (floor {FLOORS[here]}) imports the root, which imports floor {root}")
        elif there not in FLOORS:
            found.append(f"{where} imports {there!r}, which has no floor")
        elif there != here and FLOORS[there] >= FLOORS[here] and not FLOORS[here] == FLOORS[there] == 0:
            found.append(f"{where} (floor {FLOORS[here]}) imports {there!r} (floor {FLOORS[there]})")
    return found


EXPORTED = exported_names((PACKAGE / "__init__.py").read_text())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: module_name(path))
def test_imports_go_strictly_downwards(path):
    assert not breaches(path.read_text(), module_name(path), EXPORTED, path.name == "__init__.py")


def test_floor_0_imports_itself_without_a_cycle():
    ground = {
        room: {
            there
            for path in SOURCES
            if room_of(module_name(path)) == room
            for _, there in imported_rooms(path.read_text(), module_name(path), EXPORTED)
            if there != room
        }
        for room, floor in FLOORS.items()
        if floor == 0
    }
    while ground:
        free = [room for room, needs in ground.items() if not needs & set(ground)]
        assert free, f"floor 0 imports itself in a circle: {ground}"
        for room in free:
            del ground[room]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fkernel.func.inputs.batch", "from fkernel.engine import kernel"),
        ("fkernel.func.inputs.batch", "import fkernel.study.config.plan"),
        ("fkernel.func.inputs.batch", "import torch, fkernel.kernel as k"),
        ("fkernel.func.inputs.batch", "def f():\n    from fkernel.engine.fisher import kernel"),
        ("fkernel.func.inputs.batch", "class A:\n    def f(self):\n        import fkernel.cli"),
        (
            "fkernel.func.inputs.batch",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fkernel import report",
        ),
        ("fkernel.func.inputs.batch", "try:\n    from fkernel.demo import run\nexcept ImportError:\n    run = None"),
        ("fkernel.func.inputs.batch", "from fkernel.precond import identity"),
        ("fkernel.precond.adaptive", "from fkernel import func"),
        ("fkernel.precond.adaptive", "from fkernel import tree, func"),
        ("fkernel.precond.adaptive", "from fkernel import explain_step"),
        ("fkernel.precond.adaptive", "from .. import func"),
        ("fkernel.precond.adaptive", "from ..func import batch"),
        ("fkernel.precond.adaptive", "from ..func.batch import Sequences"),
        ("fkernel.precond.adaptive", "import importlib\nimportlib.import_module('fkernel.func')"),
        ("fkernel.precond.adaptive", "import fkernel"),
        ("fkernel.engine.step", "import fkernel as fk"),
        ("fkernel.tree", "from fkernel.func import contract"),
        ("fkernel.io.locks", "from fkernel.engine.store import open_store"),
        ("fkernel.checkpoint.load", "from fkernel.rollout import records"),
        ("fkernel.attic.box", "import torch"),
        ("fkernel.cli", "from fkernel.attic import box"),
    ],
)
def test_the_floor_check_sees_a_breach(module, source):
    assert len(breaches(source, module, EXPORTED)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fkernel", "from fkernel.cli import app"),
        ("fkernel.func.inputs.batch", "import torch\nfrom collections import abc"),
        (
            "fkernel.func.inputs.batch",
            "from fkernel.func.inputs.microbatch import slices\nfrom .objective import Objective",
        ),
        ("fkernel.func.inputs.batch", "from fkernel import tree\nfrom ..errors import BatchError"),
        ("fkernel.func.inputs.batch", "from fkernel import BatchError"),
        ("fkernel.tree", "from fkernel.errors import TreeError\nfrom fkernel.shapes import Tree"),
        ("fkernel.engine.step", "from fkernel import func, tree, precond\nfrom fkernel.precond.adaptive import adam"),
        ("fkernel.cli", "def main():\n    from fkernel.demo import run\n    import fkernel.report"),
        ("fkernel.demo.explain", "import fkernel as fk"),
    ],
)
def test_the_floor_check_lets_downward_imports_pass(module, source):
    assert not breaches(source, module, EXPORTED)


def test_names_imported_from_the_root_resolve_to_their_rooms():
    assert EXPORTED["func"] == "func"
    assert EXPORTED["BatchError"] == "errors"
    assert EXPORTED["explain_step"] == "engine"
    source = "from fkernel import func, BatchError, explain_step"
    assert [room for _, room in imported_rooms(source, "fkernel.cli", EXPORTED)] == ["func", "errors", "engine"]


# --------------------------------------------------------------------------------------------------- doors and names

DEEP_IMPORTS = 0
"""Imports of another room that bypass its nearest front door; the number may only fall."""


def is_door(module: str) -> bool:
    """Tell whether a module is a package, whose `__all__` is what other rooms may take."""
    return (PACKAGE.parent / module.replace(".", "/") / "__init__.py").exists()


def deep_imports(source: str, module: str) -> list[str]:
    """List imports of single files of another room, past its front door or that of a folder in it."""
    rooms = ((line, name) for line, name in imported_modules(source, module) if name.startswith("fkernel."))
    other = ((line, name) for line, name in rooms if room_of(name) != room_of(module) and name.count(".") > 1)
    return [f"{module}:{line} {name}" for line, name in other if not is_door(name)]


def test_other_rooms_are_entered_by_their_front_doors():
    found = [each for path in SOURCES for each in deep_imports(path.read_text(), module_name(path))]
    assert len(found) <= DEEP_IMPORTS, found


def test_the_count_of_deep_imports_sees_one():
    assert deep_imports("from fkernel.func.inputs.batch import pad", "fkernel.engine.path")
    assert not deep_imports("from fkernel.func.inputs import pad", "fkernel.engine.path")
    assert not deep_imports("from fkernel.func.inputs.batch import pad", "fkernel.func.gradient")


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name == "__init__.py"], ids=module_name)
def test_a_door_says_what_it_exports(path):
    names = {
        alias.asname or alias.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fkernel")
        for alias in node.names
    }
    if names and module_name(path) != "fkernel.cli":
        assert names <= {*importlib.import_module(module_name(path)).__all__}


def shadowed(path: Path) -> bool:
    """Tell whether a module is named like a function or class that it defines or that its package exports."""
    door = ast.parse((path.parent / "__init__.py").read_text()) if (path.parent / "__init__.py").exists() else None
    exported = {
        alias.asname or alias.name
        for node in (door.body if door else [])
        if isinstance(node, ast.ImportFrom) and node.module == module_name(path)
        for alias in node.names
    }
    defined = {
        node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    return path.stem in exported | defined


def test_no_module_is_named_like_a_function():
    assert not [module_name(path) for path in SOURCES if path.name != "__init__.py" and shadowed(path)]


# ------------------------------------------------------------------------------------------------------- the light root

HALF = 0.5
_TIMED = """
import sys, time
import torch
start = time.perf_counter()
import fkernel
print(time.perf_counter() - start)
print(*sys.modules)
"""


@pytest.fixture(scope="module")
def imports() -> list[tuple[float, set[str]]]:
    """Import the package after torch in fresh processes: seconds and modules of each; more where others slow them."""
    runs: list[tuple[float, set[str]]] = []
    while len(runs) < 3 or (len(runs) < 12 and min(seconds for seconds, _ in runs) >= HALF):
        command = [sys.executable, "-c", _TIMED]
        out = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True, timeout=120)
        seconds, modules = out.stdout.strip().splitlines()
        runs.append((float(seconds), set(modules.split())))
    return runs


def test_the_import_takes_under_half_a_second_beyond_torch(imports):
    assert min(seconds for seconds, _ in imports) < HALF


@pytest.mark.parametrize("heavy", ["transformers", "matplotlib", "peft", "typer"])
def test_the_import_loads_no_heavy_library(imports, heavy):
    assert heavy not in imports[0][1]


@pytest.mark.parametrize("room", [room for room, floor in FLOORS.items() if floor >= 3])
def test_the_import_loads_no_upper_floor(imports, room):
    assert f"fkernel.{room}" not in imports[0][1]


def test_the_kernel_stays_a_function_although_a_package_has_its_name():
    import fkernel.engine.fisher

    assert inspect.isfunction(fkernel.kernel)


# -------------------------------------------------------------------------------------------------------- documentation


def public_names() -> Iterator[tuple[str, Any]]:
    """Yield every public name once, under its shortest address."""
    for module in (fkernel, func, precond, analysis):
        yield from ((f"{module.__name__}.{name}", getattr(module, name)) for name in module.__all__)
    for name, value in vars(tree).items():
        if inspect.isfunction(value) and value.__module__ == tree.__name__ and not name.startswith("_"):
            yield f"{tree.__name__}.{name}", value


PUBLIC = dict(public_names())
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
DEFINED = {name: value for name, value in PUBLIC.items() if isinstance(value, type | ModuleType) or name in FUNCTIONS}


@pytest.mark.parametrize("name", DEFINED)
def test_a_public_name_has_a_docstring_of_its_own(name):
    doc = DEFINED[name].__doc__
    assert doc, f"{name} is undocumented"
    assert not doc.startswith(f"{name.rsplit('.', 1)[-1]}("), f"{name} has only the docstring that Python generates"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_shows_an_example_that_runs(name):
    doc = inspect.getdoc(FUNCTIONS[name]) or ""
    assert "Example:" in doc, f"{name} has no Example section"
    assert ">>>" in doc, f"{name}'s Example is no doctest"


# tree's are one-line algebra whose arguments are vectors of one space; their examples say the rest
EXPLAINED = [
    name
    for name, value in FUNCTIONS.items()
    if inspect.signature(value).parameters and not name.startswith("fkernel.tree.")
]


@pytest.mark.parametrize("name", EXPLAINED)
def test_a_public_function_explains_its_arguments(name):
    doc = " ".join((inspect.getdoc(FUNCTIONS[name]) or "").split())
    explained = "Args:" in doc or re.search(r"Arguments[\w, ]* as in `[\w.]+`", doc)
    assert explained, f"{name} has neither an Args section nor a reference ('Arguments as in `…`')"


def test_every_exported_name_exists_and_is_listed_once():
    for module in (fkernel, func, precond, analysis):
        assert len(set(module.__all__)) == len(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: module_name(path))
def test_a_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path.name} has no module docstring"


# ------------------------------------------------------------------------------------------------------ size and state


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: module_name(path))
def test_a_file_can_be_held_in_the_head(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


def test_there_is_no_utils():
    modules = [module_name(path) for path in SOURCES]
    assert not [name for name in modules if re.search(r"(^|[._])(utils?|helpers?|misc|common)($|[._])", name)]


_CONTAINERS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
_MAKERS = {"list", "dict", "set", "bytearray", "defaultdict", "OrderedDict", "Counter", "deque", "count", "iter"}


def mutable_state(source: str) -> list[str]:
    """List module-level names that hold something mutable and are no CONSTANT, and every `global`."""
    module = ast.parse(source)
    found = [f"global {name}" for node in ast.walk(module) if isinstance(node, ast.Global) for name in node.names]
    for node in module.body:
        if isinstance(node, ast.AugAssign):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None) if isinstance(node, ast.Assign | ast.AnnAssign) else None
        called = value.func if isinstance(value, ast.Call) else None
        maker = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", None)
        if isinstance(value, _CONTAINERS) or maker in _MAKERS:
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            found += [name for name in names if name != "__all__" and not name.isupper()]
    return found


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if room_of(module_name(path)) in ("func", "precond")],
    ids=lambda path: module_name(path),
)
def test_the_pure_rooms_hold_no_mutable_state(path):
    assert not mutable_state(path.read_text())


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("cache = {}", ["cache"]),
        ("cache: dict[str, int] = {}", ["cache"]),
        ("_seen = set()", ["_seen"]),
        ("import collections\nrows = collections.defaultdict(list)", ["rows"]),
        ("x = [i for i in range(3)]", ["x"]),
        ("n = 0\ndef f():\n    global n\n    n += 1", ["global n"]),
        ("_UNITS = {'B': 1}\nNAMES: list[str] = []\n__all__ = ['a']\nlimit = 3\nTree = dict[str, int]", []),
        ("def f():\n    x = []\n    return x", []),
    ],
)
def test_the_state_check_sees_mutable_state_and_nothing_else(source, found):
    assert mutable_state(source) == found


STATEFUL = {
    # What outlives a call: what was certified of a function, remembered weakly with it, and who collects it.
    "func/trust/memory.py": {"Known", "WeakKeyDictionary", "ContextVar"},
    # What lives for one pass or one walk: its listeners, and the sums that it adds up.
    "func/handles/products.py": {"Products", "_Sums", "cache"},
    "func/layers/walk.py": {"Block", "Walk"},
    "func/taps/listening.py": {"Tap"},
    "func/taps/uses.py": {"LayerCall"},
    "func/taps/whose.py": {"Whose"},
}
_MODES = {"TorchFunctionMode", "TorchDispatchMode", "torch.autograd.Function", "Exception", "BaseException", "capture"}


def held_state(source: str) -> set[str]:
    """Name what keeps something: classes that may change, caches, weak dictionaries, context variables, `nonlocal`."""
    found = set[str]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Nonlocal):
            found |= {f"nonlocal {name}" for name in node.names}
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            found |= {called} & {"WeakKeyDictionary", "ContextVar", "lru_cache"}
        if isinstance(node, ast.FunctionDef):
            decorators = {getattr(each, "attr", getattr(each, "id", "")) for each in node.decorator_list}
            found |= decorators & {"cache", "lru_cache", "cached_property"}
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base) for base in node.bases}
            frozen = any("frozen=True" in ast.unparse(each) for each in node.decorator_list)
            if not frozen and "NamedTuple" not in bases and not bases & _MODES:
                found.add(node.name)
    return found


def test_what_the_pure_rooms_keep_is_listed_with_its_reason():
    pure = [path for path in SOURCES if room_of(module_name(path)) in ("func", "precond")]
    found = {path.relative_to(PACKAGE).as_posix(): held_state(path.read_text()) for path in pure}
    assert {file: names for file, names in found.items() if names} == STATEFUL


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from functools import cache\n@cache\ndef plans(): ...", {"cache"}),
        ("def f():\n    n = 0\n    def g():\n        nonlocal n\n        n += 1", {"nonlocal n"}),
        ("class Seen:\n    def __init__(self): self.all = []", {"Seen"}),
        ("from typing import NamedTuple\nclass Seen(NamedTuple):\n    all: int", set()),
        ("import weakref\n_KNOWN = weakref.WeakKeyDictionary()", {"WeakKeyDictionary"}),
    ],
)
def test_the_check_of_what_is_kept_sees_it(source, found):
    assert held_state(source) == found
