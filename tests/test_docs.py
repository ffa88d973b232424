"""The documentation keeps its word: every public name is described, every example runs, every command exists."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
ROOMS = ["fkernel", "fkernel.analysis", "fkernel.func", "fkernel.precond", "fkernel.tree", "fkernel.errors"]


def _extension(name: str) -> ModuleType:
    pytest.importorskip("sphinx")
    spec = importlib.util.spec_from_file_location(name, DOCS / "_ext" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with patch.object(sys, "path", [*sys.path, str(DOCS / "_ext")]):  # where Sphinx looks for the extensions
        spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------------------ coverage


def _written() -> list[str]:
    """Every name that the API pages list; the members of a module that is listed with :members:, too."""
    names: list[str] = []
    for page in (DOCS / "api").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        names += re.findall(r"^\.\. auto(?:module|function|class|data|exception):: ([\w.]+)", text, re.MULTILINE)
        for module in re.findall(r"^\.\. automodule:: ([\w.]+)\n   :members:", text, re.MULTILINE):
            names += _extension("coverage_check").public_names([module])
    return names


def test_every_public_name_is_on_an_api_page_once():
    check = _extension("coverage_check")
    public = check.public_names(ROOMS)
    assert check.undocumented(public, _written()) == []
    assert check.documented_twice(public, _written()) == []


def test_the_checked_rooms_are_those_of_the_build():
    conf = (DOCS / "conf.py").read_text(encoding="utf-8")
    (rooms,) = re.findall(r"^coverage_rooms = \[(.*?)\]", conf, re.MULTILINE | re.DOTALL)
    assert set(ROOMS) <= set(re.findall(r'"([\w.]+)"', rooms))


@pytest.mark.parametrize("missing", ["fkernel.made_up", "fkernel.func.made_up"])
def test_a_made_up_name_is_found_undocumented(missing):
    check = _extension("coverage_check")
    public = {**check.public_names(ROOMS), missing: object()}
    assert check.undocumented(public, _written()) == [missing]


def test_the_same_object_is_one_thing_under_two_names():
    check = _extension("coverage_check")
    thing = object()
    public = {"a.thing": thing, "b.thing": thing}
    assert check.undocumented(public, ["b.thing"]) == []
    assert check.documented_twice(public, ["a.thing", "b.thing"]) == ["a.thing", "b.thing"]
    assert check.undocumented(public, []) == ["a.thing", "b.thing"]


def test_rooms_without_a_list_show_their_own_functions_and_classes():
    public = _extension("coverage_check").public_names(["fkernel.tree", "fkernel.errors"])
    assert {"fkernel.tree.dot", "fkernel.tree.check_finite", "fkernel.errors.BatchError"} <= set(public)
    assert not {"fkernel.tree.reduce", "fkernel.tree.NonFiniteError", "fkernel.tree.Tree"} & set(public)


# ---------------------------------------------------------------------------------------------------------- docstrings


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["{name: [n, *shape]}, |v|³"], [r"{name: [n, \*shape]}, \|v\|³", ""]),
        (["as `f(*args)` and ``a_``"], ["as `f(*args)` and ``a_``", ""]),
        (["Make J.", "", "J[x] = ∇f(x)"], ["Make J.", "", ".. code-block:: text", "", "    J[x] = ∇f(x)", ""]),
        (["Returns:", "    x ↦ {name: [n]}."], [":returns: x ↦ {name: [n]}.", ""]),
        (["Returns:", "    a: one.", "        More.", "    b: two."],
         [":returns:", "    * **a** – one.", "      More.", "    * **b** – two.", ""]),
        (["Raises:", "    As `f`."], ["Raises as `f`.", ""]),
        (["Raises:", "    A, B: bad *x*."], ["Raises:", r"    A, B: bad \*x\*."]),
        (["Example:", "    >>> 2 * 3", "    6"], ["Example:", "    >>> 2 * 3", "    6"]),
    ],
)  # fmt: skip
def test_docstrings_become_markup_without_losing_text(given, expected):
    assert _extension("plain_docstrings").plain(given) == expected


@pytest.mark.parametrize("name", ["coverage_check", "plain_docstrings", "executed_pages", "forked", "plan_keys"])
def test_examples_of_the_extensions_run(name):
    import doctest

    results = doctest.testmod(_extension(name))
    assert results.attempted > 0
    assert results.failed == 0


# -------------------------------------------------------------------------------------------------------------- README


def python_blocks(text: str) -> list[str]:
    r"""Return the ```python blocks of a Markdown text, in order; other languages are left out.

    Example:
        >>> fence = "`" * 3
        >>> python_blocks(f"{fence}python\na = 1\n{fence}\n{fence}console\n$ ls\n{fence}\n")
        ['a = 1\n']
    """
    return re.findall(r"^```python[^\n]*\n(.*?)^```\s*$", text, re.MULTILINE | re.DOTALL)


def run_blocks(text: str, source: str) -> dict[str, Any]:
    """Execute a text's blocks one after the other in one namespace, as a reader who pastes them would."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(python_blocks(text)):
        exec(compile(block, f"{source}, block {number}", "exec"), namespace)
    return namespace


def test_blocks_share_a_namespace_and_other_languages_are_left_out():
    text = "```python\na = 1\n```\n\n```console\n$ no python\n```\n\ntext\n\n```python\nb = a + 1\n```\n"
    assert python_blocks(text) == ["a = 1\n", "b = a + 1\n"]
    assert run_blocks(text, "a text")["b"] == 2


