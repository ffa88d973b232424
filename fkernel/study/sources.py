"""Hashes of the code and files that a plan names: Python functions, a model's files, prompts.

A plan names a reward function, which can be edited under the same name. So results are keyed by the SHA-256 of the
files that are executed or read:

    a function by dotted name   the file of its module, and of every module of yours that it imports, directly or not:
                                not the standard library, not installed packages (except the function's own), not
                                fkernel (`own_code`)
    a checkpoint                config.json, the tokenizer with its chat template, and, under trust_remote_code, its
                                Python files; its parameters have a fingerprint of their own
    prompts                     the file, or every file of the data set; the version of reasoning-gym for a task

A function without a file (built in, of a notebook, of a script's `__main__`) has the hash None.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import importlib.util
import inspect
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

from fkernel.checkpoint import find_layout
from fkernel.errors import PlanError
from fkernel.io import checksum, checksums, hash_json
from fkernel.rollout import dotted
from fkernel.study.config.base import CheckpointPlan, PromptsPlan

EXECUTED = ("reward", "advantage", "advantages", "callback", "function")
"""Keys of a plan whose values may be dotted names of functions."""
DESCRIBING = (
    "config.json", "generation_config.json", "adapter_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "vocab*", "merges.txt", "*.model",
)  # fmt: skip
"""Files of a checkpoint, beside its parameters, that determine the model and the tokenizer."""
PACKAGE = Path(__file__).parents[1]
_SEEN: dict[str, tuple[Any, str]] = {}
"""{module: (its spec, hash of its file)} when first hashed; this process keeps executing what it imported then."""


def dotted_names(record: Any) -> set[str]:
    """Find the dotted names of functions in a part of a plan, as JSON.

    Example:
        >>> sorted(dotted_names({"reward": "mine.brevity", "requests": [{"reward": "math"}, {"advantages": "a.b"}]}))
        ['a.b', 'mine.brevity']
    """
    if isinstance(record, Mapping):
        given = [value for key, value in record.items() if key in EXECUTED]
        each = [name for value in given for name in (value.values() if isinstance(value, Mapping) else [value])]
        own = {name for name in each if isinstance(name, str) and "." in name}
        return own.union(*map(dotted_names, record.values()))
    return set[str]().union(*map(dotted_names, record)) if isinstance(record, list | tuple) else set()


def code_of(names: Iterable[str]) -> dict[str, str | None]:
    """Hash the source files of functions.

    Args:
        names: dotted names, such as "my_package.rewards.brevity".

    Returns:
        {module: SHA-256 of its file, or None without one}, of the functions' modules and of your modules that they
        import.

    Raises:
        RolloutError: a name cannot be imported.
        PlanError: a file was edited since this process imported it.
    """
    hashes: dict[str, str | None] = {}
    for name in sorted(names):
        for module in _modules_of(name):
            _add(module, module.partition(".")[0], hashes, first=True)
    return dict(sorted(hashes.items()))


@cache
def own_code() -> str:
    """Hash fkernel's source files, which a checkout may edit without a new version."""
    return hash_json([*checksums(PACKAGE, "*.py").items()])


def describing_files(one: CheckpointPlan) -> dict[str, str]:
    """Hash a checkpoint's `DESCRIBING` files; {} for "hub:" ones.

    Returns:
        {file name: SHA-256}; those of `base` and `model` are under base/ and model/.
    """
    patterns = (*DESCRIBING, "*.py") if one.trust_remote_code else DESCRIBING
    own = (Path(one.place), Path(one.place, "model"))  # of a recording
    if one.path is not None:
        own = (*reversed(find_layout(one.path).places),) if Path(one.path).exists() else ()
    given = [
        (f"{name}/", Path(place)) for name, place in (("base", one.base), ("model", one.model)) if place is not None
    ]
    return {
        f"{start}{file.name}": checksum(file)
        for start, place in (*(("", place) for place in own), *given)
        if place.is_dir()
        for pattern in patterns
        for file in sorted(Path(place).glob(pattern))
        if file.is_file()
    }


