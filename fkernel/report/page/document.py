"""One HTML file: the verdict as plain HTML, the data as JSON, libraries and scripts inside.

A content security policy lets the page's own scripts run, each by its hash, and lets nothing be fetched: what a text of
the data holds is never executed, and no request leaves the file.
"""

from __future__ import annotations

import base64
import hashlib
import re
from html import escape
from pathlib import Path
from typing import Any

from fkernel.report.page.packing import as_json

HERE = Path(__file__).parent
LIBRARIES = ("plotly-cartesian.min.js", "tabulator.min.js")
STYLES = ("libraries/tabulator.min.css", "app/page.css", "app/tables.css", "app/print.css")
APP = (
    "format", "data", "address", "theme", "elements", "sections", "tables", "charts", "probe_charts", "tokens",
    "contributors", "recurrences", "pair", "probes", "matrix", "map_axes", "map", "sequences", "panels", "overview",
    "main",
)  # fmt: skip
"""The page's own scripts, each of which may use those before it."""
SOURCE_MAP = re.compile(r"(//|/\*)# sourceMappingURL=.*")
MARKS = {"good": "✓", "note": "·", "warning": "!", "bad": "✗"}


def page_html(data: dict[str, Any]) -> str:
    """The page of some data.

    Args:
        data: from `study_page` or `account_page`.

    Returns:
        A whole HTML document.
    """
    scripts = [_read(f"libraries/{name}") for name in LIBRARIES] + [_read(f"app/{name}.js") for name in APP]
    hashes = " ".join(f"'sha256-{_hash(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        f"base-uri 'none'; form-action 'none'"
    )
    styles = "\n".join(_read(name) for name in STYLES)
    return "\n".join([
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(data['title'])} – fkernel</title>",
        f"<style>\n{styles}\n</style>",
        "</head>",
        "<body>",
        '<header id="top"></header>',
        '<main id="view" tabindex="-1">',
        verdict_html(data),
        "<noscript>Tables and charts need JavaScript.</noscript>",
        "</main>",
        f'<script type="application/json" id="data">{as_json(data)}</script>',
        *(f"<script>{script}</script>" for script in scripts),
        "</body>",
        "</html>",
        "",
    ])  # fmt: skip


def verdict_html(data: dict[str, Any]) -> str:
    """The verdict, readable before any script has run: headline, sentences, and what the results are about."""
    verdict = data["verdict"]
    lines = "\n".join(_sentence(each["level"], each["text"]) for each in verdict["lines"])
    about = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in data["about"])
    return (
        f'<section id="verdict" class="{verdict["level"]}">\n<h1>{escape(verdict["headline"])}</h1>\n'
        f'<ul class="lines">\n{lines}\n</ul>\n<dl class="about">\n{about}\n</dl>\n</section>'
    )


def _sentence(level: str, text: str) -> str:
    return f'<li class="{level}"><span aria-hidden="true">{MARKS[level]}</span> {escape(text)}</li>'


def _read(name: str) -> str:
    """A file of the page, without the address of its source map; it may not end the element that it stands in."""
    text = SOURCE_MAP.sub("", (HERE / name).read_text(encoding="utf-8"))
    return text.replace("</script", "<\\/script") if name.endswith(".js") else text


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
