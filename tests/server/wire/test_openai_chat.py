"""The chat wire format by itself: what it reads, and that a joined stream is the whole answer."""

from __future__ import annotations

import json
import logging
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helexa_engine.errors import InvalidRequest
from helexa_engine.events import (
    ContentDelta,
    Event,
    Finished,
    PromptProcessed,
    ReasoningDelta,
    Timings,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
    Usage,
    collect,
)
from helexa_engine.generate_request import GenerateRequest
from helexa_engine.sampling_params import StructuredOutput
from helexa_server.wire import openai_chat
from helexa_server.wire.frame import Call

USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def parse(**body: Any) -> Call:
    return openai_chat.parse_request(json.dumps({"messages": [USER], **body}).encode())


def request(**body: Any) -> GenerateRequest:
    return parse(**body).requests[0]


def test_unknown_fields_are_ignored() -> None:
    assert request(user="me", store=True, metadata={"a": 1}, service_tier="auto").messages == [USER]


def test_what_clients_really_send() -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "system", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]},
        {"role": "user", "content": "Weather?", "name": "ann"},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "thinking",
            "refusal": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}]},
        {"role": "tool", "tool_call_id": "c2", "content": None},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "Rain.", "tool_calls": [], "reasoning_content": "more"},
    ]
    assert request(messages=messages, tools=[], max_tokens=None, stop=None, n=None).messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "One\ntwo"},
        {"role": "user", "content": "Weather?", "name": "ann"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "thinking",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "rain", "tool_call_id": "c1"},
        {"role": "tool", "content": "", "tool_call_id": "c2"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "Rain.", "reasoning_content": "more"},
    ]


def test_unknown_parts_and_hosted_tools_are_skipped_with_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    parsed = request(
        messages=[{"role": "user", "content": [{"type": "cache_hint"}, {"type": "text", "text": "x"}]}],
        tools=[{"type": "web_search"}, TOOL],
    )
    assert parsed.messages == [{"role": "user", "content": "x"}] and parsed.tools == [TOOL]
    assert len(caplog.records) == 2


def test_an_image_is_refused_by_its_own_code() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(InvalidRequest) as caught:
        parse(messages=[{"role": "user", "content": [part]}])
    assert caught.value.code == "vision_unsupported" and caught.value.path == "messages[0].content[0]"


def test_sampling_fields() -> None:
    params = request(
        max_tokens=10,
        max_completion_tokens=20,
        temperature=1,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=3,
        stop=["a", "b"],
        stop_token_ids=[9],
        ignore_eos=True,
        min_tokens=2,
        logit_bias={"7": 5},
        logprobs=True,
        top_logprobs=4,
        n=2,
    ).sampling_params
    assert params.max_tokens == 20 and params.temperature == 1.0 and params.top_k == 5 and params.min_p == 0.1
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.1, 0.5, -0.5)
    assert params.stop == ("a", "b") and params.stop_token_ids == (9,) and params.ignore_eos and params.min_tokens == 2
    assert params.logit_bias == {7: 5.0} and params.logprobs == 4 and params.n == 2 and params.seed == 3
    unset = request(max_tokens=-1).sampling_params
    assert unset.max_tokens is None and unset.temperature is None and unset.logprobs is None
    assert request(logprobs=True).sampling_params.logprobs == 0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, StructuredOutput(json_object=True)),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, StructuredOutput(json_schema=SCHEMA)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}},
            StructuredOutput(json_schema=SCHEMA),
        ),
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, StructuredOutput(json_schema=SCHEMA)),
        ({"json_schema": SCHEMA}, StructuredOutput(json_schema=SCHEMA)),
        ({"regex": "a+"}, StructuredOutput(regex="a+")),
        ({"grammar": 'start: "a"'}, StructuredOutput(grammar='start: "a"')),
        ({"structured_outputs": {"json": SCHEMA}}, StructuredOutput(json_schema=SCHEMA)),
        ({"structured_outputs": {"regex": "a+"}}, StructuredOutput(regex="a+")),
        ({"structured_outputs": {"choice": ["a b", '"']}}, StructuredOutput(grammar='start: "a b" | "\\""')),
        ({"structured_outputs": {"grammar": "root ::= a"}}, StructuredOutput(grammar="root ::= a")),
        ({"structured_outputs": {"json_object": True}}, StructuredOutput(json_object=True)),
        ({"structured_outputs": {}}, None),
        ({"guided_json": SCHEMA}, StructuredOutput(json_schema=SCHEMA)),
        ({"guided_regex": "a+"}, StructuredOutput(regex="a+")),
        ({"guided_choice": ["a", "b"]}, StructuredOutput(grammar='start: "a" | "b"')),
        ({"guided_grammar": "root ::= a"}, StructuredOutput(grammar="root ::= a")),
    ],
)
def test_structured_output(fields: dict[str, Any], expected: StructuredOutput | None) -> None:
    assert request(**fields).sampling_params.structured == expected