def prompts_files(prompts: Iterable[PromptsPlan]) -> dict[str, Any]:
    """{path: SHA-256} of prompt files and data sets, and reasoning-gym's version for tasks."""
    sources: dict[str, Any] = {}
    for one in prompts:
        if one.task is not None:
            sources["reasoning-gym"] = version("reasoning-gym")
        elif place := one.jsonl or one.dataset:
            sources[place] = content_of(place)
    return dict(sorted(sources.items()))


def content_of(path: str | Path) -> str:
    """Hash a file; or a directory, by the names and contents of all its files."""
    place = Path(path)
    return checksum(place) if place.is_file() else hash_json([*checksums(place).items()])


def version(package: str) -> str | None:
    """An installed package's version; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _modules_of(name: str) -> list[str]:
    """The module that a name says, and the one that defines the function; "" for a function without a file."""
    function = dotted(name, "a function that can be imported")
    while isinstance(function, partial):
        function = function.func
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    without_file = code is not None and not Path(code.co_filename).is_file()
    defined_in = "" if without_file else getattr(function, "__module__", None) or type(function).__module__
    return [*dict.fromkeys((name.rpartition(".")[0], defined_in))]


def _add(module: str, root: str, hashes: dict[str, str | None], first: bool = False) -> None:
    """Hash a module and what it imports; `root` is the package of the function that is executed."""
    if module in hashes:
        return
    file = None if module in ("", "__main__") else _file_of(module)
    if file is None or not file.is_file():
        if first:
            hashes[module or "(typed in)"] = None
        return
    if not first and (_inside(file, PACKAGE) or not (_is_own(file) or module.partition(".")[0] == root)):
        return
    content = file.read_bytes()
    hashes[module] = _unchanged(module, hashlib.sha256(content).hexdigest())
    if file.suffix == ".py":
        for name in _imported(content, module, file.name == "__init__.py"):
            _add(name, root, hashes)


def _unchanged(module: str, digest: str) -> str:
    """Check that a file was not edited since this process imported it."""
    imported = getattr(sys.modules.get(module), "__spec__", None)
    before, known = _SEEN.get(module, (imported, digest))
    if before is imported and known != digest:
        raise PlanError(
            f"The file of {module} was edited after this process imported it, and what was imported is what would be "
            f"executed. Start Python anew, or call importlib.reload(sys.modules[{module!r}])."
        )
    _SEEN[module] = imported, digest
    return digest


def _imported(content: bytes, module: str, is_package: bool) -> Iterator[str]:
    """The modules that a file imports, anywhere in it, with their parent packages."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(content)):
        names = list[str]()
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inner = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(inner, package) if node.level else inner
            names = [f"{base}.{alias.name}" for alias in node.names]  # a module or something in one
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[: i + 1]) for i in range(len(parts)))


def _file_of(module: str) -> Path | None:
    """Find a module's file, without importing it."""
    if module in sys.modules:
        file = getattr(sys.modules[module], "__file__", None)
        return None if file is None else Path(file)
    spec = _spec_of(module)
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def _spec_of(module: str) -> importlib.machinery.ModuleSpec | None:
    parent = module.rpartition(".")[0]
    around = None if not parent else getattr(sys.modules.get(parent), "__path__", None)
    if parent and around is None:
        spec = None if parent in sys.modules else _spec_of(parent)
        around = None if spec is None else spec.submodule_search_locations
        if around is None:
            return None
    return importlib.machinery.PathFinder.find_spec(module, None if around is None else list(around))


def _is_own(file: Path) -> bool:
    """Whether a file is neither of the standard library nor of an installed package."""
    library = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
    installed = {"site-packages", "dist-packages"} & {*file.resolve().parts}
    return not installed and not any(_inside(file, around) for around in library)


def _inside(file: Path, around: Path) -> bool:
    return file.resolve().is_relative_to(around.resolve())
