"""Every plan model and every key of a plan is described in docs/api/plan.md, under its name in the schema."""

from __future__ import annotations

import re

import pytest

from tests.test_docs import DOCS, _extension

pytest.importorskip("sphinx")
keys = _extension("plan_keys")


def test_every_plan_model_has_its_table_once():
    written = re.findall(r"^```\{plan-keys\} (\w+)$", (DOCS / "api" / "plan.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(written) == sorted(keys.schema())


def test_every_key_says_what_it_is_and_what_it_takes():
    silent = [
        f"{name}.{key}" for name in keys.schema() for key, taken, _, what in keys.rows(name) if not (taken and what)
    ]
    assert silent == []


def test_meanings_are_read_over_lines_and_from_bases():
    said = keys.meanings(keys.models()["RecordedBatch"])
    assert said["recording"] == "a directory that a Recorder wrote."
    assert said["advantages"].endswith("there is no realised change to compare with.")
