"""The page in a browser: what is clicked is what the results say, nothing is fetched, and no text is executed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from benchmarks.page import ACTIONS, Traced, act
from fkernel.report import write_page
from fkernel.report.run_tables import prompts_of
from fkernel.study import AccountResults, FisherKernelResults
from tests.report.made import HOSTILE, made_account, made_study

VIEWS = ("overview", "probes", "map", "sequences", "analyses", "about")
FIRST_PAINT, ACTION = 2000, 100
"""Milliseconds: until something is seen, and what one action may keep the page busy."""
QUICK = ("next probe", "search probes", "sort probes", "open Map", "zoom", "open Sequences")
SLACK = 2
"""Times that a machine of continuous integration, with other tests beside this one, may be slower."""


class Watched:
    """A page, and what it complained of or tried to fetch."""

    def __init__(self, page: Any, path: Path) -> None:
        self.page, self.path = page, path
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def open(self, fragment: str = "") -> Any:
        self.page.goto("about:blank")
        self.page.goto(f"{self.path.as_uri()}{fragment}")
        self.page.wait_for_selector("html[data-ready]", state="attached")
        return self.page

    @property
    def fetched(self) -> list[str]:
        own = ("data:", "blob:", "about:", self.path.as_uri())
        return [url for url in self.requests if not url.startswith(own)]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[FisherKernelResults, Path]:
    results = made_study()
    return results, write_page(results, tmp_path_factory.mktemp("study") / "report.html", "a study")


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> tuple[AccountResults, Path]:
    results = made_account()
    return results, write_page(results, tmp_path_factory.mktemp("account") / "report.html", "an account")


@pytest.fixture
def watch(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1440, "height": 900}, color_scheme="light")
    yield lambda made: Watched(context.new_page(), made[1])
    context.close()


def until(told: Callable[[], bool], seconds: float = 15.0) -> None:
    """Wait until something is so; the page's policy lets nothing wait inside of it."""
    end = time.monotonic() + seconds
    while not told():
        assert time.monotonic() < end
        time.sleep(0.02)


def heading(page: Any, text: str) -> None:
    """Wait until the probe or sequence that is shown is this one."""
    until(lambda: page.locator(".detail h2").inner_text() == text)


def rows_of(page: Any, table: str) -> int:
    return page.locator(table).first.locator(".tabulator-row").count()


def shown(nats: float, scale: float = 1e3, digits: int = 3) -> str:
    """A change as the page writes it."""
    text = f"{scale * nats:+.{digits}f}"
    return "0" if float(text) == 0 else text.replace("-", "−")


def settled(page: Any) -> None:
    """Wait until what the page builds in later turns moves nothing any more."""
    height = (
        "() => { const was = window.height; window.height = document.body.scrollHeight; return was === window.height; }"
    )
    page.wait_for_function(height, polling=200)


def unit_of(page: Any) -> tuple[float, int]:
    unit = page.evaluate("fk.data.unit")
    return unit["scale"], unit["digits"]


# ---------------------------------------------------------------------------------------------- nothing leaves it


@pytest.mark.turns(6)
@pytest.mark.parametrize("kind", ["study", "account"])
def test_every_view_opens_without_an_error_a_request_or_a_script_of_a_text(kind, watch, request):
    watched = watch(request.getfixturevalue(kind))
    page = watched.open()
    for theme in ("light", "dark"):
        for view in VIEWS:
            watched.open(f"#view={view}&theme={theme}")
            page.wait_for_timeout(300)
            assert page.locator("main").inner_text().strip()
            assert page.evaluate("document.documentElement.dataset.theme") == theme
            page.evaluate("scrollTo(0, document.body.scrollHeight)")
            page.wait_for_timeout(100)
    assert page.title() == f"{'a study' if kind == 'study' else 'an account'} – fkernel"
    assert page.locator("main img, main a[href]").count() == 0
    assert not watched.complaints
    assert not watched.fetched


def test_a_text_that_would_be_a_script_is_shown_as_it_is(watch, study):
    watched = watch(study)
    page = watched.open("#view=probes&probe=E-000")
    assert page.locator(".detail .prompt").inner_text() == HOSTILE[0]
    assert not watched.complaints


# ------------------------------------------------------------------------------------- what is clicked is what is


