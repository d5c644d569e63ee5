"""The server around the wires: envelopes, models, loading, keys, tokens."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import httpx
import openai
import pytest

from helexa_engine.errors import InvalidRequest, ModelDoesNotFit
from helexa_engine.events import Event
from helexa_engine.generate_request import GenerateRequest
from helexa_engine.sampling_params import SamplingParams
from helexa_engine.testing.fake_engine import FakeEngine
from helexa_engine.version import __version__
from helexa_server.app import create_app
from helexa_server.config import ServerConfig
from helexa_server.lifecycle.catalogue import model_name
from helexa_server.served_model import ServedModel

from .answer_scripts import PROMPT, answer, words
from .live import Serve, wait_until

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "Hi"}]}


def assert_envelope(response: httpx.Response, status: int, code: str) -> dict[str, object]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error["code"] == code and error["message"] and error["type"] and "param" in error
    return error


def test_every_error_is_the_envelope(serve: Serve) -> None:
    as_json = {"content-type": "application/json"}
    with serve(FakeEngine(answer()), max_body_bytes=2000).http() as http:
        assert_envelope(http.get("/nowhere"), 404, "not_found")
        assert "POST" in http.get(CHAT).headers["allow"]
        assert_envelope(http.get(CHAT), 405, "method_not_allowed")
        assert_envelope(http.post("/health"), 405, "method_not_allowed")
        assert_envelope(http.post(CHAT, content=b"{}"), 415, "unsupported_media_type")
        assert_envelope(http.post(CHAT, data={"a": "b"}), 415, "unsupported_media_type")
        error = assert_envelope(http.post(CHAT, content=b"x" * 2001, headers=as_json), 413, "request_too_large")
        assert error["max_bytes"] == 2000
        for body in (b"", b"{", b'{"messages": NaN}', b'\xff\xfe{"a": 1}', b'{"model": "\xff", "messages": []}'):
            error = assert_envelope(http.post(CHAT, content=body, headers=as_json), 400, "invalid_request")
            assert error["param"] == "body"
        for body in (b"[]", b'"x"', b"null", b"[" * 1500):
            assert_envelope(http.post(CHAT, content=body, headers=as_json), 400, "invalid_request")
        assert assert_envelope(http.post(CHAT, json={}), 400, "invalid_request")["param"] == "messages"
        assert http.post(CHAT, json=ASK).status_code == 200, "and the server is as it was"


def test_charset_in_the_content_type_is_fine(serve: Serve) -> None:
    with serve(FakeEngine(answer())).http(headers={"content-type": "Application/JSON; charset=utf-8"}) as http:
        assert http.post(CHAT, json=ASK).status_code == 200


def test_models_and_version(serve: Serve) -> None:
    live = serve(FakeEngine(answer()))
    client = live.openai()
    (model,) = client.models.list().data
    assert model.id == "fake" and model.max_model_len == 4096 and model.limit["context"] == 4096
    assert client.models.retrieve("fake").id == "fake"
    assert client.get("models/", cast_to=httpx.Response).json()["object"] == "list"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found"
    with live.http() as http:
        assert http.get("/version").json() == {"name": "helexa", "version": __version__}
        assert http.get("/health").status_code == 200 and http.get("/ready").status_code == 200


def test_tokenize_and_detokenize(serve: Serve) -> None:
    with serve(FakeEngine(answer())).http() as http:
        for name in ("prompt", "content"):
            got = http.post("/tokenize", json={name: "hé"}).json()
            assert got == {"tokens": list("hé".encode()), "count": 3, "max_model_len": 4096}
        assert http.post("/detokenize", json={"tokens": got["tokens"]}).json() == {"prompt": "hé", "content": "hé"}
        assert assert_envelope(http.post("/tokenize", json={}), 400, "invalid_request")["param"] == "prompt"
        assert assert_envelope(http.post("/detokenize", json={}), 400, "invalid_request")["param"] == "tokens"
        for bad in (-1, 256):
            error = assert_envelope(http.post("/detokenize", json={"tokens": [1, bad]}), 400, "invalid_request")
            assert error["param"] == "tokens[1]"
        error = assert_envelope(http.post("/detokenize", json={"tokens": ["a"]}), 400, "invalid_request")
        assert error["param"].startswith("tokens[")


def test_while_loading(serve: Serve) -> None:
    live = serve(None, load_wait_seconds=0.2)
    with live.http() as http:
        assert http.get("/health").status_code == 200
        assert_envelope(http.get("/ready"), 503, "service_unavailable")
        assert int(http.get("/ready").headers["retry-after"]) >= 1
        assert http.get("/v1/models").json()["data"][0]["status"] == "loading"
        for stream in (False, True):
            response = http.post(CHAT, json={**ASK, "stream": stream})
            assert_envelope(response, 503, "service_unavailable")
            assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_waits_for_the_load(serve: Serve, stream: bool) -> None:
    """The stream keeps alive meanwhile."""
    live = serve(None, keep_alive_seconds=0.05)
    answers: list[str] = []

    def ask() -> None:
        with live.http() as http:
            answers.append(http.post(CHAT, json={**ASK, "stream": stream}).text)

    asking = threading.Thread(target=ask)
    asking.start()
    with live.http() as http:
        for _ in range(3):  # meanwhile the server goes on answering
            assert http.get("/health").status_code == 200
    asking.join(0.3)
    assert asking.is_alive()
    live.loop.call_soon_threadsafe(live.model.life.loaded, FakeEngine(answer("ready now")))
    asking.join(5)
    assert "ready" in answers[0] and "error" not in answers[0]
    assert answers[0].count('"delta":{},"finish_reason":null') >= 3 if stream else True


def test_a_load_that_failed_is_told(serve: Serve) -> None:
    live = serve(None)
    live.loop.call_soon_threadsafe(live.model.life.failed, ModelDoesNotFit(2**31, 2**30, "cpu"))
    with live.http() as http:
        error = assert_envelope(http.post(CHAT, json=ASK), 422, "model_does_not_fit")
    assert (error["needed_bytes"], error["free_bytes"], error["device"]) == (2**31, 2**30, "cpu")


def test_api_key(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELEXA_API_KEY", "sesame")
    live = serve(FakeEngine(answer()))
    assert live.openai(api_key="sesame").chat.completions.create(model="fake", **ASK).choices
    with pytest.raises(openai.AuthenticationError) as caught:
        live.openai(api_key="guess").chat.completions.create(model="fake", **ASK)
    assert caught.value.code == "invalid_api_key" and "sesame" not in str(caught.value)
    with live.http() as http:
        assert http.get("/v1/models", headers={"x-api-key": "sesame"}).status_code == 200
        for path in ("/v1/models", "/version", "/nowhere"):
            response = http.get(path)
            assert_envelope(response, 401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        assert http.get("/health").status_code == 200 and http.get("/ready").status_code == 200


def test_unforeseen_errors_keep_the_envelope_and_their_detail(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(answer())
    engine.model_info = None
    with serve(engine).http() as http:
        response = http.get("/v1/models")
    error = assert_envelope(response, 500, "internal_error")
    assert "NoneType" not in str(error)


def test_two_models_are_told_apart(serve: Serve) -> None:
    live = serve(FakeEngine(answer("from the first")))
    other = ServedModel("other")
    other.life.loaded(FakeEngine(answer("from the other")))
    app = create_app([live.model, other], ServerConfig())
    assert [model.id for model in app.state.models] == ["fake", "other"]
    assert app.state.models.find("other") is other
    with pytest.raises(InvalidRequest, match="fake, other"):
        app.state.models.find(None)
    with pytest.raises(InvalidRequest, match="same name"):
        create_app([live.model, ServedModel("fake")], ServerConfig())


def test_model_names(tmp_path: object) -> None:
    assert model_name("demo") == "demo"
    assert model_name("/models/Qwen3-0.6B-Q8_0.gguf") == "Qwen3-0.6B-Q8_0"
    assert model_name("org/name") == "org/name"
    assert model_name(f"{tmp_path}/") == str(tmp_path).rsplit("/", 1)[-1]


@pytest.mark.parametrize(("stream", "steps"), [(False, []), (True, []), (True, [PROMPT, *words("some words")])])
def test_shutdown_is_bounded_and_says_so(serve: Serve, stream: bool, steps: list[Event]) -> None:
    """What still runs after the grace period is aborted: 503, or an error event where the stream has begun."""
    engine = FakeEngine([*steps, 60.0])
    live = serve(engine, shutdown_seconds=0.0)
    answers: list[httpx.Response] = []

    def ask() -> None:
        with live.http() as http:
            answers.append(http.post(CHAT, json={**ASK, "stream": stream}))

    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: engine.num_running == 1)
    live.stop()
    asking.join(5)
    assert not asking.is_alive() and len(engine.aborted) == 1
    if steps:
        *_, last = answers[0].text.strip().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "service_unavailable"
    else:
        assert_envelope(answers[0], 503, "service_unavailable")


def test_importing_the_server_brings_no_torch() -> None:
    code = "import sys, helexa_server.app; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sampling_defaults_of_a_model_fill_what_requests_leave_open() -> None:
    model = ServedModel("fake", {"temperature": 0.2, "top_k": 5})
    given = model.with_defaults(GenerateRequest(prompt="x", sampling_params=SamplingParams(temperature=1.0, top_p=0.5)))
    params = given.sampling_params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 0.5, 5, None)
    request = GenerateRequest(prompt="x")
    assert ServedModel("fake").with_defaults(request) is request


def test_sampling_defaults_reach_the_engine(serve: Serve) -> None:
    engine = FakeEngine(answer())
    live = serve(engine)
    live.model.sampling["temperature"] = 0.25
    live.openai().chat.completions.create(model="fake", **ASK)
    assert engine.requests[0].sampling_params.temperature == 0.25
