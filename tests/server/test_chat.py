"""Chat completions over a live server, with the real openai client and with bare HTTP."""

from __future__ import annotations

import json
import logging
from typing import Any

import openai
import pytest

from helexa_engine.errors import ContextLengthExceeded, EngineDied, Overloaded, TemplateRenderFailed
from helexa_engine.events import ContentDelta, Failed
from helexa_engine.testing.fake_engine import FakeEngine

from .answer_scripts import PROMPT, answer, finished, tool_answer, words
from .live import Serve, wait_until

USER = [{"role": "user", "content": "Hi"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def test_whole_answer(serve: Serve) -> None:
    engine = FakeEngine(answer())
    got = (
        serve(engine)
        .openai()
        .chat.completions.create(model="fake", messages=USER, temperature=0, max_tokens=9, stop="END", seed=7)
    )
    assert got.choices[0].message.content == "Hello there friend"
    assert got.choices[0].message.role == "assistant"
    assert got.choices[0].finish_reason == "stop"
    assert got.id.startswith("chatcmpl-") and got.model == "fake" and got.object == "chat.completion"
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (5, 3, 8)
    assert got.usage.prompt_tokens_details.cached_tokens == 2
    assert got.usage.completion_tokens_details.reasoning_tokens == 0
    assert got.timings["prompt_n"] == 3 and got.timings["predicted_per_second"] == 100.0
    params = engine.requests[0].sampling_params
    assert (params.temperature, params.max_tokens, params.stop, params.seed) == (0, 9, ("END",), 7)
    assert engine.requests[0].messages == USER


def test_stream(serve: Serve) -> None:
    chunks = list(
        serve(FakeEngine(answer()))
        .openai()
        .chat.completions.create(model="fake", messages=USER, stream=True, stream_options={"include_usage": True})
    )
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
    first = chunks[0].choices[0].delta
    assert (first.role, first.content) == ("assistant", "Hello")
    assert all(c.choices[0].delta.role is None for c in chunks[1:-1])
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "Hello there friend"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None, None, None, "stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == 8
    assert chunks[-1].timings["predicted_n"] == 3
    assert all(c.usage is None for c in chunks[:-1])


def test_stream_without_usage_ends_with_timings_then_done(serve: Serve) -> None:
    with serve(FakeEngine(answer())).http() as http:
        got = http.post("/v1/chat/completions", json={"messages": USER, "stream": True})
    assert got.headers["content-type"].startswith("text/event-stream")
    frames = got.text.removesuffix("\n\n").split("\n\n")
    assert frames[-1] == "data: [DONE]"
    last = json.loads(frames[-2].removeprefix("data: "))
    assert last["choices"][0]["finish_reason"] == "stop" and last["timings"]["cache_n"] == 2
    assert "usage" not in last


def test_empty_answer_still_has_a_role(serve: Serve) -> None:
    chunks = list(
        serve(FakeEngine([PROMPT, finished(tokens=1)]))
        .openai()
        .chat.completions.create(model="fake", messages=USER, stream=True)
    )
    assert len(chunks) == 1 and chunks[0].choices[0].delta.role == "assistant"


def test_tools_and_reasoning(serve: Serve) -> None:
    engine = FakeEngine(tool_answer())
    client = serve(engine).openai()
    ask = {"model": "fake", "messages": USER, "tools": [WEATHER], "tool_choice": "required"}
    whole = client.chat.completions.create(**ask).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    assert whole.message.reasoning_content == "I need the weather."
    assert [(c.id, c.function.name, c.function.arguments) for c in whole.message.tool_calls] == [
        ("call_a", "weather", '{"city": "Oslo"}'),
        ("call_b", "clock", "{}"),
    ]
    assert engine.requests[0].tools == [WEATHER] and engine.requests[0].tool_choice == "required"

    deltas = [c.choices[0].delta for c in client.chat.completions.create(**ask, stream=True)]
    assert deltas[0].role == "assistant" and deltas[0].reasoning_content == "I need "
    calls = [d.tool_calls[0] for d in deltas if d.tool_calls]
    assert [(c.index, c.id, c.type, c.function.name, c.function.arguments) for c in calls] == [
        (0, "call_a", "function", "weather", ""),
        (0, None, None, None, '{"city": '),
        (0, None, None, None, '"Oslo"}'),
        (1, "call_b", "function", "clock", ""),
        (1, None, None, None, "{}"),
    ]


def test_one_call_when_parallel_calls_are_off(serve: Serve) -> None:
    client = serve(FakeEngine(tool_answer())).openai()
    ask = {"model": "fake", "messages": USER, "tools": [WEATHER], "parallel_tool_calls": False}
    assert len(client.chat.completions.create(**ask).choices[0].message.tool_calls) == 1
    deltas = [c.choices[0].delta for c in client.chat.completions.create(**ask, stream=True)]
    assert {call.index for d in deltas for call in d.tool_calls or ()} == {0}


def test_logprobs(serve: Serve) -> None:
    client = serve(FakeEngine(answer(logprobs=True))).openai()
    ask = {"model": "fake", "messages": USER, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**ask).choices[0].logprobs.content
    assert [item.token for item in whole] == ["Hello", " there", " friend"]
    assert whole[1].bytes == list(b" there") and whole[1].logprob == -0.5
    assert [alternative.logprob for alternative in whole[0].top_logprobs] == [-0.5, -9999.0]
    streamed = [
        item for c in client.chat.completions.create(**ask, stream=True) for item in c.choices[0].logprobs.content
    ]
    assert streamed == whole


def test_several_answers(serve: Serve) -> None:
    script = [PROMPT, *words("one a", 0), *words("two b", 1), finished(1, 2), finished(0, 2)]
    client = serve(FakeEngine(script)).openai()
    whole = client.chat.completions.create(model="fake", messages=USER, n=2)
    assert [choice.message.content for choice in whole.choices] == ["one a", "two b"]
    assert whole.usage.prompt_tokens == 5 and whole.usage.completion_tokens == 4
    joined = ["", ""]
    roles = [0, 0]
    for chunk in client.chat.completions.create(model="fake", messages=USER, n=2, stream=True):
        choice = chunk.choices[0]
        joined[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role is not None
    assert joined == ["one a", "two b"] and roles == [1, 1]


FAILURES = [
    (ContextLengthExceeded(5000, 4096), openai.BadRequestError, "context_length_exceeded"),
    (TemplateRenderFailed("no system message here"), openai.UnprocessableEntityError, "template_render_failed"),
    (Overloaded("the queue is full", 2.5), openai.RateLimitError, "rate_limit_exceeded"),
    (EngineDied("the engine stopped"), openai.InternalServerError, "engine_died"),
]


@pytest.mark.parametrize(
    ("step", "kind", "code"),
    [
        *FAILURES,
        *[(Failed(error), kind, code) for error, kind, code in FAILURES],
        (ZeroDivisionError("secret detail"), openai.InternalServerError, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_error_before_the_first_token_has_its_status(
    serve: Serve, step: Any, kind: type[openai.APIStatusError], code: str, stream: bool
) -> None:
    client = serve(FakeEngine([step])).openai()
    with pytest.raises(kind) as caught:
        client.chat.completions.create(model="fake", messages=USER, stream=stream)
    assert caught.value.code == code
    assert "secret" not in str(caught.value)
    if code == "context_length_exceeded":
        assert "prompt is too long: 5000 tokens > 4096 maximum" in caught.value.message
        assert caught.value.body["prompt_len"] == 5000 and caught.value.body["max"] == 4096
    if code == "rate_limit_exceeded":
        assert caught.value.response.headers["retry-after"] == "3"


def test_error_in_mid_stream_is_an_error_event(serve: Serve) -> None:
    live = serve(FakeEngine([PROMPT, *words("Hello there"), Failed(EngineDied("the engine stopped"))]))
    texts = []
    with pytest.raises(openai.APIError, match="the engine stopped"):
        for chunk in live.openai().chat.completions.create(model="fake", messages=USER, stream=True):
            texts.append(chunk.choices[0].delta.content)
    assert texts == ["Hello", " there"]
    with live.http() as http:
        frames = http.post("/v1/chat/completions", json={"messages": USER, "stream": True}).text.strip().split("\n\n")
    assert json.loads(frames[-1].removeprefix("data: "))["error"]["code"] == "engine_died"


def test_unknown_model(serve: Serve) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        serve(FakeEngine(answer())).openai().chat.completions.create(model="gpt-9", messages=USER)
    assert caught.value.code == "model_not_found" and "this server has fake" in caught.value.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"stop": ["x"] * 10_000}, "stop"),
        ({"temperature": "hot"}, "temperature"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ],
)
def test_bad_parameter_names_its_path(serve: Serve, fields: dict[str, object], param: str) -> None:
    engine = FakeEngine(answer())
    with pytest.raises(openai.BadRequestError) as caught:
        serve(engine).openai().chat.completions.create(**{"model": "fake", "messages": USER, **fields})
    assert (caught.value.code, caught.value.param) == ("invalid_request", param)
    assert not engine.requests


def test_silence_is_filled_with_empty_chunks(serve: Serve) -> None:
    engine = FakeEngine([PROMPT, 0.35, *words("late"), finished()])
    live = serve(engine, keep_alive_seconds=0.1)
    chunks = list(live.openai().chat.completions.create(model="fake", messages=USER, stream=True))
    silent = [c for c in chunks if c.choices[0].delta.model_dump(exclude_none=True) == {}]
    assert len(silent) >= 3 and silent[0] is chunks[0]
    spoken = [c.choices[0].delta for c in chunks if c.choices[0].delta.content]
    assert [(d.role, d.content) for d in spoken] == [("assistant", "late")]
    assert not engine.aborted


@pytest.mark.parametrize("steps", [[60.0], [PROMPT, 60.0], [PROMPT, *words("some words"), 60.0]])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_its_request(
    serve: Serve, caplog: pytest.LogCaptureFixture, steps: list[object], stream: bool
) -> None:
    """In the queue, in the prompt and in the answer; without a byte sent in between that would find out."""
    caplog.set_level(logging.INFO, "helexa_server.requests")
    engine = FakeEngine(steps)
    with serve(engine).http(timeout=0.3) as http, pytest.raises(Exception, match="timed out"):
        http.post("/v1/chat/completions", json={"messages": USER, "stream": stream})
    wait_until(lambda: engine.aborted == [engine.requests[0].request_id], seconds=2.0)
    wait_until(lambda: any("client=gone" in record.message for record in caplog.records))


def test_a_client_that_stops_reading_in_the_middle_aborts(serve: Serve) -> None:
    endless = [step for i in range(3000) for step in (0.002, ContentDelta(0, "word ", (i,)))]
    engine = FakeEngine([PROMPT, *endless])
    stream = serve(engine).openai().chat.completions.create(model="fake", messages=USER, stream=True)
    assert next(iter(stream)).choices[0].delta.content == "word "
    stream.close()
    wait_until(lambda: engine.aborted == [engine.requests[0].request_id], seconds=2.0)


def test_one_log_line_a_request(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "helexa_server")
    engine = FakeEngine(answer())
    serve(engine).openai().chat.completions.create(model="fake", messages=USER)
    wait_until(lambda: bool(caplog.records))
    (line,) = [record.getMessage() for record in caplog.records if record.name == "helexa_server.requests"]
    assert engine.requests[0].request_id in line
    for part in ("prompt=5", "cached=2", "completion=3", "reason=stop", "client=here"):
        assert part in line
