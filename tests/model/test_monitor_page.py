"""The live page in a browser without a screen, while the demo model generates."""

from __future__ import annotations

import threading

import pytest
from tiny import prompt

import flashmoe
from flashmoe.monitor import Monitor


@pytest.fixture(scope="module")
def demo():
    """The demo model, which generates for as long as tests run."""
    model = flashmoe.load(flashmoe.demo_path(), memory="16MiB")
    ended = threading.Event()

    def generate() -> None:
        while not ended.is_set():
            model.generate(prompt(20), max_new_tokens=20, do_sample=True)

    thread = threading.Thread(target=generate)
    thread.start()
    yield model
    ended.set()
    thread.join()
    model.flashmoe.close()


PIXELS = "() => document.querySelector('#map').toDataURL()"


def says(name: str, pattern: str) -> str:
    """A condition on the text of an element."""
    return f"() => /{pattern}/.test(document.querySelector('#{name}').textContent)"


READY = "() => parseFloat(document.querySelector('#tokens').textContent) > 0"


@pytest.mark.parametrize("page", [("light", 1200), ("dark", 400)], indirect=True, ids=str)
def test_the_map_and_the_figures_change_while_a_model_generates(page, demo):
    with Monitor("127.0.0.1", 0, None) as monitor:
        page.goto(monitor.url)
        page.wait_for_function(says("state", "waiting"))
        assert not page.is_visible("#map")
        monitor.watch(demo.flashmoe, "demo")
        page.wait_for_function(READY)
        assert page.inner_text("#model") == "demo"
        assert page.inner_text("#state") == "live"
        pictures, texts = set(), {name: set() for name in ("hit_rate", "tokens", "read")}
        for _ in range(6):
            pictures.add(page.evaluate(PIXELS))
            for name, seen in texts.items():
                seen.add(page.inner_text(f"#{name}"))
            page.wait_for_timeout(300)
        assert len(pictures) > 2
        assert all(len(seen) > 1 for seen in texts.values()), texts
        assert page.inner_text("#memory").endswith("of 16 MiB")
        page.hover("#map", position={"x": 100, "y": 50})
        page.wait_for_function(says("cell", "Layer"))
        page.wait_for_function(says("budgets", "[0-9] %"))
        assert "not measured" in page.inner_text("#budgets_note")
        assert page.locator(".chart canvas").count() == 4
        wide, shown = page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
        assert wide <= shown
        assert page.complaints == []


def test_a_page_that_is_left_costs_nothing(page, demo):
    with Monitor("127.0.0.1", 0, None) as monitor:
        monitor.watch(demo.flashmoe)
        page.goto(monitor.url)
        page.wait_for_function(READY)
        log = demo.flashmoe.residency.routing.log
        assert log.wanted
        page.goto("about:blank")
        for _ in range(100):
            if not log.wanted:
                break
            page.wait_for_timeout(50)
        assert not log.wanted


def test_a_page_asks_for_the_key(page, demo):
    with Monitor("127.0.0.1", 0, "secret") as monitor:
        monitor.watch(demo.flashmoe)
        page.goto(monitor.url)
        page.fill("#key input", "secret")
        page.click("#key button")
        page.wait_for_function(READY)
        assert not page.is_visible("#key")
        page.goto(monitor.url + "?key=secret")
        page.wait_for_function(READY)
        assert "secret" not in page.url
