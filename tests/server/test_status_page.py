"""The page at ``/``: every figure from the server, every text escaped, nothing shown without the key."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from helexa_engine.testing.fake_engine import FakeEngine, FakeModelInfo
from helexa_server import status_page
from helexa_server.served_model import ServedModel

from .live import Serve
from .test_model_routes import fleet_server

HOSTILE = "<script>alert('x')</script>\"&"


class Page(HTMLParser):
    """Cells of the table, options of the form, ids that are hidden, scripts and what they and others load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.options: list[str] = []
        self.hidden: set[str] = set()
        self.scripts: list[str] = []
        self.loads: list[str] = []
        self.counters: dict[str, str] = {}
        self._into: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.loads += [found[name] or "" for name in ("src", "href") if name in found]
        assert not any(name.startswith("on") for name in found), "the policy allows no inline handlers"
        if "hidden" in found:
            self.hidden.add(found.get("id") or "")
        if "data-model" in found:
            self.counters[found["data-model"] or ""] = found["data-tokens"] or ""
        self._into = {"th": self.cells, "td": self.cells, "option": self.options, "script": self.scripts}.get(tag)
        if self._into is not None:
            self._into.append("")

    def handle_endtag(self, tag: str) -> None:
        self._into = None

    def handle_data(self, data: str) -> None:
        if self._into is not None:
            self._into[-1] += data


def test_it_shows_the_models_and_what_they_do(serve: Serve) -> None:
    info = FakeModelInfo(weight_bytes=3 * 2**30, kv_bytes=2**29, max_model_len=32768)
    engine = FakeEngine([], info)
    with serve(engine).http() as http:
        got = http.get("/")
        assert got.status_code == 200 and got.headers["content-type"] == "text/html; charset=utf-8"
        assert Page(got.text).cells[8:] == ["fake", "ready", "32,768", "3.5 GiB", "0", "0", "0%", ""]
        engine.num_running = 2
        page = Page(http.get("/").text)
    assert page.cells[12] == "2" and page.counters == {"fake": "0"}
    assert page.options == ["fake"] and page.hidden == {"unlock", "stop"}


def test_a_model_that_is_loading_shows_how_far_it_is(serve: Serve) -> None:
    live = serve(None)
    live.model.life.report("weights", 0.25)
    with live.http() as http:
        assert Page(http.get("/").text).cells[8:10] == ["fake", "weights, 25%"]


def test_names_are_text_and_nothing_else() -> None:
    model, loading = ServedModel(HOSTILE), ServedModel(f"loading {HOSTILE}")
    model.life.loaded(FakeEngine([]))
    loading.life.report(HOSTILE, 0.5)
    page = Page(status_page.page([model, loading], locked=False))
    assert page.options == [HOSTILE, f"loading {HOSTILE}"] and page.counters == {HOSTILE: "0"}
    assert page.cells[8] == HOSTILE and page.cells[16:18] == [f"loading {HOSTILE}", f"{HOSTILE}, 50%"]
    assert page.scripts == [status_page.SCRIPT]


def test_models_that_can_be_loaded_have_a_button() -> None:
    with fleet_server() as (_, live), live.http() as http:
        before = http.get("/").text
        assert Page(before).cells[8:10] == ["a", "unloaded "] and "data-act='load' data-of='a'>Load<" in before
        http.post("/models/load", json={"model": "a"})
        after = http.get("/").text
        assert Page(after).cells[9] == "ready " and "data-act='unload' data-of='a'>Unload<" in after


def test_the_policy_allows_our_script_alone_and_nothing_from_elsewhere(serve: Serve) -> None:
    with serve(FakeEngine([])).http() as http:
        got = http.get("/")
    policy = dict(part.strip().split(" ", 1) for part in got.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy["script-src"]) and "unsafe" not in str(policy)
    page = Page(got.text)
    assert page.loads == ["data:,"] and len(page.scripts) == 1
    assert "://" not in status_page.SCRIPT + status_page.STYLE
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert way not in status_page.SCRIPT


def test_without_the_key_it_says_nothing_but_that_it_wants_one(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELEXA_API_KEY", "sesame")
    with serve(FakeEngine([])).http() as http:
        locked = http.get("/")
        assert locked.status_code == 200 and "fake" not in locked.text
        page = Page(locked.text)
        assert page.cells == page.options == [] and page.hidden == {"chat", "stop"}
        assert http.get("/", headers={"authorization": "Bearer guess"}).status_code == 401
        opened = Page(http.get("/", headers={"authorization": "Bearer sesame"}).text)
        assert opened.options == ["fake"] and "unlock" in opened.hidden
        assert http.get("/v1/models").status_code == 401 and http.get("/metrics").status_code == 401


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_parses(tmp_path: Path) -> None:
    script = tmp_path / "page.js"
    script.write_text(status_page.SCRIPT)
    subprocess.run(["node", "--check", script], check=True)
    script.write_text(status_page.SCRIPT + "}")
    assert subprocess.run(["node", "--check", script], capture_output=True).returncode != 0
