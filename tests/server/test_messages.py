"""Anthropic messages over a live server, with the real anthropic client and with bare HTTP.

Rows of contracts.md section 3 are named by the tests that hold them.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import anthropic
import httpx
import pytest

from helexa_engine.errors import ContextLengthExceeded, EngineDied, Overloaded, TemplateRenderFailed
from helexa_engine.events import Failed
from helexa_engine.testing.fake_engine import FakeEngine

from .answer_scripts import PROMPT, answer, finished, tool_answer, words
from .live import Serve, wait_until

USER: Any = [{"role": "user", "content": "Hi"}]
WEATHER: Any = {
    "name": "weather",
    "description": "Tells the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
ASK: dict[str, Any] = {"model": "fake", "max_tokens": 99, "messages": USER}


def frames(response: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    """(event name, payload) of each; every payload's type is its event's name."""
    parsed = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        payload = json.loads(data.removeprefix("data: "))
        assert name == f"event: {payload['type']}"
        parsed.append((payload["type"], payload))
    return parsed


def test_whole_answer(serve: Serve) -> None:
    """contracts.md 3: POST /v1/messages; stop_sequences, metadata and cache_control accepted."""
    engine = FakeEngine(answer())
    got = (
        serve(engine)
        .anthropic()
        .messages.create(
            **ASK,
            system="Be brief.",
            stop_sequences=["END"],
            metadata={"user_id": "someone"},
            cache_control={"type": "ephemeral"},
            extra_body={"temperature": 0.5, "top_k": 5, "top_p": 0.9, "seed": 7},  # not every major has a word for each
        )
    )
    assert [(block.type, block.text) for block in got.content] == [("text", "Hello there friend")]
    assert (got.type, got.role, got.model, got.stop_reason, got.stop_sequence) == (
        "message",
        "assistant",
        "fake",
        "end_turn",
        None,
    )
    assert got.id == f"msg_{engine.requests[0].request_id}"
    assert (got.usage.input_tokens, got.usage.cache_read_input_tokens, got.usage.output_tokens) == (3, 2, 3)
    assert got.usage.cache_creation_input_tokens == 0 and got.timings["predicted_n"] == 3
    params = engine.requests[0].sampling_params
    assert (params.max_tokens, params.stop, params.temperature, params.top_k, params.top_p, params.seed) == (
        99,
        ("END",),
        0.5,
        5,
        0.9,
        7,
    )
    assert engine.requests[0].messages == [{"role": "system", "content": "Be brief."}, *USER]


def test_stream(serve: Serve) -> None:
    """contracts.md 3: message_start carries input tokens and cache_read_input_tokens."""
    live = serve(FakeEngine(answer()))
    events = list(live.anthropic().messages.create(**ASK, stream=True))
    assert [event.type for event in events] == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * 3,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    start, end = events[0], events[-2]
    assert start.message.usage.input_tokens == 3 and start.message.usage.cache_read_input_tokens == 2
    assert start.message.content == [] and start.message.stop_reason is None and start.message.role == "assistant"
    assert "".join(event.delta.text for event in events[2:5]) == "Hello there friend"
    assert end.delta.stop_reason == "end_turn" and end.usage.output_tokens == 3
    with live.anthropic().messages.stream(**ASK) as stream:
        assert "".join(stream.text_stream) == "Hello there friend"
        final = stream.get_final_message()
    assert final.stop_reason == "end_turn" and final.usage.output_tokens == 3 and final.usage.input_tokens == 3


def test_tools_and_thinking_whole_and_streamed(serve: Serve) -> None:
    """contracts.md 3: tool_use and thinking blocks, streaming and not."""
    engine = FakeEngine(tool_answer())
    client = serve(engine).anthropic()
    ask = {**ASK, "tools": [WEATHER], "tool_choice": {"type": "any"}}
    ask["thinking"] = {"type": "enabled", "budget_tokens": 1024}
    got = client.messages.create(**ask)
    thinking, weather, clock = got.content
    assert (thinking.type, thinking.thinking) == ("thinking", "I need the weather.") and thinking.signature
    assert (weather.type, weather.id, weather.name, weather.input) == (
        "tool_use",
        "call_a",
        "weather",
        {"city": "Oslo"},
    )
    assert (clock.id, clock.input) == ("call_b", {}) and got.stop_reason == "tool_use"
    assert got.usage.output_tokens_details is not None and got.usage.output_tokens_details.thinking_tokens == 2
    request = engine.requests[0]
    assert request.tool_choice == "required" and request.chat_template_kwargs == {"enable_thinking": True}
    function = {"name": "weather", "description": "Tells the weather.", "parameters": WEATHER["input_schema"]}
    assert request.tools == [{"type": "function", "function": function}]

    with client.messages.stream(**ask) as stream:
        streamed = stream.get_final_message()
    assert streamed.content == got.content and streamed.stop_reason == "tool_use"
    starts = [event for event in client.messages.create(**ask, stream=True) if event.type == "content_block_start"]
    assert [event.index for event in starts] == [0, 1, 2] and starts[1].content_block.input == {}


def test_thinking_that_the_client_does_not_want_to_read(serve: Serve) -> None:
    client = serve(FakeEngine(tool_answer())).anthropic()
    ask = {**ASK, "thinking": {"type": "adaptive", "display": "omitted"}}
    got = client.messages.create(**ask)
    assert got.content[0].type == "thinking" and got.content[0].thinking == "" and got.content[0].signature
    with client.messages.stream(**ask) as stream:
        assert stream.get_final_message().content == got.content


def test_one_call_when_parallel_calls_are_off(serve: Serve) -> None:
    """contracts.md 3: tool_choice accepted, parallel calls off."""
    engine = FakeEngine(tool_answer())
    client = serve(engine).anthropic()
    choice = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
    ask = {**ASK, "tools": [WEATHER], "tool_choice": choice}
    got = client.messages.create(**ask)
    assert [block.type for block in got.content] == ["thinking", "tool_use"]
    assert engine.requests[0].tool_choice == {"name": "weather"}
    with client.messages.stream(**ask) as stream:
        assert stream.get_final_message().content == got.content


@pytest.mark.parametrize(
    ("end", "reason", "sequence"),
    [
        (finished(reason="length"), "max_tokens", None),
        (finished(stop_reason="END"), "stop_sequence", "END"),
        (finished(stop_reason=7), "end_turn", None),
        (finished(reason="tool_calls", stop_reason="END"), "tool_use", None),
    ],
)
def test_stop_reasons(serve: Serve, end: Any, reason: str, sequence: str | None) -> None:
    client = serve(FakeEngine([PROMPT, *words("so it"), end])).anthropic()
    got = client.messages.create(**ASK)
    assert (got.stop_reason, got.stop_sequence) == (reason, sequence)
    with client.messages.stream(**ASK) as stream:
        streamed = stream.get_final_message()
    assert (streamed.stop_reason, streamed.stop_sequence) == (reason, sequence)


def test_structured_output(serve: Serve) -> None:
    engine = FakeEngine(answer())
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    serve(engine).anthropic().messages.create(
        **ASK, output_config={"format": {"type": "json_schema", "schema": schema}}
    )
    structured = engine.requests[0].sampling_params.structured
    assert structured is not None and structured.json_schema == schema


def test_count_tokens_is_the_prompt_of_the_same_body(serve: Serve) -> None:
    """contracts.md 3: POST /v1/messages/count_tokens. The engine counts what it would compute; test_demo_over_http holds it exact."""
    live = serve(FakeEngine(answer()))
    counted = live.anthropic().messages.count_tokens(
        model="fake", messages=[{"role": "user", "content": "Hé"}], system="Be", tools=[WEATHER]
    )
    assert counted.input_tokens == len("Be\nHé".encode())
    with live.http() as http:
        got = http.post("/v1/messages/count_tokens", json={"messages": []})
    assert got.status_code == 400 and got.json()["error"]["type"] == "invalid_request_error"


# -- Errors


def assert_envelope(response: httpx.Response, status: int, kind: str, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert body["type"] == "error" and body["error"]["type"] == kind and body["error"]["message"]
    assert body["error"]["code"] == code
    return dict(body["error"])


FAILURES = [
    (
        ContextLengthExceeded(5000, 4096),
        anthropic.BadRequestError,
        "invalid_request_error",
        "prompt is too long: 5000 tokens > 4096 maximum",
    ),
    (TemplateRenderFailed("no system message"), anthropic.UnprocessableEntityError, "invalid_request_error", "no sys"),
    (Overloaded("the queue is full", 2.5), anthropic.RateLimitError, "rate_limit_error", "queue"),
    (EngineDied("the engine stopped"), anthropic.InternalServerError, "api_error", "stopped"),
]


@pytest.mark.parametrize(("error", "kind", "word", "text"), FAILURES)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_before_the_answer(serve: Serve, error: Any, kind: Any, word: str, text: str, stream: bool) -> None:
    """contracts.md 3: errors in Anthropic's envelope with its own type words."""
    with pytest.raises(kind, match=text) as caught:
        serve(FakeEngine([error])).anthropic().messages.create(**ASK, stream=stream)
    assert caught.value.type == word
    if isinstance(error, Overloaded):
        assert caught.value.response.headers["retry-after"] == "3"
    if isinstance(error, ContextLengthExceeded):
        assert caught.value.body["error"]["prompt_len"] == 5000 and caught.value.body["error"]["max"] == 4096


