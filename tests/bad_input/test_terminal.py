"""Texts, keys and paths may hold anything: a terminal shows it, and obeys none of it."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import yaml
from rich.table import Table
from typer.testing import CliRunner

import fkernel as fk
from fkernel.cli import app
from fkernel.cli.console import Tables, Terminal, wide

HOSTILE = {
    "clears the screen": "\x1b[2J",
    "sets the title": "\x1b]0;title\x07",
    "makes a link": "\x1b]8;;http://x\x1b\\y\x1b]8;;\x1b\\",
    "8-bit": "\x9b2J",
    "overwrites the line": "fine\rwrong",
    "goes back": "wrong\x08\x08",
    "turns around": "a\u202eb",
    "half a pair": "\ud800",
}
OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]")


@pytest.fixture(params=HOSTILE.values(), ids=list(HOSTILE))
def text(request):
    return request.param


@pytest.mark.parametrize("kind", [Terminal, Tables])
def test_what_is_printed_moves_no_cursor(text, kind):
    written = io.StringIO()
    console = kind(file=written, width=200)
    table = Table("head", title=f"title {text}")
    table.add_row(f"cell {text}")
    console.print(f"a line {text}")
    console.print(table)
    console.print(f"[link=http://x]{text}[/link]")
    assert not OBEYED.search(written.getvalue())
    assert "http" not in written.getvalue() or "8;;" in text


def test_no_command_has_a_console_of_its_own():
    for path in (Path(fk.__file__).parent / "cli").glob("*.py"):
        own = re.sub(r"class Terminal\(Console\)", "", path.read_text(encoding="utf-8"))
        assert not re.search(r"\bConsole\(|^ *print\(", own, re.MULTILINE), path
    assert isinstance(wide(10), Terminal)


def test_messages_show_what_they_quote(text):
    assert not OBEYED.search(str(fk.PlanError(f"there is no {text}")))
    assert not OBEYED.search(str(fk.CheckpointError(f"there is no {text}")))


def test_a_plan_s_keys_and_path_are_shown(text, tmp_path):
    path = tmp_path / f"[red] {text}.yaml".replace("/", "").encode(errors="replace").decode()
    path.write_text(yaml.safe_dump({f"key {text}": 1, "out": text}))
    for given in (path, tmp_path / "none[/x]"):
        result = CliRunner().invoke(app, ["plan", "check", str(given)])
        assert result.exit_code == 2
        assert not OBEYED.search(result.output)
        assert "Traceback" not in result.output
