"""What the server does around the wires: names of requests, cancelling, keys, pages, limits, slow clients, and the smaller routes.

Rows of contracts.md section 3 are named by the tests that hold them.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import anthropic
import httpx
import openai
import pytest

from helexa_engine.events import ContentDelta, Event
from helexa_engine.runtime import nvml
from helexa_engine.runtime.cuda_facts import CudaFacts
from helexa_engine.testing.fake_engine import FakeEngine
from helexa_engine.version import __version__
from helexa_server import devices, endpoints
from helexa_server.config import ServerConfig

from .answer_scripts import PROMPT, answer, finished, words
from .live import Live, Serve, wait_until
from .test_app import assert_envelope

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


# -- Prompts without an answer


def test_apply_template_and_tokenize_messages(serve: Serve) -> None:
    """contracts.md 3: POST /apply-template, /tokenize."""
    with serve(FakeEngine(answer())).http() as http_client:
        body = {"messages": [{"role": "system", "content": "Be"}, {"role": "user", "content": "hé"}]}
        assert http_client.post("/apply-template", json=body).json() == {"prompt": "Be\nhé", "count": 6}
        got = http_client.post("/tokenize", json=body).json()
        assert got == {"tokens": list("Be\nhé".encode()), "count": 6, "max_model_len": 4096}
        assert_envelope(http_client.post("/apply-template", json={}), 400, "invalid_request")
        assert_envelope(http_client.post("/tokenize", json={"messages": 3}), 400, "invalid_request")


# -- Names of requests


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("POST", CHAT, 200), ("GET", "/health", 200), ("GET", "/nowhere", 404), ("POST", "/v1/messages", 200)],
)
def test_request_ids_are_echoed(serve: Serve, method: str, path: str, status: int) -> None:
    """contracts.md 3, issue point 8: request ids echoed, on errors too; what does not fit a log line is replaced."""
    with serve(FakeEngine(answer())).http() as http_client:
        for stream in (False, True):
            body = {**ASK, "stream": stream}
            got = http_client.request(method, path, json=body, headers={"x-request-id": "mine-1"})
            assert (got.status_code, got.headers["x-request-id"], got.headers["request-id"]) == (
                status,
                "mine-1",
                "mine-1",
            )
        for bad in ("two words", "x" * 129):
            got = http_client.request(method, path, json=ASK, headers={"x-request-id": bad})
            assert got.headers["x-request-id"] not in ("", bad)


def test_without_a_name_a_request_has_that_of_its_answer(serve: Serve) -> None:
    live = serve(FakeEngine(answer()))
    with live.http() as http_client:
        got = http_client.post(CHAT, json=ASK)
    assert got.json()["id"] == f"chatcmpl-{got.headers['x-request-id']}"
    assert live.anthropic().messages.create(model="fake", max_tokens=9, **ASK)._request_id
    with pytest.raises(anthropic.NotFoundError) as caught:
        live.anthropic().messages.create(model="other", max_tokens=9, **ASK)
    assert caught.value.request_id


def test_unforeseen_errors_have_their_id_and_open_to_local_pages(serve: Serve) -> None:
    engine = FakeEngine(answer())
    engine.model_info = None
    with serve(engine).http() as http_client:
        headers = {"x-request-id": "mine", "origin": "http://localhost:3000"}
        got = http_client.get("/v1/models", headers=headers)
    assert_envelope(got, 500, "internal_error")
    assert got.headers["x-request-id"] == "mine"
    assert got.headers["access-control-allow-origin"] == "http://localhost:3000"


def test_one_log_line_for_every_request_but_probes(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """contracts.md 4, hazard 36: one line of log per request."""
    caplog.set_level(logging.INFO, "helexa_server.requests")
    with serve(FakeEngine(answer())).http(headers={"x-request-id": "mine"}) as http_client:
        for path in ("/health", "/ready", "/metrics"):
            http_client.get(path)
        http_client.get("/v1/models")
        http_client.get("/no%0Awhere")
        http_client.post(CHAT, json={})
        http_client.post(CHAT, json=ASK)
    wait_until(lambda: len(caplog.records) == 4)
    models, nowhere, refused, answered = (record.getMessage() for record in caplog.records)
    assert models.startswith("GET /v1/models id=mine status=200 seconds=0.")
    assert nowhere.startswith("GET /nowhere id=mine status=404") and "error='not_found: " in nowhere
    assert f"POST {CHAT} id=mine status=400" in refused and "error='invalid_request: " in refused
    assert "client_id=mine" in answered and "completion=3" in answered


# -- Cancelling


def cancelled(live: Live, body: dict[str, Any], name: str | None = None) -> tuple[httpx.Response, httpx.Response]:
    """(the cancelled request's answer, the canceller's) of a request that would go on for a minute, and is told to stop thinking first."""
    answers: list[httpx.Response] = []

    def ask() -> None:
        with live.http(headers={"x-request-id": "mine"}) as http_client:
            answers.append(http_client.post(CHAT, json=body))

    engine: Any = live.model.engine
    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: engine.num_running == 1)
    time.sleep(0.05)  # what the script says before it waits is under way
    request_id = engine.requests[-1].request_id
    with live.http() as http_client:
        path = f"/v1/requests/{name or 'chatcmpl-' + request_id}"
        stopped = http_client.post(f"{path}/stop-thinking")
        assert stopped.status_code == 200 and stopped.json()["stopped"] == 1
        assert engine.told_to_answer == [request_id] and not engine.aborted
        done = http_client.post(f"{path}/cancel")
    asking.join(5)
    assert not asking.is_alive() and engine.aborted == [request_id]
    return answers[0], done


@pytest.mark.parametrize("name", ["mine", None])
def test_cancel(serve: Serve, name: str | None) -> None:
    """contracts.md 3: POST /v1/requests/{id}/cancel, by the client's id or the answer's."""
    answered, done = cancelled(serve(FakeEngine([60.0])), ASK, name)
    assert_envelope(answered, 499, "request_cancelled")
    assert done.status_code == 200 and done.json()["cancelled"] == 1


def test_cancel_in_mid_stream(serve: Serve) -> None:
    """contracts.md 3: a failure in mid-stream is an error event, then the end."""
    live = serve(FakeEngine([PROMPT, *words("some words"), 60.0]))
    answered, _ = cancelled(live, {**ASK, "stream": True}, "mine")
    *_, last = answered.text.strip().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_cancelled"
    with live.http() as http_client:
        for what in ("cancel", "stop-thinking"):
            assert_envelope(http_client.post(f"/v1/requests/mine/{what}"), 404, "request_not_found")
    assert len(live.app.state.running) == 0


def test_only_its_own_key_or_the_admin_cancels_a_request(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, live = keyed(serve, tmp_path, monkeypatch, [60.0])
    for who in ("sesame", "open"):
        aborted = len(engine.aborted)

        def ask() -> None:
            with live.http(headers={"x-api-key": "sesame", "x-request-id": "mine"}) as http_client:
                http_client.post(CHAT, json=ASK)

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: engine.num_running == 1)
        with live.http() as http_client:
            other = http_client.post("/v1/requests/mine/cancel", headers={"x-api-key": "poppy"})
            assert_envelope(other, 404, "request_not_found")
            mine = http_client.post("/v1/requests/mine/cancel", headers={"x-api-key": who})
        asking.join(5)
        assert mine.status_code == 200 and len(engine.aborted) == aborted + 1


# -- Keys


def keyed(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: list[Any]) -> tuple[FakeEngine, Live]:
    """A server with two keys for clients, sesame and poppy, and the admin key open."""
    for name in ("HELEXA_API_KEY", "HELEXA_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    files = {"api_key_file": "# two\nsesame\npoppy\n", "admin_key_file": "open\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    engine = FakeEngine(script)
    return engine, serve(engine, **{name: str(tmp_path / name) for name in files})


def test_a_file_of_keys_and_an_admin_key(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """contracts.md 3: no key or a bad key is 401 invalid_api_key. Issue point 7: an admin key for lifecycle routes."""
    _, live = keyed(serve, tmp_path, monkeypatch, answer())
    with live.http() as http_client:

        def status(path: str, key: str) -> int:
            return http_client.get(path, headers={"authorization": f"Bearer {key}"}).status_code

        assert [status("/v1/models", key) for key in ("sesame", "poppy", "open")] == [200] * 3
        for path in ("/v1/models", "/models/load"):
            for headers in ({}, {"x-api-key": "guess"}, {"authorization": "Basic sesame"}):
                assert_envelope(http_client.get(path, headers=headers), 401, "invalid_api_key")
        denied = http_client.post("/models/load", json={}, headers={"x-api-key": "sesame"})
        assert assert_envelope(denied, 403, "permission_denied")["type"] == "permission_error"
        allowed = http_client.post("/models/load", json={}, headers={"x-api-key": "open"})
        assert allowed.status_code not in (401, 403)


def test_an_admin_key_alone_leaves_clients_open(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELEXA_ADMIN_KEY", "open")
    with serve(FakeEngine(answer())).http() as http_client:
        assert http_client.post(CHAT, json=ASK).status_code == 200
        assert http_client.post(CHAT, json=ASK, headers={"x-api-key": "any"}).status_code == 200
        assert_envelope(http_client.get("/models/load"), 401, "invalid_api_key")
        assert http_client.get("/models/load", headers={"x-api-key": "open"}).status_code not in (401, 403)


# -- Pages


@pytest.mark.parametrize("origin", ["http://localhost:3000", "https://127.0.0.1", "http://[::1]:5173"])
def test_local_pages_may_ask(serve: Serve, monkeypatch: pytest.MonkeyPatch, origin: str) -> None:
    """Issue point 7: CORS for localhost. A preflight carries no key."""
    monkeypatch.setenv("HELEXA_API_KEY", "sesame")
    with serve(FakeEngine(answer())).http(headers={"origin": origin}) as http_client:
        asked = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        preflight = http_client.options(CHAT, headers=asked)
        assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == origin
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        refused = http_client.post(CHAT, json=ASK)
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == origin
        got = http_client.post(CHAT, json=ASK, headers={"x-api-key": "sesame"})
        assert got.status_code == 200 and "x-request-id" in got.headers["access-control-expose-headers"]


@pytest.mark.parametrize(
    "origin", ["https://example.org", "http://localhost.example.org", "http://127.0.0.1.evil", "null"]
)
def test_other_pages_may_not(serve: Serve, origin: str) -> None:
    with serve(FakeEngine(answer())).http(headers={"origin": origin}) as http_client:
        preflight = http_client.options(CHAT, headers={"access-control-request-method": "POST"})
        assert preflight.status_code == 400 and "access-control-allow-origin" not in preflight.headers
        assert "access-control-allow-origin" not in http_client.get("/v1/models").headers


# -- Limits


def raw(live: Live, data: bytes) -> tuple[int, dict[str, Any]]:
    """Status and body of whatever answers ``data`` on a fresh connection."""
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(data)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.headers["content-type"] == "application/json"
        return response.status, json.loads(response.read())


def test_headers_have_a_limit(serve: Serve) -> None:
    """Issue point 7: header size limits; hazard 39: also what no handler sees has the envelope."""
    live = serve(FakeEngine(answer()), max_header_bytes=2000)
    with live.http() as http_client:
        assert http_client.get("/health", headers={"x-pad": "x" * 1000}).status_code == 200
    status, body = raw(live, b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-pad: " + b"x" * 3000)
    assert (status, body["error"]["code"]) == (431, "headers_too_large")
    status, body = raw(live, b"GET /" + b"x" * 3000)
    assert (status, body["error"]["code"]) == (431, "headers_too_large")
    status, body = raw(live, b"\x16\x03\x01 this is no HTTP\r\n\r\n")
    assert (status, body["error"]["code"]) == (400, "invalid_http")


def test_a_body_that_lies_about_its_length_has_the_same_limit(serve: Serve) -> None:
    """Issue point 7: body size limits, for chunked bodies too."""
    live = serve(FakeEngine(answer()), max_body_bytes=2000)

    def chunks() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 100

    with live.http() as http_client:
        got = http_client.post(CHAT, content=chunks(), headers={"content-type": "application/json"})
    assert_envelope(got, 413, "request_too_large")


def test_a_client_that_reads_nothing_is_bounded_and_then_left(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """Issue point 7: slow-client back-pressure that is bounded: the engine waits, and after stall_seconds it is free."""
    caplog.set_level(logging.INFO, "helexa_server.requests")
    produced = 0

    def endless(request: Any) -> Iterator[Event]:
        nonlocal produced
        yield PROMPT
        while True:
            produced += 1
            yield ContentDelta(0, "x" * 8192, (1,))

    engine = FakeEngine(endless)  # type: ignore[arg-type]
    live = serve(engine, stall_seconds=0.4)
    body = json.dumps({**ASK, "stream": True}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(head.encode() + body)
        wait_until(lambda: engine.num_running == 1)
        with live.http() as http_client:  # meanwhile the others are served
            assert http_client.get("/health").status_code == 200
        wait_until(lambda: len(engine.aborted) == 1, seconds=10)
    in_the_kernel = 16 * 2**20 // 8192  # both ends' socket buffers, at their largest
    assert produced < endpoints.MAX_BACKLOG + in_the_kernel
    wait_until(lambda: any("client=gone" in record.getMessage() for record in caplog.records))


def test_a_client_that_reads_slowly_gets_everything(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "MAX_BACKLOG", 2)
    engine = FakeEngine([PROMPT, *words(" ".join("x" * 500)), finished()])
    with serve(engine).http().stream("POST", CHAT, json={**ASK, "stream": True}) as response:
        text = ""
        for chunk in response.iter_text(64):
            text += chunk
            time.sleep(0.0001)
    assert text.count('"content":"') == 500 and text.endswith("data: [DONE]\n\n") and not engine.aborted


def test_a_stream_outlasts_every_timeout(serve: Serve) -> None:
    """contracts.md 3: never a total timeout."""
    script = [PROMPT, *[step for word in words("a b c d e f") for step in (0.15, word)], finished()]
    live = serve(FakeEngine(script), load_wait_seconds=0.1, stall_seconds=0.2, keep_alive_seconds=0.1)
    with live.http(timeout=0.5) as http_client:
        whole = http_client.post(CHAT, json={**ASK, "stream": True}).text
    assert whole.count('"content":"') == 6 and whole.endswith("data: [DONE]\n\n")


# -- The smaller routes


def test_embeddings_are_not_implemented_and_not_repeated(serve: Serve) -> None:
    """contracts.md 3: /v1/embeddings answers 501 with the envelope where the model can't."""
    live = serve(FakeEngine(answer()))
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=3)
    started = time.monotonic()
    with pytest.raises(openai.InternalServerError) as caught:
        client.embeddings.create(model="fake", input="x")
    assert caught.value.status_code == 501 and caught.value.code == "embeddings_unsupported"
    assert time.monotonic() - started < 0.4, "the client repeated what can never be"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="other", input="x")