def test_a_click_on_a_probe_shows_its_numbers(watch, study):
    results, _ = study
    held_out = results["held_out"]
    page = watch(study).open("#view=probes")
    scale, digits = unit_of(page)
    for info in held_out.evaluation[:3]:
        page.locator(".list .tabulator-row", has_text=info.id).click()
        heading(page, info.id)
        e = held_out.row(info.id)
        nats = page.locator(".detail .numbers b[data-nats]").evaluate_all("each => each.map((b) => +b.dataset.nats)")
        assert nats == [float(held_out.realised[e]), float(held_out.predicted[e])]
        first = page.locator(".detail .numbers b").first.inner_text()
        assert first == shown(held_out.realised[e], scale, digits)
        assert f"probe={info.id}" in page.url


def test_tokens_have_their_nats(watch, study):
    analysis = study[0]["held_out"].analysis("tokens")
    page = watch(study).open("#view=probes&probe=E-001")
    given = page.locator(".detail .token").evaluate_all("each => each.map((token) => +token.dataset.nats)")
    assert given == analysis["logprob"][1][analysis["response"][1]].astype(float).tolist()
    assert page.locator(".detail .token").all_inner_texts() == analysis.facts["tokens"][1]
    page.locator(".detail .token").nth(1).hover()
    tip = page.locator(".tip").inner_text()
    assert f"Δ log π {shown(given[1], 1, 6)} nats" in tip


def test_the_waterfall_has_the_ledgers_terms(watch, study):
    ledger = study[0]["held_out"].analysis("ledger")
    page = watch(study).open("#view=probes&probe=E-002")
    page.wait_for_selector(".detail .chart .bartext")
    scale, _ = unit_of(page)
    bars = page.evaluate("(() => { const t = document.querySelector('.detail .chart').data[0]; return [t.x, t.y]; })()")
    assert bars[0] == ["batch", "momentum", "remainder", "measured"]
    names = ("batch", "momentum", "remainder", "realised")
    np.testing.assert_allclose(bars[1], [scale * ledger[name][2] for name in names], rtol=1e-6)


def test_contributors_are_those_of_the_results_and_a_click_shows_both_texts(watch, study):
    held_out = study[0]["held_out"]
    page = watch(study).open("#view=probes&probe=E-000&alike=no")
    page.wait_for_selector(".detail .tabulator-row")
    scale, digits = unit_of(page)
    u, C = int(held_out.top[0, 0]), held_out.contributions[0]
    cells = page.locator(".detail .tabulator-row").first.locator(".tabulator-cell").all_inner_texts()
    assert cells[0] == shown(C[u], scale, digits)
    assert cells[1] == f"{held_out.analysis('uncertainty')['top_p'][0, 0]:.3f}"
    assert cells[-1] == held_out.update[u].id
    settled(page)
    page.locator(".detail .tabulator-row").first.click()
    dialog = page.locator("dialog.pair")
    dialog.wait_for()
    assert [*dialog.locator(".text .prompt").all_inner_texts()] == [
        held_out.evaluation[0].prompt,
        held_out.update[u].prompt,
    ]
    assert f"{held_out.cosines[0, u]:+.4f}".replace("-", "−") in dialog.inner_text()
    page.keyboard.press("Escape")
    dialog.wait_for(state="hidden")
    assert "pair=" not in page.url


def test_chance_is_said_of_the_batch_of_every_sequence_and_of_what_no_p_can_tell(watch, study):
    held_out = study[0]["held_out"]
    uncertainty = held_out.analysis("uncertainty")
    page = watch(study).open("#view=probes&probe=E-001&alike=no")
    page.wait_for_selector(".detail .tabulator-row")
    assert page.locator(".detail .numbers b").last.inner_text() == f"{uncertainty['p'][1]:.3f}"
    rows = page.evaluate("fk.contributorRows(fk.group(), 1, {identical: false, sign: 'both', step: null})")
    assert len(rows) == len(held_out.update)
    for row in rows:
        assert row["p"] == pytest.approx(uncertainty["sequence_p"][1, held_out.column(row["id"])])
    below = int((uncertainty["sequence_p"][1] <= 0.05).sum())
    said = page.locator(".detail").inner_text()
    assert f"p ≤ 0.05 for {below} of {len(rows)}." in said
    assert "No sequence's p can be below 0.200 here" in said


def test_right_and_wrong_answers_are_told_apart(watch, study):
    held_out = study[0]["held_out"]
    page = watch(study).open("#view=probes")
    page.wait_for_selector(".list .tabulator-row")
    marks = page.evaluate("fk.probes.rows(fk.group()).map((row) => [row.id, row.text.slice(-1)])")
    assert dict(marks) == {info.id: "✓" if info.reward >= 1.0 else "✗" for info in held_out.evaluation}


