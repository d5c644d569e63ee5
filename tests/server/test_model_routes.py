"""Several models over HTTP: /models, /models/load, /models/unload, /models/events, aliases, and requests for what is not loaded."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from helexa_engine.errors import UnsupportedCheckpoint

from .answer_scripts import answer
from .lifecycle.fake_models import FakeSource, Fleet
from .live import Live, live_models, wait_until
from .test_app import assert_envelope

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


@contextlib.contextmanager
def fleet_server(memory_bytes: int = 100, **options: Any) -> Iterator[tuple[Fleet, Live]]:
    """Models a (alias "gpt-4o") and b of 60 bytes each, neither loaded, a to be at start."""
    settings: dict[str, dict[str, Any]] = {"a": {"aliases": ["gpt-4o"]}, "b": {"at_start": False}}
    fleet = Fleet(memory_bytes, {"a": 60, "b": 60}, settings)
    for source in fleet.sources.values():
        source.script = answer()
    with live_models(list(fleet.models.values()), fleet.budget, **options) as live:
        yield fleet, live


def models(http: httpx.Client) -> dict[str, dict[str, Any]]:
    return {model["id"]: model for model in http.get("/models").json()["models"]}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_for_an_unloaded_model_waits_for_its_load_with_keep_alives(stream: bool) -> None:
    with fleet_server(keep_alive_seconds=0.02) as (fleet, live), live.http() as http:
        gate = fleet.sources["b"].gate
        live.loop.call_soon_threadsafe(gate.clear)
        answers: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(live.url + CHAT, json={**ASK, "model": "b", "stream": stream}))
        )
        asking.start()
        wait_until(lambda: models(http)["b"]["progress"] == {"stage": "weights", "fraction": 0.5})
        assert models(http)["b"]["requests_waiting"] == 1
        asking.join(0.1)
        live.loop.call_soon_threadsafe(gate.set)
        asking.join(5)
        assert answers[0].status_code == 200 and "error" not in answers[0].text
        assert not stream or answers[0].text.count('"delta":{},"finish_reason":null') >= 2
        assert models(http)["b"]["status"] == "ready"


def test_models_says_how_each_is() -> None:
    with fleet_server() as (_, live), live.http() as http:
        listed = http.get("/models").json()
        assert listed["memory"] == {"total_bytes": 100, "reserved_bytes": 0, "free_bytes": 100}
        assert listed["version"] and listed["uptime_seconds"] >= 0
        first, second = listed["models"]
        assert (first["id"], first["status"], first["aliases"], first["at_start"]) == (
            "a",
            "unloaded",
            ["gpt-4o"],
            True,
        )
        assert (second["id"], second["at_start"], second["reserved_bytes"]) == ("b", False, 0)
        http.post(CHAT, json={**ASK, "model": "a"})
        loaded = models(http)["a"]
        assert (loaded["status"], loaded["reserved_bytes"], loaded["max_model_len"]) == ("ready", 60, 4096)
        assert loaded["idle_seconds"] >= 0 and loaded["last_used"] > 1e9 and loaded["loads"] == 1
        assert http.get("/models").json()["memory"]["free_bytes"] == 40


def test_load_and_unload() -> None:
    with fleet_server() as (_, live), live.http() as http:
        loaded = http.post("/models/load", json={"model": "a", "pin": True})
        assert loaded.status_code == 200 and loaded.json()["status"] == "ready" and loaded.json()["pinned"]
        error = assert_envelope(http.post("/models/load", json={"model": "b"}), 422, "model_does_not_fit")
        assert (error["needed_bytes"], error["free_bytes"]) == (60, 40)
        unloaded = http.post("/models/unload", json={"model": "gpt-4o"})
        assert unloaded.status_code == 200 and unloaded.json()["status"] == "unloaded"
        assert http.post("/models/load", json={"model": "b", "wait": False}).json()["status"] in ("loading", "ready")
        wait_until(lambda: models(http)["b"]["status"] == "ready")
        assert http.post("/models/load", json={"model": "a", "pin": False}).json()["status"] == "ready"
        assert models(http)["b"]["status"] == "unloaded" and models(http)["b"]["evictions"] == 1
        assert http.post("/models/unload", json={"model": "b"}).json()["status"] == "unloaded", "it is that already"


def test_bad_bodies_and_unknown_names() -> None:
    with fleet_server() as (_, live), live.http() as http:
        for path in ("/models/load", "/models/unload"):
            assert_envelope(http.post(path, json={"model": "c"}), 404, "model_not_found")
            assert assert_envelope(http.post(path, json={}), 400, "invalid_request")["param"] == "model"
            assert_envelope(http.post(path, json={"model": ""}), 400, "invalid_request")
        assert_envelope(http.post("/models/unload", json={"model": "a", "wait_seconds": -1}), 400, "invalid_request")
        assert_envelope(http.post("/models/load", json={"model": "a", "pin": "yes"}), 400, "invalid_request")


def test_a_load_that_fails_is_told_and_kept() -> None:
    with fleet_server() as (fleet, live), live.http() as http:
        fleet.sources["a"].outcomes = [UnsupportedCheckpoint("it is broken", "a.gguf")]
        assert_envelope(http.post("/models/load", json={"model": "a"}), 422, "unsupported_checkpoint")
        assert models(http)["a"]["error"] == "a.gguf: it is broken" and models(http)["a"]["status"] == "unloaded"
        assert http.get("/health").json()["models"][0]["last_error"] == "a.gguf: it is broken"


def test_running_requests_end_with_words_when_their_model_is_unloaded() -> None:
    with fleet_server() as (fleet, live), live.http() as http:
        fleet.sources["a"].script = [60.0]
        answers: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(live.url + CHAT, json={**ASK, "model": "a"}))
        )
        asking.start()
        wait_until(lambda: models(http)["a"]["requests_running"] == 1)
        assert http.post("/models/unload", json={"model": "a", "wait_seconds": 0}).json()["status"] == "unloaded"
        asking.join(5)
        error = assert_envelope(answers[0], 503, "service_unavailable")
        assert "'a' was unloaded" in str(error["message"]) and answers[0].headers["retry-after"] == "1"


def test_an_alias_answers_under_the_models_own_name() -> None:
    with fleet_server() as (_, live), live.http() as http:
        assert http.post(CHAT, json={**ASK, "model": "gpt-4o"}).json()["model"] == "a"
        assert http.get("/v1/models/gpt-4o").json()["id"] == "a"
        assert [(m["id"], m["aliases"], "limit" in m) for m in http.get("/v1/models").json()["data"]] == [
            ("a", ["gpt-4o"], True),
            ("b", [], False),
        ]
        assert http.post(CHAT, json=ASK).json()["model"] == "a", "without a name: the only one that is loaded at start"


def test_ready_is_when_what_is_loaded_at_start_is() -> None:
    with fleet_server() as (fleet, live), live.http() as http:
        live.loop.call_soon_threadsafe(fleet.sources["a"].gate.clear)
        http.post("/models/load", json={"model": "a", "wait": False})
        wait_until(lambda: models(http)["a"]["status"] == "loading")
        assert_envelope(http.get("/ready"), 503, "service_unavailable")
        live.loop.call_soon_threadsafe(fleet.sources["a"].gate.set)
        wait_until(lambda: http.get("/ready").status_code == 200)
        http.post("/models/unload", json={"model": "a"})
        assert http.get("/ready").status_code == 200, "it is loaded again when it is asked for"


def test_control_routes_answer_while_a_model_loads() -> None:
    """Hazard 16: a control-plane call must never wait for the device."""
    with fleet_server() as (fleet, live), live.http(timeout=2.0) as http:
        live.loop.call_soon_threadsafe(fleet.sources["a"].gate.clear)
        http.post("/models/load", json={"model": "a", "wait": False})
        for path in ("/models", "/v1/models", "/health", "/metrics", "/"):
            assert http.get(path).status_code == 200
        assert http.post("/models/unload", json={"model": "a"}).json()["status"] == "unloaded"


def events(response: httpx.Response) -> Iterator[tuple[str, Any]]:
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def test_events_begin_with_a_snapshot_and_end_with_the_server() -> None:
    with fleet_server(keep_alive_seconds=0.05) as (_, live), live.http() as http:
        with http.stream("GET", "/models/events") as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            stream = events(response)
            name, body = next(stream)
            assert name == "snapshot" and [model["model"] for model in body["models"]] == ["a", "b"]
            assert next(stream) == ("ping", {})
            httpx.post(f"{live.url}/models/load", json={"model": "b"})
            told: list[str] = []
            for name, body in stream:
                if name == "model":
                    assert body["model"] == "b" and 0 <= body["fraction"] <= 1 and body["stage"]
                    told.append(body["status"])
                if told[-1:] == ["ready"]:
                    break
            assert told[0] == "loading"
            live.stop()
            assert {name for name, _ in stream} <= {"ping", "model"}


def test_a_listener_that_goes_is_forgotten() -> None:
    with fleet_server() as (_, live), live.http() as http:
        manager = live.app.state.manager
        with http.stream("GET", "/models/events") as response:
            stream = events(response)
            next(stream)
            assert manager.events.num_listeners == 1
        wait_until(lambda: manager.events.num_listeners == 0)


def test_loading_needs_the_admins_key_where_there_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HELEXA_API_KEY", "sesame")
    monkeypatch.setenv("HELEXA_ADMIN_KEY", "open")
    with fleet_server() as (_, live), live.http() as http:
        client, admin = {"x-api-key": "sesame"}, {"x-api-key": "open"}
        assert http.get("/models", headers=client).status_code == 200
        assert_envelope(http.get("/models"), 401, "invalid_api_key")
        for path in ("/models/load", "/models/unload"):
            assert_envelope(http.post(path, json={"model": "a"}, headers=client), 403, "permission_denied")
            assert http.post(path, json={"model": "a"}, headers=admin).status_code == 200
        assert_envelope(http.get("/models/events", headers=client), 403, "permission_denied")


def test_metrics_go_on_over_unloads_and_count_them() -> None:
    def value(http: httpx.Client, name: str, model: str = "a") -> float | None:
        for line in http.get("/metrics").text.splitlines():
            if line.startswith(f'{name}{{model_name="{model}"') and "bucket" not in line:
                return float(line.split()[-1])
        return None

    with fleet_server() as (_, live), live.http() as http:
        assert value(http, "helexa_model_up") == 0 and value(http, "vllm:generation_tokens_total") == 0
        for model in ("a", "b", "a"):
            http.post(CHAT, json={**ASK, "model": model})
        assert value(http, "vllm:e2e_request_latency_seconds_count") == 2
        assert [value(http, "helexa_model_up", model) for model in ("a", "b")] == [1, 0]
        assert [value(http, "helexa_loads_total", model) for model in ("a", "b")] == [2, 1]
        assert [value(http, "helexa_evictions_total", model) for model in ("a", "b")] == [1, 1]


def test_a_source_is_asked_for_what_it_needs_only_where_others_hold_memory() -> None:
    with fleet_server() as (fleet, live), live.http() as http:
        assert http.post("/models/load", json={"model": "a"}).status_code == 200
        assert fleet.sources["a"].plans == 0
        assert http.post("/models/load", json={"model": "b"}).status_code == 200
        assert isinstance(fleet.sources["b"], FakeSource) and fleet.sources["b"].plans == 1
