"""The command of the page: `fkernel report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fkernel.cli.console import exit_on_error, importing, path_option, print_line

Page = Annotated[bool, typer.Option(help="Write report.html, a page with all results, beside them.")]


def report(
    results: Annotated[Path, typer.Argument(help="A directory that `fkernel run`, `demo` or `account` wrote.")],
    out: Annotated[Path | None, path_option("The file to write (default: report.html in the directory).")] = None,
) -> None:
    """Write one HTML page with everything that finished results hold; it opens from a file, offline.

    Example: fkernel report study
    """
    with exit_on_error():
        with importing():
            from fkernel.report import load_results, write_page
        written = write_page(load_results(results), out or results, results.resolve().name)
        print_line(f"Wrote {written}")
