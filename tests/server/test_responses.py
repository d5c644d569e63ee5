"""Responses over a live server, with the real openai client and with bare HTTP.

Rows of contracts.md section 3 are named by the tests that hold them.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pydantic
import pytest

from helexa_engine.errors import ContextLengthExceeded, EngineDied
from helexa_engine.events import Failed
from helexa_engine.testing.fake_engine import FakeEngine

from .answer_scripts import PROMPT, answer, finished, tool_answer, words
from .live import Serve, wait_until

ASK: dict[str, Any] = {"model": "fake", "input": "Hi"}
WEATHER: Any = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}


def test_whole_answer(serve: Serve) -> None:
    """contracts.md 3: POST /v1/responses; input_tokens_details and output_tokens_details always present; store is false."""
    engine = FakeEngine(answer())
    got = serve(engine).openai().responses.create(**ASK, instructions="Be brief.", store=True, max_output_tokens=9)
    assert got.output_text == "Hello there friend" and got.status == "completed"
    assert got.id == f"resp_{engine.requests[0].request_id}" and got.object == "response" and got.model == "fake"
    assert got.output[0].type == "message" and got.output[0].role == "assistant" and got.output[0].id.startswith("msg_")
    assert got.usage is not None and got.usage.input_tokens_details.cached_tokens == 2
    assert got.usage.output_tokens_details.reasoning_tokens == 0
    assert (got.usage.input_tokens, got.usage.output_tokens, got.usage.total_tokens) == (5, 3, 8)
    assert got.store is False and got.instructions == "Be brief." and got.max_output_tokens == 9 and got.tools == []
    assert got.error is None and got.incomplete_details is None and got.previous_response_id is None
    assert got.timings["predicted_n"] == 3
    assert engine.requests[0].messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]
    assert engine.requests[0].sampling_params.max_tokens == 9


def test_stream_in_the_full_order(serve: Serve) -> None:
    """contracts.md 3: created > in_progress > item added > part added > delta* > done* > completed; type, sequence_number."""
    client = serve(FakeEngine(answer())).openai()
    events = list(client.responses.create(**ASK, stream=True))
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 3,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    with client.responses.stream(**ASK) as stream:
        final = stream.get_final_response()
    assert final.output_text == "Hello there friend" and final.usage is not None and final.usage.total_tokens == 8


def test_tools_and_reasoning_whole_and_streamed(serve: Serve) -> None:
    """contracts.md 3: function calls and reasoning items, streaming and not."""
    engine = FakeEngine(tool_answer())
    client = serve(engine).openai()
    ask = {**ASK, "tools": [WEATHER], "tool_choice": "required", "reasoning": {"effort": "low"}}
    got = client.responses.create(**ask)
    reasoning, weather, clock = got.output
    assert reasoning.type == "reasoning" and reasoning.content[0].text == "I need the weather."
    assert (weather.type, weather.call_id, weather.name, weather.arguments) == (
        "function_call",
        "call_a",
        "weather",
        '{"city": "Oslo"}',
    )
    assert clock.arguments == "{}" and got.status == "completed"
    assert got.usage is not None and got.usage.output_tokens_details.reasoning_tokens == 2
    request = engine.requests[0]
    assert request.tool_choice == "required" and request.chat_template_kwargs["enable_thinking"] is True
    assert request.tools == [{"type": "function", "function": {k: WEATHER[k] for k in ("name", "parameters")}}]

    with client.responses.stream(**ask) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [(i.type, getattr(i, "arguments", None)) for i in final.output] == [
        (i.type, getattr(i, "arguments", None)) for i in got.output
    ]
    fragments = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert fragments == ['{"city": ', '"Oslo"}', "{}"]
    thoughts = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert thoughts == ["I need ", "the weather."]

    client.responses.create(
        **ASK | {"input": [*got.output, {"type": "function_call_output", "call_id": "call_a", "output": "rain"}]}
    )
    turn, result = engine.requests[-1].messages or ()
    assert turn["reasoning_content"] == "I need the weather." and len(turn["tool_calls"]) == 2
    assert result == {"role": "tool", "content": "rain", "tool_call_id": "call_a"}


def test_who_asks_for_a_summary_of_reasoning_gets_it_as_its_own(serve: Serve) -> None:
    """Clients that ask show nothing else, and send it back."""
    engine = FakeEngine(tool_answer())
    client = serve(engine).openai()
    ask = {**ASK, "reasoning": {"effort": "low", "summary": "auto"}}
    got = client.responses.create(**ask)
    assert got.output[0].summary[0].text == "I need the weather." and not got.output[0].content
    kinds = [event.type for event in client.responses.create(**ask, stream=True)]
    assert kinds[2:8] == [
        "response.output_item.added",
        "response.reasoning_summary_part.added",
        *["response.reasoning_summary_text.delta"] * 2,
        "response.reasoning_summary_text.done",
        "response.reasoning_summary_part.done",
    ]
    with client.responses.stream(**ask) as stream:
        assert stream.get_final_response().output[0].summary == got.output[0].summary
    client.responses.create(**ask | {"input": [*got.output[:2]]})
    assert (engine.requests[-1].messages or ())[0]["reasoning_content"] == "I need the weather."


def test_one_call_when_parallel_calls_are_off(serve: Serve) -> None:
    client = serve(FakeEngine(tool_answer())).openai()
    ask = {**ASK, "tools": [WEATHER], "parallel_tool_calls": False}
    assert [item.type for item in client.responses.create(**ask).output] == ["reasoning", "function_call"]
    with client.responses.stream(**ask) as stream:
        assert [item.type for item in stream.get_final_response().output] == ["reasoning", "function_call"]


def test_an_answer_that_was_cut_is_incomplete(serve: Serve) -> None:
    client = serve(FakeEngine(answer(reason="length"))).openai()
    got = client.responses.create(**ASK)
    assert got.status == "incomplete" and got.incomplete_details is not None
    assert got.incomplete_details.reason == "max_output_tokens" and got.output[0].status == "incomplete"
    assert [event.type for event in client.responses.create(**ASK, stream=True)][-1] == "response.incomplete"


def test_parse(serve: Serve) -> None:
    """contracts.md 3: structured output through text.format json_schema, read by the client's own parser."""

    class Person(pydantic.BaseModel):
        name: str
        age: int

    engine = FakeEngine([PROMPT, *words('{"name": "Ann", "age": 7}'), finished()])
    got = serve(engine).openai().responses.parse(**ASK, text_format=Person)
    assert got.output_parsed == Person(name="Ann", age=7)
    structured = engine.requests[0].sampling_params.structured
    assert structured is not None and isinstance(structured.json_schema, dict)
    assert set(structured.json_schema["properties"]) == {"name", "age"}