def test_models_in_the_words_of_both(serve: Serve) -> None:
    """contracts.md 3: GET /v1/models[/{id}] with limit and capabilities."""
    live = serve(FakeEngine(answer()))
    (ours,) = live.openai().models.list().data
    (theirs,) = live.anthropic().models.list().data
    assert ours.id == theirs.id == "fake" and theirs.display_name == "fake" and theirs.type == "model"
    assert ours.limit == {"context": 4096, "input": 4095, "output": 4095} and ours.capabilities["tools"] is True
    assert live.anthropic().models.retrieve("fake").created_at.timestamp() == ours.created


H100 = nvml.Card(0, "NVIDIA H100", (9, 0), 80 << 30, 79 << 30)
NEW_DRIVER = nvml.Driver("580.95.05", 13000)


def told(monkeypatch: pytest.MonkeyPatch, cards: list[nvml.Card] | nvml.NoDriver, **build: Any) -> None:
    """Lets NVML tell of these cards, and a build with all there is that CUDA needs, but for what ``build`` says otherwise."""

    def read() -> tuple[nvml.Driver, list[nvml.Card]]:
        if isinstance(cards, nvml.NoDriver):
            raise cards
        return NEW_DRIVER, cards

    good = CudaFacts(True, ("80", "90a"), 13000, torch="2.11.0+cu130", torch_cuda="13.0")
    monkeypatch.setattr(devices.nvml, "read", read)
    monkeypatch.setattr(devices, "build_facts", lambda: replace(good, **build))
    monkeypatch.setattr(devices.typing, "get_type_hints", lambda config: {"device": Literal["auto", "cpu", "cuda"]})