def test_error_in_mid_stream_is_an_error_event(serve: Serve) -> None:
    """contracts.md 3: a failure in mid-stream is an error event in that wire's own form, then the end."""
    live = serve(FakeEngine([PROMPT, *words("Hello there"), Failed(EngineDied("the engine stopped"))]))
    texts = []
    with pytest.raises(anthropic.APIStatusError, match="the engine stopped"):
        for event in live.anthropic().messages.create(**ASK, stream=True):
            texts += [event.delta.text] if event.type == "content_block_delta" else []
    assert texts == ["Hello", " there"]
    with live.http() as http:
        name, payload = frames(http.post("/v1/messages", json={**ASK, "stream": True}))[-1]
    assert name == "error" and payload["error"]["type"] == "api_error"


def test_errors_raised_before_the_wire_is_known(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """contracts.md 3: Anthropic's envelope also for what no handler of the wire sees."""
    monkeypatch.setenv("HELEXA_API_KEY", "sesame")
    live = serve(FakeEngine(answer()), max_body_bytes=2000)
    with pytest.raises(anthropic.AuthenticationError) as refused:
        live.anthropic(api_key="guess").messages.create(**ASK)
    assert refused.value.type == "authentication_error"
    assert live.anthropic(api_key="sesame").messages.create(**ASK).content, "x-api-key"
    client = anthropic.Anthropic(base_url=live.url, api_key=None, auth_token="sesame", max_retries=0)
    assert client.messages.create(**ASK).content, "bearer"
    with pytest.raises(anthropic.NotFoundError) as unknown:
        client.messages.create(**{**ASK, "model": "claude-nine"})
    assert unknown.value.type == "not_found_error"
    with pytest.raises(anthropic.NotFoundError) as nowhere:
        client.post("/v1/nowhere", cast_to=object, body={})
    assert nowhere.value.type == "not_found_error"
    with live.http(headers={"x-api-key": "sesame"}) as http:
        assert_envelope(http.get("/v1/messages"), 405, "invalid_request_error", "method_not_allowed")
        assert_envelope(http.get("/v1/messages/batches"), 404, "not_found_error", "not_found")
        long = http.post("/v1/messages", json={**ASK, "pad": "x" * 2000})
        assert_envelope(long, 413, "request_too_large", "request_too_large")
        plain = http.post("/v1/messages", content=b"{}")
        assert_envelope(plain, 415, "invalid_request_error", "unsupported_media_type")
        broken = http.post("/v1/messages", content=b"{", headers={"content-type": "application/json"})
        assert_envelope(broken, 400, "invalid_request_error", "invalid_request")
        assert http.get("/nowhere").json()["error"]["type"] == "not_found_error"
        assert "type" not in http.get("/nowhere").json(), "the others keep OpenAI's envelope"


def test_a_model_that_is_still_loading_is_overloaded(serve: Serve) -> None:
    live = serve(None, load_wait_seconds=0.05)
    with live.http() as http:
        response = http.post("/v1/messages", json=ASK)
    assert_envelope(response, 503, "overloaded_error", "service_unavailable")
    assert int(response.headers["retry-after"]) >= 1


# -- Silence and leaving


def test_silence_is_filled_with_pings(serve: Serve) -> None:
    """contracts.md 3: `event: ping` on messages; the client's own stream is not disturbed, not even before the message starts."""
    engine = FakeEngine([0.25, PROMPT, *words("so"), 0.25, *words(" it"), finished()])
    live = serve(engine, keep_alive_seconds=0.1)
    with live.http() as http:
        names = [name for name, _ in frames(http.post("/v1/messages", json={**ASK, "stream": True}))]
    start = names.index("message_start")
    assert names[:start] and set(names[:start]) == {"ping"} and "ping" in names[start:]
    with live.anthropic().messages.stream(**ASK) as stream:
        assert stream.get_final_text() == "so it"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_its_request(serve: Serve, stream: bool) -> None:
    """contracts.md 3: client gone, streaming or not."""
    engine = FakeEngine([PROMPT, *words("some words"), 60.0])
    with serve(engine).http(timeout=0.3) as http, pytest.raises(httpx.TimeoutException):
        http.post("/v1/messages", json={**ASK, "stream": stream})
    wait_until(lambda: engine.aborted == [engine.requests[0].request_id], seconds=2.0)


def test_one_log_line_a_request(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "helexa_server.requests")
    serve(FakeEngine(answer())).anthropic().messages.create(**ASK)
    wait_until(lambda: bool(caplog.records))
    (record,) = caplog.records
    assert "/v1/messages " in record.getMessage() and "prompt=5 cached=2 completion=3" in record.getMessage()
