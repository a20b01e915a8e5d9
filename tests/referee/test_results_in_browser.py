"""The page of all results in a browser without a screen, and all of what is in git on it."""

from __future__ import annotations

import re

import made_results
import pytest

from harness.report import report
from harness.report.page import build


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    return made_results.make()


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """The page of the results in git, built anew; tests change `report.RESULTS`."""
    path = tmp_path_factory.mktemp("committed") / "index.html"
    path.write_text(build.text())
    return path


def test_every_committed_table_is_on_the_page_with_its_evidence_and_provenance(committed):
    text = committed.read_text()
    for path in report.RESULTS.glob("*/*.csv"):
        assert f'<a href="{path.parent.name}/{path.name}">' in text
    articles = re.findall(r'<article class="figure".*?</article>', text, re.S)
    assert len(articles) > 50
    for article in articles:
        assert re.search(r'class="badge (measured|replayed|recorded|predicted|throttled)"', article)
        assert "<dt>Command</dt>" in article
        assert len(re.findall(r"<th ", article)) <= 8
    assert "throttled to 550 MB/s" in text


DRAWN = "() => document.documentElement.dataset.charts === 'drawn'"


@pytest.mark.parametrize("page", [("dark", 390)], indirect=True, ids=str)
def test_the_committed_page_works_from_a_file_and_fits_a_telephone(page, committed):
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(committed.as_uri())
    page.wait_for_function(DRAWN, timeout=120_000)
    assert page.complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [committed.as_uri()]
    assert page.locator(".chart").count() == page.locator(".chart svg").count() > 50
    wide, shown = page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= shown


def test_a_click_or_a_key_on_a_header_sorts(page, results):
    page.goto(build.write().as_uri())
    table = page.locator("#behind table").first
    page.wait_for_function(DRAWN)
    cap = page.locator("#figures table").first.locator("th", has_text="Decode")
    page.locator("#figures summary", has_text="Table").first.click()
    column = "els => els.map(row => row.cells[1] && row.cells[4].textContent)"
    rows = page.locator("#figures table").first.locator("tbody tr")
    cap.click()
    page.wait_for_timeout(50)
    down = rows.evaluate_all(column)
    cap.focus()
    page.keyboard.press("Enter")
    page.wait_for_timeout(50)
    assert rows.evaluate_all(column) != down
    assert cap.get_attribute("aria-sort") == "ascending"
    assert table.is_visible()


def test_a_filter_hides_what_is_of_another_share_of_memory(page, results):
    page.goto(build.write().as_uri())
    page.wait_for_function(DRAWN)
    rows = page.locator("#advice article tbody tr:visible")
    assert rows.count() == 2
    page.select_option("select[name=memory]", "tight")
    assert rows.count() == 1
    page.click("button[type=reset]")
    page.wait_for_function("() => !document.querySelector('#advice article tr[hidden]')")
    assert rows.count() == 2


COLOURS = """() => [document.body, document.querySelector('.chart svg text')]
    .map(getComputedStyle).map(each => each.backgroundColor + each.fill)"""


def test_dark_light_and_print_differ_in_pictures_too(browser, results):
    seen = {}
    for scheme in ("light", "dark"):
        with browser.new_context(color_scheme=scheme) as context:
            opened = context.new_page()
            opened.goto(build.write().as_uri())
            opened.wait_for_function(DRAWN)
            seen[scheme] = opened.evaluate(COLOURS)
            opened.emulate_media(media="print")
            assert opened.evaluate(COLOURS) == seen["light"]
            opened.evaluate("() => dispatchEvent(new Event('beforeprint'))")
            assert opened.locator("details:not([open])").count() == 0
            opened.evaluate("() => dispatchEvent(new Event('afterprint'))")
            assert opened.locator("details[open]").count() == 0
    assert all(a != b for a, b in zip(seen["light"], seen["dark"], strict=True))
