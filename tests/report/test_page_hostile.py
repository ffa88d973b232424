"""Nothing that users or addresses name is executed or misread: texts, ids and names of rewards that would be markup."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fkernel.report import write_page
from tests.report.made import HOSTILE, made_account, made_study
from tests.report.test_page_browser import VIEWS, Watched, until

IMAGE, LINK = HOSTILE[1], HOSTILE[4]
FRAGMENTS = (
    "#view=<img src=x onerror=document.title='owned'>",
    "#view=__proto__&request=constructor&probe=toString",
    "#__proto__=x&constructor=y&view=probes",
    "#view=probes&probe=</script><script>document.title='owned'</script>&pair=<b>",
    "#view=map&rows=<i>&order=hasOwnProperty&x=NaN,Infinity&y=-1e999,z",
    "#view=map&map=sequences&x=0.5-2.5&y=1e9-1e12",
    "#theme=\"><script>document.title='owned'</script>",
    "#view=probes&sign=valueOf&alike=<b>&step=javascript:alert(1)",
    "#view=sequences&sequence=__proto__",
    "#%E0%A4%A&view=%ZZ",
    "#javascript:document.title='owned'",
    "#" + "&".join(f"a{i}={'<' * 50}" for i in range(500)),
)
STRANGERS = """() => ({
    elements: [...document.querySelectorAll('main *, dialog *, .tip *')]
        .filter((each) => ['img', 'a', 'script', 'iframe'].includes(each.localName) && !each.closest('.modebar'))
        .map((each) => each.outerHTML),
    title: document.title,
})"""


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An account whose probes, sequences and reward functions have names that would be markup."""
    made = made_account()
    made = replace(
        made,
        probes=tuple(replace(info, id=f"{HOSTILE[e % 5]}-{e}") for e, info in enumerate(made.probes)),
        sequences=tuple(
            {**row, "id": f"{row['id']}{IMAGE}", "rewards": {IMAGE: row["reward"], LINK: 0.0}} for row in made.sequences
        ),
        facts={"reward_functions": [IMAGE, LINK]},
    )
    return write_page(made, tmp_path_factory.mktemp("account") / "report.html", IMAGE)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of one request whose name would be markup."""
    made = made_study()
    request = replace(made["held_out"], name=LINK)
    made = replace(made, requests={LINK: request})
    return write_page(made, tmp_path_factory.mktemp("study") / "report.html", IMAGE)


@pytest.fixture
def watched(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1440, "height": 2600}, color_scheme="light")
    yield lambda path: Watched(context.new_page(), path)
    context.close()


def nothing_happened(seen: Watched, where: str = "") -> None:
    found = seen.page.evaluate(STRANGERS)
    assert found["elements"] == []
    assert found["title"] == f"{IMAGE} – fkernel"
    assert not seen.complaints, where
    assert not seen.fetched


@pytest.mark.turns(6)
@pytest.mark.parametrize("kind", ["account", "study"])
def test_names_and_texts_in_charts_and_their_tips_are_texts(kind, watched, request):
    seen, drawn = watched(request.getfixturevalue(kind)), 0
    for view in VIEWS:
        page = seen.open(f"#view={view}")
        page.wait_for_timeout(600)
        for chart in page.locator("main .js-plotly-plot").all():
            box = chart.bounding_box()
            assert box is not None
            for x in (0.2, 0.35, 0.5, 0.65, 0.8):
                for y in (0.3, 0.6):
                    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
                    page.wait_for_timeout(15)
            drawn += 1
            nothing_happened(seen)
    assert drawn > 3


@pytest.mark.turns(6)
def test_a_rewards_name_is_read_as_it_is_written(watched, account):
    page = watched(account).open("#view=probes")
    page.wait_for_selector(".detail .legendtext")
    legends = "\n".join(page.locator(".detail .legendtext").all_text_contents())
    assert IMAGE in legends
    assert LINK in legends
    page = watched(account).open("#view=analyses")
    page.wait_for_selector("main .legendtext")
    box = page.locator("main .js-plotly-plot").first.bounding_box()
    assert box is not None
    tips = set[str]()
    for step in range(60):
        page.mouse.move(box["x"] + box["width"] * (0.2 + 0.6 * (step % 12) / 12), box["y"] + 60 + step // 12 * 40)
        page.wait_for_timeout(25)
        tips.update(page.locator("main .hoverlayer").first.locator(".hovertext text").all_text_contents())
    assert any("%{x} ${y}" in tip or "onerror" in tip for tip in tips), tips


@pytest.mark.turns(6)
def test_an_address_can_do_no_harm(watched, account, study):
    for path in (account, study):
        seen = watched(path)
        for fragment in FRAGMENTS:
            page = seen.open(fragment)
            page.wait_for_timeout(250)
            assert page.locator("main").inner_text().strip(), fragment
            nothing_happened(seen, fragment)
            page.keyboard.press("2")  # it goes on from there
            until(lambda page=page: page.locator(".tab[aria-current]").inner_text() == "Probes")
        page = seen.open()
        page.evaluate("fragment => { location.hash = fragment; }", FRAGMENTS[4])
        page.wait_for_timeout(400)
        nothing_happened(seen)
