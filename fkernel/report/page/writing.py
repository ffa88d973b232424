"""Pages of studies and of accounts, written to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fkernel.errors import ResultsError
from fkernel.io import atomic_write, make_directory
from fkernel.report.page.account import account_page
from fkernel.report.page.document import page_html
from fkernel.report.page.study import study_page
from fkernel.study import AccountResults, FisherKernelResults

PAGE = "report.html"
"""Name of the page in a directory of results."""


def write_page(results: FisherKernelResults | AccountResults, path: str | Path, title: str | None = None) -> Path:
    """Write one HTML file that shows finished results; it needs no server and no network.

    Args:
        results: of a study, or the account of a run.
        path: of the file; in a directory it is report.html.
        title: of the page; the name of the file's directory by default.

    Returns:
        The file's path.
    """
    place = Path(path) / PAGE if Path(path).is_dir() else Path(path)
    name = title or place.resolve().parent.name
    data = account_page(results, name) if isinstance(results, AccountResults) else study_page(results, name)
    make_directory(place.parent)
    atomic_write(place, [page_html(data).encode()])
    return place


def load_results(directory: str | Path) -> FisherKernelResults | AccountResults:
    """Read the finished results of a study, or the account of a run.

    Args:
        directory: that `fkernel run`, `fkernel demo` or `fkernel account` wrote.

    Raises:
        ResultsError: it holds neither, or what it holds cannot be read.
    """
    place = Path(directory)
    kinds: dict[str, Any] = {"results.json": FisherKernelResults, "account.json": AccountResults}
    present = [name for name in kinds if (place / name).is_file()]
    if not present:
        raise ResultsError(
            f"{place} holds neither results.json nor account.json; name a directory that `fkernel run`, `fkernel demo` "
            f"or `fkernel account` wrote."
        )
    return kinds[present[0]].load(place)