@pytest.mark.turns(6)
@pytest.mark.parametrize("kind", ["study", "account"])
def test_headings_of_numbers_are_whole_where_there_is_little_room(kind, watch, request):
    page = watch(request.getfixturevalue(kind)).open()
    page.set_viewport_size({"width": 1280, "height": 900})
    for view in ("overview", "probes", "sequences"):
        page.evaluate(f"location.hash = 'view={view}'")
        page.wait_for_selector(".page .tabulator-col-title")
        page.wait_for_timeout(300)
        cut = page.locator(".tabulator-col-title").evaluate_all(
            "each => each.filter((t) => t.scrollWidth > t.clientWidth).map((t) => t.innerText)"
        )
        assert not cut, (view, cut)


def test_identical_sequences_are_one_line_with_their_sum(watch, account):
    results, _ = account
    page = watch(account).open("#view=probes&probe=probe-0")
    page.wait_for_selector(".detail .tabulator-row")
    scale, digits = unit_of(page)
    sums, counts = dict[tuple[str, str], float](), dict[tuple[str, str], int]()
    for sequence, value in zip(results.sequences, results["contributions"][0].tolist(), strict=True):
        key = (sequence["prompt"], sequence["response"])
        sums[key], counts[key] = sums.get(key, 0.0) + value, counts.get(key, 0) + 1
    most = max(sums, key=lambda key: abs(sums[key]))
    cells = page.locator(".detail .tabulator-row").first.locator(".tabulator-cell").all_inner_texts()
    assert cells[0] == shown(sums[most], scale, digits)
    assert f"× {counts[most]}" in cells
    page.get_by_role("button", name="lowered it").first.click()
    first = page.locator(".detail .tabulator-row").first.locator(".tabulator-cell").first
    until(lambda: first.inner_text() == shown(min(sums.values()), scale, digits))


def grouped(results: AccountResults, e: int) -> dict[tuple[str, str], float]:
    """What identical sequences did to a probe together."""
    sums = dict[tuple[str, str], float]()
    for sequence, value in zip(results.sequences, results["contributions"][e].tolist(), strict=True):
        key = (sequence["prompt"], sequence["response"])
        sums[key] = sums.get(key, 0.0) + value
    return sums


def test_prompts_and_rewards_say_in_how_many_steps_they_were_for_and_against(watch, account):
    results, _ = account
    page = watch(account).open("#view=probes&probe=probe-1")
    page.set_viewport_size({"width": 1440, "height": 4000})
    came = {each.id: each for each in prompts_of(results, 1)}
    rows = page.evaluate("fk.promptRows(fk.group(), 1)")
    assert {row["id"] for row in rows} == set(came)
    for row in rows:
        each = came[row["id"]]
        assert (row["raised"], row["lowered"]) == (each.up, each.steps - each.up)
        assert row["p"] is None if each.steps < 2 else row["p"] == pytest.approx(each.p, rel=1e-9)
    page.locator('[aria-label="steps for and against"] .tabulator-row').nth(1).wait_for()
    by_step = results["rewards"][1]
    for r, name in enumerate(results.facts["reward_functions"]):
        row = page.locator('[aria-label="steps for and against"] .tabulator-row', has_text=name)
        _, total, raised, lowered, p = row.locator(".tabulator-cell").all_inner_texts()
        up, down = int((by_step[:, r] > 0).sum()), int((by_step[:, r] < 0).sum())
        assert (int(raised), int(lowered)) == (up, down)
        assert p == f"{binomtest(up, up + down).pvalue:.3f}"
        assert total == shown(by_step[:, r].sum(dtype=float), *unit_of(page))


def test_the_p_of_many_steps_is_that_of_a_sign_test(watch, account):
    page = watch(account).open()
    for up, n in ((0, 1), (3, 4), (20, 40), (40, 40), (3, 997), (498, 997)):
        assert page.evaluate(f"fk.signTest({up}, {n})") == pytest.approx(binomtest(up, n).pvalue, rel=1e-9), (up, n)
    assert page.evaluate("fk.p(2e-12)") == "< 0.001"


def test_a_pair_says_what_the_identical_sequences_did_together(watch, account):
    results, _ = account
    page = watch(account).open("#view=probes&probe=probe-0")
    page.wait_for_selector(".detail .tabulator-row")
    cells = page.locator(".detail .tabulator-row").first.locator(".tabulator-cell").all_inner_texts()
    (times,) = (int(cell.removeprefix("× ")) for cell in cells if cell.startswith("× "))
    settled(page)
    page.locator(".detail .tabulator-row").first.click()
    dialog = page.locator("dialog.pair")
    dialog.wait_for()
    assert f"the {times} identical sequences together" in dialog.inner_text()
    assert cells[0] in dialog.inner_text()
    u = results.sequence_ids.index(dialog.locator("h3 code").nth(1).inner_text())
    assert shown(results["contributions"][0, u], *unit_of(page)) in dialog.inner_text()


