"""Pages are executed several at a time, and only where something has changed; runs that they share are trained once.

What a page shows follows from its code, the package, the scripts in `examples`, the helpers of pages and the packages
that are installed. `fingerprint` is of all but the first: a folder of that name holds the shared runs and, in
jupyter-cache, every page's outputs by the page's code. Folders of older states are removed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path
from tempfile import mkdtemp
from threading import Lock

from forked import kernels, programs
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn, JupyterCacheAbstract
from jupyter_cache.executors.utils import single_nb_execution
from myst_nb.core.read import create_nb_reader
from nbformat import NotebookNode
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)
DOCS = Path(__file__).parent.parent
BUILD = DOCS / "_build" / "executed"
EXAMPLES = ("additions", "steps")
"""Scripts that make the runs, each called with the folder of its run."""
IMPORTED = (
    *("torch", "trl", "datasets", "pandas", "fkernel.cli", "fkernel.study", "fkernel.report", "fkernel.record"),
    *("transformers.models.qwen2.modeling_qwen2", "transformers.models.gpt2.modeling_gpt2", "ipykernel.kernelapp"),
)
"""What pages and scripts import; not matplotlib, whose backend a kernel chooses before that."""
LOCK = Lock()
"""Of the cache, a database of one writer."""


def fingerprint(folders: Iterable[Path]) -> str:
    """Hash the files of some folders, and the names and versions of what is installed.

    Example:
        >>> fingerprint([DOCS / "_ext"]) == fingerprint([DOCS / "_ext"])
        True
    """
    digest = hashlib.sha256(sys.version.encode())
    for file in sorted(file for folder in folders for file in folder.rglob("*") if file.is_file()):
        if "__pycache__" not in file.parts:
            digest.update(
                f"{file.relative_to(DOCS.parent)}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode()
            )
    for line in sorted({f"{each.name}=={each.version}\n" for each in distributions()}):
        digest.update(line.encode())
    return digest.hexdigest()[:16]


def folder_of_outputs() -> Path:
    """The folder of this state's runs and outputs; those of other states are removed."""
    folder = BUILD / fingerprint([DOCS.parent / "fkernel", DOCS / "examples", DOCS / "_ext"])
    for other in BUILD.glob("*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def train(script: Path, folder: Path, start: Sequence[str]) -> None:
    """Run an example's script, unless its run is there.

    Args:
        script: writes into the folder that it is given.
        folder: of the runs.
        start: how a command begins that runs a script.
    """
    if (folder / script.stem).exists():
        return
    place = Path(mkdtemp(dir=folder))
    done = subprocess.run([*start, script, place], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    try:
        place.rename(folder / script.stem)
    except OSError:
        if not (folder / script.stem).exists():  # another build of this state was not faster
            raise
        shutil.rmtree(place)


def _execute(app: Sphinx) -> None:
    """Train the shared runs, then execute the pages whose outputs are not there."""
    if app.config.nb_execution_mode != "cache":
        return
    os.environ["FKERNEL_EXAMPLES"] = app.config.nb_execution_cache_path
    os.environ["OMP_NUM_THREADS"] = "1"  # as many pages at a time as there are processors
    folder, workers = Path(app.config.nb_execution_cache_path), os.cpu_count() or 1
    cache, pages = get_cache(folder), {page: page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md"))}
    with_a_run = [page for page, text in pages.items() if re.search(r"^begin\(.+\)", text, re.MULTILINE)]
    if all(_is_known(app, cache, page, text) for page, text in pages.items()):
        return
    with programs(IMPORTED) as start, kernels(start), ThreadPoolExecutor(workers) as pool:
        runs = [pool.submit(train, DOCS / "examples" / f"{name}.py", folder, start) for name in EXAMPLES]
        tasks = [pool.submit(_execute_page, app, cache, page, pages[page]) for page in pages if page not in with_a_run]
        for each in runs:
            each.result()
        tasks += [pool.submit(_execute_page, app, cache, page, pages[page]) for page in with_a_run]
        for each in tasks:
            each.result()


def _read(app: Sphinx, page: Path, text: str) -> NotebookNode | None:
    """A page as a notebook; None where it is none."""
    reader = create_nb_reader(str(page), app.env.myst_config, app.env.mystnb_config, text)
    return None if reader is None else reader.read(text)


def _is_known(app: Sphinx, cache: JupyterCacheAbstract, page: Path, text: str) -> bool:
    """Whether a page's outputs are in the cache, or it has none."""
    notebook = _read(app, page, text)
    with LOCK, suppress(KeyError):
        return notebook is None or bool(cache.match_cache_notebook(notebook))
    return False


def _execute_page(app: Sphinx, cache: JupyterCacheAbstract, page: Path, text: str) -> None:
    """Execute a page into the cache; one that fails is left to the build, which says where it failed."""
    notebook = _read(app, page, text)
    if notebook is None or _is_known(app, cache, page, text):
        return
    result = single_nb_execution(notebook, str(page.parent), app.config.nb_execution_timeout, allow_errors=False)
    logger.info("%s: %.0f seconds", page.stem, result.time)
    if result.err is None:
        bundle = CacheBundleIn(notebook, str(page), data={"execution_seconds": result.time})
        with LOCK:
            cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)


def setup(app: Sphinx) -> dict[str, bool]:
    """Execute when the builder is there, after myst-nb has read its configuration (priority 500)."""
    app.connect("builder-inited", _execute, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