def test_discovery(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """contracts.md 3: GET /discovery: host, devices, driver, why CUDA is unusable."""
    with serve(FakeEngine(answer())).http() as http_client:
        told(monkeypatch, nvml.NoDriver("there is no NVIDIA driver here"))
        got = http_client.get("/discovery").json()
        assert got["version"] == __version__ and got["host"]["system"] and got["driver"] is None
        (cpu,) = got["devices"]
        assert cpu["kind"] == "cpu" and cpu["cpus"] >= 1 and cpu["memory_bytes"] > 2**20
        assert not got["cuda"]["usable"] and got["cuda"]["reason"].startswith("there is no NVIDIA driver here")
        assert got["seconds_old"] == 0.0

        told(monkeypatch, [H100])
        got = http_client.get("/discovery").json()
        assert got["driver"] == {"version": "580.95.05", "cuda_version": "13.0"}
        assert got["devices"][1] == {
            "kind": "cuda", "index": 0, "name": "NVIDIA H100", "compute_capability": "9.0", "memory_bytes": 80 << 30,
            "free_bytes": 79 << 30,
        }  # fmt: skip
        assert got["cuda"] == {"usable": True, "reason": None}


@pytest.mark.parametrize(
    ("cards", "build", "hidden", "words"),
    [
        ([], {}, None, "no device"),
        ([H100], {}, "-1", "no device"),
        ([H100], {"kernels": False}, None, "no CUDA kernels"),
        ([H100], {"torch_cuda": None}, None, "built without CUDA"),
        ([replace(H100, capability=(10, 0))], {}, None, "none of which"),
    ],
)
def test_why_cuda_cannot_be_used_is_said(
    monkeypatch: pytest.MonkeyPatch, cards: list[nvml.Card], build: dict[str, Any], hidden: str | None, words: str
) -> None:
    told(monkeypatch, cards, **build)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    found = devices.describe()
    assert len(found["devices"]) == 1 + len(cards)
    assert not found["cuda"]["usable"] and words in found["cuda"]["reason"]


def test_a_host_without_a_driver_says_so() -> None:
    with pytest.raises(nvml.NoDriver, match="libnothing.so.1"):
        nvml.read("libnothing.so.1")


def test_a_driver_that_hangs_is_not_waited_for() -> None:
    async def work() -> None:
        answers, released = [{"cuda": "first"}, {"cuda": "second"}], threading.Event()

        def describe() -> dict[str, Any]:
            if len(answers) == 1:
                released.wait(10)
            return answers.pop(0)

        known = devices.Devices(describe)
        assert (await known.figures(5.0))["cuda"] == "first"
        old = await known.figures(0.05)
        assert old["cuda"] == "first" and old["seconds_old"] >= 0.0
        released.set()
        assert (await known.figures(5.0))["cuda"] == "second", "the reading that hung came to its end"

        silent = devices.Devices(lambda: time.sleep(0.3) or {})
        found = await silent.figures(0.01)
        assert found["seconds_old"] is None and "does not answer" in found["cuda"]["reason"]

    asyncio.run(work())


# -- Names of the server


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8080", 200),
        ("LOCALHOST.", 200),
        ("helexa.localhost:80", 200),
        ("127.0.0.1", 200),
        ("[::1]:8080", 200),
        ("192.168.1.4:8080", 200),
        ("evil.example", 403),
        ("evil.example:8080", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("evillocalhost", 403),
    ],
)
def test_a_page_of_another_name_is_refused(serve: Serve, host: str, status: int) -> None:
    """DNS rebinding: a site whose name resolves to this machine; on every route, in the wire's own envelope."""
    with serve(FakeEngine(answer())).http(headers={"host": host}) as http_client:
        for path in ("/health", "/", "/v1/models"):
            got = http_client.get(path)
            assert got.status_code == status
        got = http_client.post("/v1/messages", json={**ASK, "max_tokens": 9})
        assert got.status_code == status
        if status == 403:
            assert got.json()["type"] == "error" and got.json()["error"]["type"] == "permission_error"
            assert_envelope(http_client.post(CHAT, json=ASK), 403, "host_not_allowed")
            assert "--allowed-hosts" in http_client.post(CHAT, json=ASK).text


def test_names_behind_a_proxy_are_configured(serve: Serve) -> None:
    engine = FakeEngine(answer())
    for allowed, host, status in (
        ("llm.example, other.example", "llm.example", 200),
        ("llm.example, Other.example", "other.EXAMPLE:443", 200),
        ("llm.example", "localhost", 200),
        ("llm.example", "evil.example", 403),
        ("*", "evil.example", 200),
    ):
        with serve(engine, allowed_hosts=allowed).http(headers={"host": host}) as http_client:
            assert http_client.get("/health").status_code == status


def test_beyond_loopback_any_name_will_do() -> None:
    """Who listens there is called by names that the server cannot know, and asks for a key."""
    assert ServerConfig(host="0.0.0.0").host_names() is None
    assert ServerConfig(host="0.0.0.0", allowed_hosts="box.lan").host_names() == {"box.lan", "0.0.0.0", "localhost"}
    assert ServerConfig(host="127.8.8.8").host_names() == {"127.8.8.8", "localhost"}


def test_without_a_host_there_is_no_browser(serve: Serve) -> None:
    live = serve(FakeEngine(answer()))
    with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert b" 200 OK" in connection.recv(4096)