@pytest.mark.turns(6)
def test_the_overview_sums_identical_sequences_and_who_moved_it_says_whether_that_is_chance(watch, account):
    results, _ = account
    page = watch(account).open()
    scale, digits = unit_of(page)
    e = int(np.abs(results["realised"]).argmax())
    sums = grouped(results, e)
    page.wait_for_selector(".overview .tabulator-row")
    cells = page.locator(".overview .tabulator-row").first.locator(".tabulator-cell").all_inner_texts()
    way = np.sign(results["realised"][e])
    most = max(sums, key=lambda text: way * sums[text])
    assert cells[-2] == shown(sums[most], scale, digits)
    assert "× " in cells[2]
    page.set_viewport_size({"width": 1440, "height": 500})
    page.locator(".overview .tabulator-row").last.click()  # scrolls down to it
    page.wait_for_selector(".detail h3")
    assert page.evaluate("scrollY") == 0  # another page begins at its top
    page = watch(account).open("#view=probes")
    page.wait_for_selector(".detail .tabulator-row")
    told = page.locator(".detail .who").inner_text()
    assert "Is that chance? p is how often any sequence of the run would do as much if advantages were shuffled" in told
    page.keyboard.press("j")  # another probe in the same table: the note is on this one
    held = int(page.locator(".detail h2").inner_text().removeprefix("probe-"))
    least = dict[tuple[str, str], float]()
    for sequence, p in zip(results.sequences, results["p"][held].tolist(), strict=True):
        key = (sequence["prompt"], sequence["response"])
        least[key] = min(p, least.get(key, 1.0))
    moved = [key for key, value in grouped(results, held).items() if value]
    clear = sum(least[key] <= 0.05 for key in moved)
    until(lambda: f"p ≤ 0.05 for {clear} of {len(moved)}." in page.locator(".detail .who").inner_text())
    page.evaluate("() => { fk.data.groups[0].p = null; fk.data.groups[0].panels[0].left_out = 'a <b>reason</b>'; }")
    page.evaluate("location.hash = '#view=probes&sign=raised'")
    page.evaluate("() => { fk.main.shown = ''; fk.main.render(); }")
    until(lambda: "There is no p: a <b>reason</b>." in page.locator(".detail .who").inner_text())


@pytest.mark.turns(6)
def test_a_token_kernel_is_there_where_it_was_computed(watch, study):
    pair = study[0]["held_out"].analysis("tokens")["pair_0"]
    page = watch(study).open("#view=probes&probe=E-000&pair=U-001")
    page.wait_for_selector("dialog.pair .js-plotly-plot")
    scale, _ = unit_of(page)
    given = page.evaluate("document.querySelector('dialog.pair > div:last-child .chart').data[0].z")
    np.testing.assert_allclose(given, scale * pair, rtol=1e-6)
    page = watch(study).open("#view=probes&probe=E-000&pair=U-002")
    assert 'tokens: {pairs: [["E-000", "U-002"]]}' in page.locator("dialog.pair").inner_text()


def test_the_map_opens_the_pair_that_is_clicked(watch, study):
    held_out = study[0]["held_out"]
    watched = watch(study)
    page = watched.open("#view=map&order=given&rows=given")
    page.wait_for_selector(".matrix .js-plotly-plot")
    scale, digits = unit_of(page)
    e, u = 3, 7
    place = page.evaluate(
        """([i, k]) => { const box = fk.map.chart.getBoundingClientRect(), l = fk.map.chart._fullLayout;
        return [box.x + l._size.l + l.xaxis.d2p(k), box.y + l._size.t + l.yaxis.d2p(i)]; }""",
        [e, u],
    )
    page.mouse.move(*place)
    page.wait_for_selector(".tip:not([hidden])")
    tip = page.locator(".tip").inner_text()
    assert held_out.evaluation[e].id in tip
    assert held_out.update[u].id in tip
    assert f"{scale * held_out.contributions[e, u]:+.2f}".replace("-", "−")[:5] in tip
    page.mouse.click(*place)
    page.locator("dialog.pair").wait_for()
    assert f"probe={held_out.evaluation[e].id}&pair={held_out.update[u].id}" in page.url
    assert shown(held_out.contributions[e, u], scale, digits) in page.locator("dialog.pair").inner_text()
    assert not watched.complaints