def test_thinking() -> None:
    assert request().chat_template_kwargs == {} and request().sampling_params.thinking_budget is None
    for effort, enabled, budget in [
        ("none", False, None),
        ("minimal", True, 512),
        ("low", True, 2048),
        ("high", True, None),
    ]:
        asked = request(reasoning_effort=effort)
        assert asked.chat_template_kwargs == {"reasoning_effort": effort, "enable_thinking": enabled}
        assert asked.sampling_params.thinking_budget == budget
    both = request(reasoning_effort="none", chat_template_kwargs={"enable_thinking": True})
    assert both.chat_template_kwargs["enable_thinking"] is True
    assert request(enable_thinking=False).chat_template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize("name", ["thinking_budget", "thinking_token_budget", "thinking_budget_tokens"])
def test_thinking_budget(name: str) -> None:
    assert request(**{name: 7}, reasoning_effort="low").sampling_params.thinking_budget == 7
    assert request(**{name: 0}).sampling_params.thinking_budget == 0
    assert request(**{name: -1}, reasoning_effort="low").sampling_params.thinking_budget is None


def test_tool_choice() -> None:
    assert request().tool_choice == "auto"
    assert request(tools=[TOOL], tool_choice="none").tool_choice == "none"
    named = {"type": "function", "function": {"name": "f"}}
    assert request(tools=[TOOL], tool_choice=named).tool_choice == {"name": "f"}


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [USER, {"content": "x"}]}, "messages[1].role"),
        ({"messages": [USER, {"role": 3}]}, "messages[1].role"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [3]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages[0].tool_calls[0].function"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [TOOL, {"type": "function", "function": {"name": ""}}]}, "tools[1].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice.function.name",
        ),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 65}, "top_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias['x']"),
        ({"stream": "yes"}, "stream"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"reasoning_effort": "some"}, "reasoning_effort"),
        ({"thinking_budget": -2}, "thinking_budget"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        ({"regex": "a", "grammar": "b"}, "grammar"),
        ({"regex": "a", "structured_outputs": {"json_object": True}}, "structured_outputs.json_object"),
        ({"guided_choice": []}, "guided_choice"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    assert caught.value.path == path


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [f.name for f in msgspec.structs.fields(openai_chat.ChatBody)]


@settings(max_examples=300, deadline=None)
@given(body=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_any_json_is_a_call_or_an_invalid_request(body: dict[str, Any]) -> None:
    try:
        call = openai_chat.parse_request(json.dumps({"messages": [USER], **body}).encode())
    except InvalidRequest as error:
        msgspec.json.encode(openai_chat.error_body(error, 400))
    else:
        assert len(call.requests) == 1


@settings(max_examples=200, deadline=None)
@given(body=st.binary(max_size=60))
def test_any_bytes_are_an_invalid_request(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        openai_chat.parse_request(body)


def test_a_lone_surrogate_is_an_invalid_request() -> None:
    with pytest.raises(InvalidRequest):
        openai_chat.parse_request(rb'{"messages": [{"role": "user", "content": "\ud800"}]}')


# -- A joined stream is the whole answer

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=6)
TIMES = Timings(0.0, 0.5, 0.25)


def logprob_of(text: str) -> TokenLogprob:
    return TokenLogprob(1, text, text.encode(), -0.25)


@st.composite
def answers(draw: st.DrawFn, index: int) -> list[Event]:
    """One answer: thoughts, words and calls cut anywhere, some tokens without text and some without log probabilities."""

    def tokens() -> dict[str, Any]:
        texts = draw(st.lists(TEXT, max_size=2))
        return {"token_ids": tuple(range(len(texts))), "logprobs": tuple(map(logprob_of, texts))}

    events: list[Event] = [ReasoningDelta(index, text, **tokens()) for text in draw(st.lists(TEXT, max_size=3))]
    events += [ContentDelta(index, text, **tokens()) for text in draw(st.lists(TEXT, max_size=4))]
    num_calls = draw(st.integers(0, 2))
    for call_index in range(num_calls):
        events.append(ToolCallStart(index, call_index, f"call_{index}_{call_index}", "f", **tokens()))
        events += [ToolCallDelta(index, call_index, text, **tokens()) for text in draw(st.lists(TEXT, max_size=3))]
    usage = Usage(3, draw(st.integers(0, 50)), 1, draw(st.integers(0, 5)))
    reason = "tool_calls" if num_calls else draw(st.sampled_from(["stop", "length"]))
    stop_reason = draw(st.sampled_from([None, "END", 7]))
    return [*events, Finished(index, reason, usage, TIMES, stop_reason, **tokens())]


@st.composite
def event_streams(draw: st.DrawFn) -> tuple[int, list[Event]]:
    n = draw(st.integers(1, 3))
    queues = [draw(answers(i)) for i in range(n)]
    events: list[Event] = [PromptProcessed((1, 2, 3), cached_tokens=1)]
    while any(queues):
        queue = draw(st.sampled_from([queue for queue in queues if queue]))
        events.append(queue.pop(0))
    return n, events


def join(chunks: list[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    """What a client puts together from chunks: a choice for each answer, in the shape of the whole one."""
    choices: list[dict[str, Any]] = [
        {"index": i, "message": {"role": None, "content": "", "refusal": None}, "logprobs": None, "finish_reason": None}
        for i in range(n)
    ]
    for chunk in chunks:
        for piece in chunk["choices"]:
            choice, delta = choices[piece["index"]], piece["delta"]
            message = choice["message"]
            if "role" in delta:
                assert message["role"] is None, "the role came twice"
                message["role"] = delta["role"]
            assert message["role"] is not None, "a delta came before the role"
            message["content"] += delta.get("content", "")
            if "reasoning_content" in delta:
                message["reasoning_content"] = message.get("reasoning_content", "") + delta["reasoning_content"]
            for call in delta.get("tool_calls", ()):
                calls = message.setdefault("tool_calls", [])
                if "id" in call:
                    assert call["index"] == len(calls) and call["function"]["arguments"] == ""
                    calls.append({key: value for key, value in call.items() if key != "index"})
                else:
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            if piece.get("logprobs") is not None:
                choice["logprobs"] = choice["logprobs"] or {"content": [], "refusal": None}
                choice["logprobs"]["content"] += piece["logprobs"]["content"]
            if piece["finish_reason"] is not None:
                choice["finish_reason"], choice["stop_reason"] = piece["finish_reason"], piece["stop_reason"]
    for choice in choices:
        if "tool_calls" in choice["message"]:
            choice["message"]["content"] = choice["message"]["content"] or None
    return choices


@settings(max_examples=300, deadline=None)
@given(stream=event_streams(), include_usage=st.booleans(), parallel=st.booleans(), logprobs=st.booleans())
def test_joined_stream_equals_the_whole_answer(
    stream: tuple[int, list[Event]], include_usage: bool, parallel: bool, logprobs: bool
) -> None:
    n, events = stream
    call = parse(n=n, stream_options={"include_usage": include_usage}, parallel_tool_calls=parallel, logprobs=logprobs)
    projector = openai_chat.Projector(call, "m", 1)
    frames = [frame for event in events for frame in projector.push(event)] + projector.finish()
    assert frames.pop().data == b"[DONE]"
    chunks = [msgspec.json.decode(frame.data) for frame in frames]
    result = collect(events, n=n, logprobs=logprobs)
    whole = msgspec.json.decode(msgspec.json.encode(openai_chat.build_response(call, [result], "m", 1)))
    assert join(chunks, n) == whole["choices"]
    assert {(c["id"], c["created"], c["model"]) for c in chunks} == {(whole["id"], 1, "m")}
    assert chunks[-1]["timings"] == whole["timings"]
    assert chunks[-1].get("usage") == (whole["usage"] if include_usage else None)