def test_a_broken_block_fails():
    with pytest.raises(NameError):
        run_blocks("```python\nnowhere_defined\n```\n", "a text")


def test_readme_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks((ROOT / "README.md").read_text(encoding="utf-8"), "README.md")


# ------------------------------------------------------------------------------------------------------------ commands


def _targets() -> dict[str, str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z-]+):.*?## (.+)$", makefile, re.MULTILINE))


def _commands(text: str) -> set[str]:
    """Every target that a `make …` asks for: inline code, a line of a block, or a line of a script."""
    commands = re.findall(r"`make ([^`]+)`", text) + re.findall(r"^(?:\$ |exec |.*&& )?make (.+)$", text, re.MULTILINE)
    words = [word for command in commands for word in re.sub(r"\w+=(\"[^\"]*\"|\S*)|#.*", "", command).split()]
    return {word for word in words if not word.startswith("-")}


def test_commands_are_read_from_code_with_their_options_left_out():
    text = 'Run `make lint test`, or:\n$ make --silent docs ARGS="-k one two"  # slow\nThen make do.\n'
    assert _commands(text) == {"lint", "test", "docs"}


def test_makefile_lists_what_a_newcomer_needs():
    assert set(_targets()) == {
        "help",
        "demo",
        "test",
        "test-all",
        "mutants",
        "lint",
        "bench",
        "scale",
        "peers",
        "calibration",
        "sweep",
        "runs",
        "formats",
        "torture",
        "docs",
        "clean",
    }


def test_make_help_prints_every_target():
    printed = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target, purpose in _targets().items():
        assert re.search(rf"make {target} +{re.escape(purpose)}", printed)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "README.md", ".ci/run"])
def test_commands_that_are_named_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert _commands(text) <= set(_targets())


def test_contributing_names_commands_and_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert {"test", "lint", "docs", "bench"} <= _commands(text)
    paths = re.findall(r"`((?:fkernel|tests|docs|benchmarks|\.ci)/[\w./]*)`", text)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_ci_runs_lint_and_tests_and_stops_at_the_first_failure():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "set -euo pipefail" in script
    assert "make --no-print-directory lint test" in script
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


# --------------------------------------------------------------------------------------------------------------- build


def built(place: Path, *options: str) -> Path:
    """Build the pages; a warning is an error."""
    pytest.importorskip("myst_nb")
    command = [sys.executable, "-m", "sphinx", "-q", "-E", "-W", "--keep-going", "-d", place / "doctrees", *options]
    build = subprocess.run([*command, "-b", "html", DOCS, place / "html"], capture_output=True, text=True)
    assert build.returncode == 0, build.stdout + build.stderr
    return place / "html"


def test_pages_build_without_a_warning(tmp_path):
    """What they say of names and each other; a page that is not executed has cells of no known language."""
    pages = built(tmp_path, "-D", "nb_execution_mode=off", "-D", "suppress_warnings=myst-nb.lexer")
    for page in ("index", "quickstart", "mathematics", "errors", "api/func"):
        assert (pages / f"{page}.html").exists()


@pytest.mark.turns(8)
def test_pages_execute_and_build_without_a_warning(tmp_path):
    built(tmp_path, "-j2")


# ------------------------------------------------------------------------------------------------------ plan and schema


def test_every_row_of_the_plan_is_somewhere_that_exists():
    rows = re.findall(r"^\| (\d+) \|.*\| `([\w./]+)` \|$", (DOCS / "plan_coverage.md").read_text("utf-8"), re.MULTILINE)
    assert [int(number) for number, _ in rows] == [n for n in range(1, 93) if n not in (20, 34)]
    assert [where for _, where in rows if not (ROOT / where).exists()] == []


def test_the_published_schema_is_that_of_plans():
    from fkernel.study import FisherKernelPlan

    published = json.loads((DOCS / "plan.schema.json").read_text("utf-8"))
    assert published == FisherKernelPlan.model_json_schema(), "fkernel plan schema > docs/plan.schema.json"


def test_a_change_of_what_pages_execute_is_another_folder_of_outputs(tmp_path, monkeypatch):
    pages = _extension("executed_pages")
    monkeypatch.setattr(pages, "DOCS", tmp_path / "docs")
    (tmp_path / "docs" / "examples").mkdir(parents=True)
    script = tmp_path / "docs" / "examples" / "run.py"
    script.write_text("a = 1\n", "utf-8")
    before = pages.fingerprint([script.parent])
    assert pages.fingerprint([script.parent]) == before
    script.write_text("a = 2\n", "utf-8")
    assert pages.fingerprint([script.parent]) != before


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 130


def test_the_front_page_is_the_readmes_first_screen():
    (marker,) = re.findall(r"^:end-before: (.+)$", (DOCS / "index.md").read_text("utf-8"), re.MULTILINE)
    first, found, _ = (ROOT / "README.md").read_text("utf-8").partition(marker)
    assert found
    (picture,) = re.findall(r"^!\[.+\]\((.+)\)$", first, re.MULTILINE)
    assert (ROOT / picture).is_file()
    assert len(re.findall(r"^\$ ", first, re.MULTILINE)) == 3
    assert len(re.findall(r"docs/answers\.md#", first)) >= 5
    assert "(docs/answers.md)" in first  # all of them