def test_the_map_of_a_run_is_what_each_step_did(watch, account):
    results, _ = account
    page = watch(account).open("#view=map&rows=given")
    page.wait_for_selector(".matrix .js-plotly-plot")
    scale, _ = unit_of(page)
    z = page.evaluate("fk.map.chart.data[0].z.map((row) => Array.from(row))")
    np.testing.assert_allclose(z, scale * results["by_step"], rtol=1e-6)
    assert page.evaluate("fk.map.chart.data[0].zmin === -fk.map.chart.data[0].zmax")
    colours = page.evaluate("fk.map.chart.data[0].colorscale")
    assert [0.5, "#ffffff"] in colours


def test_sequences_are_sorted_by_what_they_did_in_total(watch, account):
    results, _ = account
    page = watch(account).open("#view=sequences&alike=no")
    page.wait_for_selector(".list .tabulator-row")
    totals = np.abs(results["contributions"].astype(float)).sum(0)
    first = page.locator(".list .tabulator-row").first.locator(".tabulator-cell").all_inner_texts()
    assert first[-1] == results.sequence_ids[int(totals.argmax())]


def test_a_search_leaves_what_it_finds(watch, study):
    page = watch(study).open("#view=probes")
    page.locator(".detail input.search").first.fill("U-003")
    until(lambda: rows_of(page, ".detail .table") == 1)
    assert "U-003" in page.locator(".detail .tabulator-row").first.inner_text()
    page.locator(".list input.search").fill("E-002")
    until(lambda: rows_of(page, ".list .table") == 1)
    assert page.locator(".list .count").inner_text() == "1 of 5"


def test_panels_say_how_to_ask(watch, study):
    page = watch(study).open("#view=analyses")
    assert "not asked for" in page.locator("#panel-parts").inner_text()
    assert "parts: true" in page.locator("#panel-parts").inner_text()
    assert "there is no <step>" in page.locator("#panel-sweep").inner_text()


# ------------------------------------------------------------------------------------ address, keys, theme, print


def test_the_address_says_what_is_seen_and_back_goes_back(watch, study):
    page = watch(study).open("#view=probes&probe=E-003")
    heading(page, "E-003")
    settled(page)
    page.get_by_role("button", name="Map").click()
    page.locator(".tab[aria-current]", has_text="Map").wait_for()
    page.go_back()
    heading(page, "E-003")


def test_it_can_be_used_by_keys(watch, study):
    results, _ = study
    held_out = results["held_out"]
    page = watch(study).open()
    page.keyboard.press("2")
    page.wait_for_selector(".detail h2")
    order = [held_out.evaluation[e].id for e in np.argsort(-np.abs(held_out.realised), kind="stable")]
    heading(page, order[0])
    page.wait_for_selector(".list .tabulator-row")
    page.keyboard.press("j")
    heading(page, order[1])
    page.keyboard.press("k")
    heading(page, order[0])
    page.keyboard.press("3")
    page.wait_for_selector(".matrix .js-plotly-plot")
    page.locator(".matrix").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert "probe" in page.locator(".status").inner_text()
    page.keyboard.press("Enter")
    page.locator("dialog.pair").wait_for()
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    page.locator("dialog.help").wait_for()


def test_it_prints_on_white_without_buttons(watch, study):
    page = watch(study).open("#theme=dark")
    page.emulate_media(media="print")
    assert not page.locator("header nav").is_visible()
    assert page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--ground').trim()") == "#fff"
    assert page.locator("#verdict h1").is_visible()
    page.emulate_media(media="screen")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    assert page.locator("table.printed").count() > 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("table.printed").count() == 0


# ------------------------------------------------------------------------------------------------------------ size


@pytest.mark.turns(6)
def test_two_hundred_probes_and_five_thousand_sequences_are_quick(browser, tmp_path):
    texts = tuple(f"Question {i}: {'how much is it? ' * 20}{i}" for i in range(997))
    path = write_page(made_account(200, 160, 32, texts), tmp_path / "report.html")
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert painted < SLACK * FIRST_PAINT
    traced = Traced(page)
    for name, fragment, how in ACTIONS:
        if name in QUICK:
            page.goto("about:blank")
            page.goto(path.as_uri() + fragment.format(other="steps"))
            page.wait_for_timeout(1500)
            longest = max(traced.tasks(lambda how=how: act(page, how)))  # of its own time: other processes do not count
            assert 0 < longest < SLACK * ACTION, name
    page.close()
