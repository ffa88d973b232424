"""What executed pages call: a folder with a shared run in it, and commands as a reader would type them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from tempfile import mkdtemp
from unittest.mock import patch

import matplotlib.pyplot as plt
from IPython.display import HTML, Image
from typer.testing import CliRunner

from fkernel.cli import app

STYLE = "overflow-x: auto; line-height: 1.2; white-space: "


def begin(*examples: str) -> Path:
    """Go to a new folder that holds what scripts of examples made, under its own names.

    Args:
        examples: stems of scripts in docs/examples. Their files are shared with other pages: read, never changed.
    """
    place = Path(mkdtemp()).resolve()
    for name in examples:
        script = Path(__file__).parent.parent / "examples" / f"{name}.py"
        made = Path(os.environ.get("FKERNEL_EXAMPLES", "")) / name
        if "FKERNEL_EXAMPLES" not in os.environ:  # the page was opened as a notebook
            made = Path(mkdtemp())
            subprocess.run([sys.executable, script, made], check=True)
        for each in made.resolve().iterdir():
            if each.name not in ("run", "README.md") or name == "additions":
                (place / each.name).symlink_to(each)
    os.chdir(place)
    sys.path.insert(0, str(place))
    warnings.filterwarnings("ignore", "IProgress not found")  # of tqdm in a notebook without widgets
    return place


def shell(command: str, keep: slice = slice(None), width: int = 100, fails: bool = False) -> HTML:
    """Run a command as a reader would type it, and show what it prints.

    Args:
        command: of `fkernel`; a line may end in a backslash.
        keep: lines of the output that are shown.
        width: columns of the terminal.
        fails: whether it must end in an error, whose message is shown.
    """
    _, *words = shlex.split(command.replace("\\\n", " "))
    plain = {"FORCE_COLOR": None, "CLICOLOR": None, "CLICOLOR_FORCE": None, "NO_COLOR": "1", "COLUMNS": str(width)}
    with patch("rich.console._is_jupyter", return_value=False):  # the command prints as in a terminal
        done = CliRunner().invoke(app, words, env=plain)  # in this process: to import takes longer than to compute
    if (done.exit_code != 0) != fails:
        raise RuntimeError(f"{command}\n{done.output}") from done.exception
    printed = done.stderr if fails else done.stdout
    for each in Path.cwd().iterdir():  # files of examples are links: they are named as they are called here
        printed = printed.replace(str(each.resolve()), each.name)
    lines = printed.replace(f"{Path.cwd()}/", "").strip("\n").split("\n")
    shown = lines[keep]
    cut = ["  …"] if len(shown) < len(lines) else []
    text = "\n".join([f"$ {command}", *shown, *cut])
    return HTML(f'<pre style="{STYLE}{"pre-wrap" if fails else "pre"}">{escape(text)}</pre>')


def bars(labels: Sequence[str], series: Mapping[str, Sequence[float]], unit: str) -> None:
    """Draw numbers as horizontal bars, one group a label and one colour a series.

    Args:
        labels: from the top down.
        series: {what: a number for each label}; the name of a single one is not shown.
        unit: what is drawn.
    """
    height = 0.8 / len(series)
    _, axes = plt.subplots(figsize=(7.6, 0.9 + 0.26 * len(labels) * (1 + len(series)) ** 0.8), layout="constrained")
    for number, (what, values) in enumerate(series.items()):
        places = [row + (number - (len(series) - 1) / 2) * height for row in range(len(labels))]
        axes.barh(places, values, 0.9 * height, label=what)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axes.legend(frameon=False)
    plt.show()


def picture(path: str | Path, width: int = 760) -> Image:
    """Show a picture."""
    return Image(str(path), width=width)