def test_previous_response_id_is_refused(serve: Serve) -> None:
    """contracts.md 3: previous_response_id is a 400 in the envelope until it is built."""
    with pytest.raises(openai.BadRequestError) as caught:
        serve(FakeEngine(answer())).openai().responses.create(**ASK, previous_response_id="resp_1")
    assert (caught.value.code, caught.value.param) == ("invalid_request", "previous_response_id")


@pytest.mark.parametrize("stream", [False, True])
def test_errors_before_the_answer(serve: Serve, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match="prompt is too long: 5000 tokens > 4096 maximum") as caught:
        serve(FakeEngine([ContextLengthExceeded(5000, 4096)])).openai().responses.create(**ASK, stream=stream)
    assert caught.value.code == "context_length_exceeded"


def test_error_in_mid_stream_is_an_error_event_and_a_failed_response(serve: Serve) -> None:
    """contracts.md 3: a failure in mid-stream is an error event in that wire's own form, then the end."""
    client = serve(FakeEngine([PROMPT, *words("Hello there"), Failed(EngineDied("the engine stopped"))])).openai()
    events = list(client.responses.create(**ASK, stream=True))
    error, failed = events[-2:]
    assert (error.type, error.code, error.message) == ("error", "engine_died", "the engine stopped")
    assert failed.type == "response.failed" and failed.response.status == "failed"
    assert failed.response.error is not None and failed.response.error.code == "engine_died"
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_silence_is_filled(serve: Serve) -> None:
    """contracts.md 3: silence is filled with an event that changes nothing, also before the response is created."""
    engine = FakeEngine([0.25, PROMPT, *words("so"), 0.25, *words(" it"), finished()])
    client = serve(engine, keep_alive_seconds=0.1).openai()
    kinds = [event.type for event in client.responses.create(**ASK, stream=True)]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds.count("response.created") == 1
    assert kinds.count("response.in_progress") >= 3
    with client.responses.stream(**ASK) as stream:
        assert stream.get_final_response().output_text == "so it"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_its_request(serve: Serve, stream: bool) -> None:
    """contracts.md 3: client gone, streaming or not."""
    engine = FakeEngine([PROMPT, *words("some words"), 60.0])
    with serve(engine).http(timeout=0.3) as http, pytest.raises(httpx.TimeoutException):
        http.post("/v1/responses", json={**ASK, "stream": stream})
    wait_until(lambda: engine.aborted == [engine.requests[0].request_id], seconds=2.0)


def test_the_frames_name_their_type(serve: Serve) -> None:
    with serve(FakeEngine(answer())).http() as http:
        text = http.post("/v1/responses", json={**ASK, "stream": True}).text
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"
