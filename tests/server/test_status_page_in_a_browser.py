"""The page at ``/`` as people use it, in headless Chromium: figures that move, a conversation, a key.

Needs Playwright's Python package (the extra ``browser``) and a Chromium: its own (``playwright install chromium``), one on PATH, or
the one that the environment variable ``CHROMIUM`` names. With that variable set, as ``.ci/run`` sets it, what is missing is a failure.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from helexa_engine.errors import EngineDied
from helexa_engine.events import ContentDelta, Finished, ReasoningDelta, Timings, Usage
from helexa_engine.testing.fake_engine import FakeEngine

from .answer_scripts import PROMPT, finished, words
from .live import Serve, wait_until
from .test_model_routes import fleet_server

#: The browser to use, where the tests must run.
REQUIRED = os.environ.get("CHROMIUM")

sync_api: Any
if REQUIRED is None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
else:
    sync_api = importlib.import_module("playwright.sync_api")

#: A Chromium that is on this machine already; None leaves it to Playwright.
CHROMIUM = REQUIRED or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

#: It is alone with the page: no profile, nothing fetched in the background, and it may run as root, as continuous integration does.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        if CHROMIUM is None and not os.path.exists(playwright.chromium.executable_path):
            pytest.skip("needs a Chromium")
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """A page that fails the test on an error of a script or of the content policy."""
    page = browser.new_page()
    page.set_default_timeout(10_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if "Content Security Policy" in line.text else None)
    yield page
    page.close()
    assert not problems


def say(tab: Any, text: str) -> None:
    tab.fill("#question", text)
    tab.press("#question", "Enter")


def test_the_button_loads_and_unloads(tab: Any) -> None:
    with fleet_server() as (fleet, live):
        tab.goto(live.url)
        tab.click("button[data-act=load][data-of=b]")
        tab.wait_for_selector("button[data-act=unload][data-of=b]")
        assert fleet.status("b") == "ready"
        tab.click("button[data-act=unload][data-of=b]")
        tab.wait_for_selector("button[data-act=load][data-of=b]")
        assert fleet.status("b") == "unloaded"


def test_a_conversation(serve: Serve, tab: Any) -> None:
    markup = "<img src=x onerror=alert(1)>"
    engine = FakeEngine([PROMPT, ReasoningDelta(0, "Hm.", (1,)), 0.05, *words(f"Hello {markup}"), finished()])
    tab.goto(serve(engine).url)
    say(tab, "first <b>")
    sync_api.expect(tab.locator(".assistant")).to_have_text(f"Hm.Hello {markup}")
    assert (
        tab.locator(".thinking").inner_text() == "Hm."
        and tab.locator("#conversation img, #conversation b").count() == 0
    )
    sync_api.expect(tab.locator("#send")).to_be_visible()
    say(tab, "second")
    wait_until(lambda: len(engine.requests) == 2)
    turns = [(turn["role"], turn["content"]) for turn in engine.requests[1].messages or ()]
    assert turns == [("user", "first <b>"), ("assistant", f"Hello {markup}"), ("user", "second")]
    sync_api.expect(tab.locator("#send")).to_be_visible()
    tab.click("#clear")
    say(tab, "afresh")
    wait_until(lambda: len(engine.requests) == 3)
    assert [turn["content"] for turn in engine.requests[2].messages or ()] == ["afresh"]


def test_stopping_and_failing(serve: Serve, tab: Any) -> None:
    scripts = iter(([PROMPT, *words("some words"), 60.0], [EngineDied("gone <i>")]))
    engine = FakeEngine(lambda request: next(scripts))
    tab.goto(serve(engine).url)
    say(tab, "go on")
    sync_api.expect(tab.locator(".assistant")).to_have_text("some words")
    tab.click("#stop")
    wait_until(lambda: len(engine.aborted) == 1)
    sync_api.expect(tab.locator("#send")).to_be_visible()
    say(tab, "and now")
    sync_api.expect(tab.locator(".error")).to_contain_text("gone <i>")


def test_figures_move_without_a_reload(serve: Serve, tab: Any) -> None:
    live = serve(None)
    live.model.life.report("weights", 0.5)
    tab.goto(live.url)
    sync_api.expect(tab.locator("#status td").first).to_have_text("weights, 50%")
    engine = FakeEngine([])
    live.loop.call_soon_threadsafe(live.model.life.loaded, engine)
    sync_api.expect(tab.locator("#status td").first).to_have_text("ready")
    engine.num_running = 3
    sync_api.expect(tab.locator("#status td").nth(3)).to_have_text("3")
    sync_api.expect(tab.locator("[data-tokens]")).to_have_text("0.0")


def test_the_key_is_asked_for(serve: Serve, tab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELEXA_API_KEY", "sesame")
    usage, timings = Usage(5, 1), Timings(0.0, 0.01, 0.01)
    engine = FakeEngine([PROMPT, ContentDelta(0, "open", (1,)), Finished(0, "stop", usage, timings)])
    tab.goto(serve(engine).url)
    sync_api.expect(tab.locator("#chat")).to_be_hidden()
    for key, told in (("guess", "wrong key"), ("sesame", "")):
        tab.fill("#key", key)
        tab.click("#unlock button")
        sync_api.expect(tab.locator("#refused")).to_have_text(told)
    sync_api.expect(tab.locator("#status tbody th")).to_have_text("fake")
    sync_api.expect(tab.locator("#unlock")).to_be_hidden()
    say(tab, "hi")
    sync_api.expect(tab.locator(".assistant")).to_have_text("open")
    tab.reload()
    sync_api.expect(tab.locator("#chat")).to_be_visible()
