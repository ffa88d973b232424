"""What the page's interactions take in Chromium: `python -m benchmarks.page`, written to `results/page.json`.

Real keys and clicks on pages of 200 probes and about 5,000 sequences. Of each, in milliseconds:

    shown      from the key or click to the next frame that is painted, on the clock (Event Timing, in steps of 8)
    longest    the longest task of the page's main thread, the thread's own time
    all        all tasks until nothing happens any more, the thread's own time

The median of the rounds is kept. The clock also counts what other processes take; the thread's own time does not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT, environment
from fkernel.report import write_page
from tests.report.conftest import NAMES, chromium_path
from tests.report.made import made_account, made_study

RESULTS = ROOT / "benchmarks" / "results" / "page.json"
TARGET = 100
TEXTS = tuple(f"Question {i}: {'how much is it? ' * 20}{i}" for i in range(997))
SETTLED = 700
"""Milliseconds after which an interaction is taken to be over."""
WATCH = """window.events = [];
new PerformanceObserver((list) => { for (const e of list.getEntries()) window.events.push(e.duration); })
.observe({type: 'event', durationThreshold: 16});"""
ACTIONS = (
    ("open Probes", "#view=overview", "key:2"),
    ("next probe", "#view=probes", "key:j"),
    ("click a probe", "#view=probes", "click:.list .tabulator-row >> nth=5"),
    ("search probes", "#view=probes", "type:.list input.search"),
    ("sort probes", "#view=probes", "click:.list .tabulator-col >> nth=1"),
    ("raised it", "#view=probes", "click:button[data-value=raised]"),
    ("open a contributor", "#view=probes", "click:.detail .tabulator-row >> nth=1"),
    ("open Map", "#view=overview", "key:3"),
    ("probes × sequences", "#view=map&map={other}", "click:button[data-value=sequences]"),
    ("zoom", "#view=map&map=sequences", "drag"),
    ("move by keys", "#view=map&map=sequences", "arrow"),
    ("open Sequences", "#view=overview", "key:4"),
    ("click a sequence", "#view=sequences", "click:.list .tabulator-row >> nth=5"),
    ("open Analyses", "#view=overview", "key:5"),
    ("back to Overview", "#view=probes", "key:1"),
    ("dark", "#view=probes", "key:d"),
)
"""What is done, where it begins, and how."""


class Traced:
    """A page whose main thread is traced during an action."""

    def __init__(self, page: Any) -> None:
        self.page, self.session = page, page.context.new_cdp_session(page)
        self.events: list[dict[str, Any]] = []
        self.session.on("Tracing.dataCollected", lambda data: self.events.extend(data["value"]))
        self.done = False
        self.session.on("Tracing.tracingComplete", lambda _: setattr(self, "done", True))

    def tasks(self, action: Any) -> list[float]:
        """Milliseconds of the main thread's own time of each of its tasks while an action is done."""
        self.events, self.done = [], False
        categories = "toplevel,disabled-by-default-devtools.timeline,blink.user_timing,__metadata"
        self.session.send("Tracing.start", {"categories": categories, "transferMode": "ReportEvents"})
        action()
        self.page.wait_for_timeout(SETTLED)
        self.session.send("Tracing.end")
        while not self.done:
            self.page.wait_for_timeout(20)
        mains = {(e["pid"], e["tid"]) for e in self.events
                 if e["name"] == "thread_name" and e["args"]["name"] == "CrRendererMain"}  # fmt: skip
        own = [
            e for e in self.events if e.get("ph") == "X" and (e["pid"], e["tid"]) in mains and "RunTask" in e["name"]
        ]
        return [e.get("tdur", 0) / 1000 for e in own] or [0.0]


def act(page: Any, how: str) -> None:
    """Press, click, type or drag."""
    kind, _, what = how.partition(":")
    if kind == "key":
        page.keyboard.press(what)
    elif kind == "click":
        page.locator(what).first.click() if ">>" not in what else page.locator(what).click()
    elif kind == "type":
        page.locator(what).focus()
        page.keyboard.press("4")
    elif kind == "arrow":
        page.locator(".matrix").focus()
        page.keyboard.press("ArrowRight")
    else:
        box = page.locator(".matrix .nsewdrag").first.bounding_box()
        x, y = box["x"], box["y"]
        page.mouse.move(x + 0.3 * box["width"], y + 0.3 * box["height"])
        page.mouse.down()
        page.mouse.move(x + 0.6 * box["width"], y + 0.7 * box["height"], steps=3)
        page.mouse.up()


def measured(page: Any, path: Path, other: str, rounds: int) -> dict[str, dict[str, float]]:
    """Every action, on a page that has been opened anew for it."""
    traced, made = Traced(page), {}
    for name, fragment, how in ACTIONS:
        runs = []
        for _ in range(rounds):
            page.goto("about:blank")
            page.goto(path.as_uri() + fragment.format(other=other))
            page.wait_for_selector("html[data-ready]", state="attached")
            page.evaluate(WATCH)
            page.wait_for_timeout(2 * SETTLED)
            page.evaluate("window.events.length = 0")
            tasks = traced.tasks(lambda how=how: act(page, how))
            shown = page.evaluate("Math.max(0, ...window.events)")
            runs.append({"shown": shown, "longest": max(tasks), "all": sum(tasks)})
        made[name] = {key: round(statistics.median(run[key] for run in runs), 1) for key in runs[0]}
        print(f"  {name:24}" + "".join(f"{key} {made[name][key]:6.0f}   " for key in made[name]), flush=True)
    return made


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser."""
    from playwright.sync_api import sync_playwright

    path = chromium_path()
    if path is None:
        raise SystemExit(f"There is no browser: none of {', '.join(NAMES)}.")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def main() -> None:
    """Measure both kinds of page, and write what they took."""
    given = argparse.ArgumentParser()
    given.add_argument("--rounds", type=int, default=5)
    given.add_argument("--only", choices=("account", "study"))
    given.add_argument("--out", type=Path, default=RESULTS)
    asked = given.parse_args()
    kinds = {"account": (made_account(200, 160, 32, TEXTS), "steps"), "study": (made_study(200, 5000, TEXTS), "cosine")}
    about, made = environment(), {}
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        about["chromium"] = browser.version
        for kind, (results, other) in kinds.items():
            if asked.only not in (None, kind):
                continue
            path = write_page(results, Path(folder) / f"{kind}.html", kind)
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            print(f"{kind}: {path.stat().st_size / 1e6:.1f} MB")
            made[kind] = {"megabytes": round(path.stat().st_size / 1e6, 1)}
            made[kind]["actions"] = measured(page, path, other, asked.rounds)
            page.close()
    about["load_after"] = round(os.getloadavg()[0], 2)
    asked.out.write_text(json.dumps({"environment": about, "target": TARGET, **made}, indent=1) + "\n")


if __name__ == "__main__":
    main()
