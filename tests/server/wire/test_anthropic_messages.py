"""Anthropic's wire format by itself: what it reads, and that a joined stream is the whole answer."""

from __future__ import annotations

import json
import logging
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helexa_engine.errors import InvalidRequest
from helexa_engine.events import PromptProcessed, collect
from helexa_engine.generate_request import GenerateRequest
from helexa_server.wire import anthropic_messages
from helexa_server.wire.frame import Call

from .streams import JSON, Answer, answers

USER = {"role": "user", "content": "Hi"}
TOOL = {"name": "f", "input_schema": {"type": "object"}}
CALL = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}


def parse(**body: Any) -> Call:
    return anthropic_messages.parse_request(json.dumps({"messages": [USER], "max_tokens": 9, **body}).encode())


def request(**body: Any) -> GenerateRequest:
    return parse(**body).requests[0]


def test_unknown_fields_are_ignored() -> None:
    """contracts.md 3: unknown body fields are ignored; max_tokens absent means the rest of the context."""
    parsed = request(service_tier="auto", container=None, max_tokens=None, context_management={"edits": []})
    assert parsed.messages == [USER] and parsed.sampling_params.max_tokens is None


def test_an_agents_session() -> None:
    """contracts.md 3: system blocks without the billing header; tool_use, tool_result and thinking blocks on the way in."""
    cached = {"cache_control": {"type": "ephemeral"}}
    system = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=9; cch=3f2;"},
        {"type": "text", "text": "You are a coding agent.", **cached},
        {"type": "text", "text": "Work in /repo.", **cached},
    ]
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "<hint/>"}, {"type": "text", "text": "Fix it", **cached}],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "look first", "signature": "abc"},
                {"type": "redacted_thinking", "data": "xyz"},
                {"type": "text", "text": "I look."},
                CALL,
                {**CALL, "id": "t2"},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "one"}], **cached},
                {"type": "tool_result", "tool_use_id": "t2", "is_error": True},
                {"type": "text", "text": "Go on"},
            ],
        },
        {"role": "assistant", "content": [{**CALL, "id": "t3"}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t3", "content": "two"}]},
        {"role": "system", "content": [{"type": "text", "text": "The plan has changed."}]},
        {"role": "user", "content": []},
    ]
    function = {"name": "f", "arguments": {"a": 1}}
    assert request(system=system, messages=messages).messages == [
        {"role": "system", "content": "You are a coding agent.\n\nWork in /repo."},
        {"role": "user", "content": "<hint/>\nFix it"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "look first",
            "tool_calls": [{"id": name, "type": "function", "function": function} for name in ("t1", "t2")],
        },
        {"role": "tool", "content": "one", "tool_call_id": "t1"},
        {"role": "tool", "content": "error", "tool_call_id": "t2"},
        {"role": "user", "content": "Go on"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "t3", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "two", "tool_call_id": "t3"},
        {"role": "system", "content": "The plan has changed."},
        {"role": "user", "content": ""},
    ]


def test_the_billing_header_alone_is_no_system_prompt() -> None:
    assert request(system=[{"type": "text", "text": "x-anthropic-billing-header: a=1"}]).messages == [USER]
    assert request(system="x-anthropic").messages == [{"role": "system", "content": "x-anthropic"}, USER]


def test_documents_that_are_text() -> None:
    blocks = [
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "one"}},
        {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "two"}]}},
        {"type": "document", "source": {"type": "content", "content": "three"}},
        {"type": "search_result", "title": "t", "source": "s", "content": [{"type": "text", "text": "four"}]},
    ]
    assert request(messages=[{"role": "user", "content": blocks}]).messages == [
        {"role": "user", "content": "one\ntwo\nthree\nfour"}
    ]


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
        {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "AAAA"}},
        {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image", "source": {}}]},
    ],
)
def test_what_is_no_text_is_refused_by_its_own_code(block: dict[str, Any]) -> None:
    """contracts.md 3: images on a text model are 400 vision_unsupported."""
    with pytest.raises(InvalidRequest) as caught:
        parse(messages=[{"role": "user", "content": [block]}])
    assert caught.value.code == "vision_unsupported" and caught.value.path.startswith("messages[0].content[0]")


def test_unknown_blocks_and_hosted_tools_are_skipped_with_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    """contracts.md 3: unknown content blocks and hosted tool types are skipped with one log line."""
    caplog.set_level(logging.WARNING)
    parsed = request(
        messages=[{"role": "user", "content": [{"type": "container_upload"}, {"type": "text", "text": "x"}]}],
        tools=[{"type": "web_search_20260318", "name": "web_search"}, {"type": "custom", **TOOL}],
    )
    assert parsed.messages == [{"role": "user", "content": "x"}]
    assert [tool["function"]["name"] for tool in parsed.tools or ()] == ["f"] and len(caplog.records) == 2


def test_thinking() -> None:
    """As in Anthropic's API, who does not ask for thinking gets none."""
    assert request().chat_template_kwargs == {"enable_thinking": False}
    assert request(thinking={"type": "disabled"}).chat_template_kwargs == {"enable_thinking": False}
    for kind in ({"type": "adaptive"}, {"type": "enabled", "budget_tokens": 2000}):
        assert request(thinking=kind).chat_template_kwargs == {"enable_thinking": True}
    assert request(chat_template_kwargs={"enable_thinking": True}).chat_template_kwargs == {"enable_thinking": True}
    budgeted = request(thinking={"type": "enabled", "budget_tokens": 2000})
    assert budgeted.sampling_params.thinking_budget == 2000 and request().sampling_params.thinking_budget is None
    low = request(thinking={"type": "adaptive"}, output_config={"effort": "low"})
    assert low.sampling_params.thinking_budget and low.chat_template_kwargs["enable_thinking"] is True
    assert request(output_config={"effort": "low"}).chat_template_kwargs["enable_thinking"] is False
    assert parse(thinking={"type": "adaptive", "display": "omitted"}).hide_reasoning


def test_tool_choice() -> None:
    assert request().tool_choice == "auto" and request(tools=[]).tools is None
    assert request(tools=[TOOL], tool_choice={"type": "none"}).tool_choice == "none"
    assert request(tools=[TOOL], tool_choice={"type": "any"}).tool_choice == "required"
    assert request(tools=[TOOL], tool_choice={"type": "tool", "name": "f"}).tool_choice == {"name": "f"}


def block(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [fields]}]}


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [3]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [USER, {"role": "assistant", "content": "The"}]}, "messages[1].role"),
        (block(text="x"), "messages[0].content[0]"),
        (block(type="text"), "messages[0].content[0].text"),
        (block(type="tool_result", content="x"), "messages[0].content[0].tool_use_id"),
        (block(type="tool_result", tool_use_id="t", content=3), "messages[0].content[0].content"),
        (
            block(type="tool_result", tool_use_id="t", content=[{"type": "text"}]),
            "messages[0].content[0].content[0].text",
        ),
        ({"messages": [{"role": "assistant", "content": [{**CALL, "input": "x"}]}]}, "messages[0].content[0].input"),
        ({"messages": [{"role": "assistant", "content": [{**CALL, "name": 3}]}]}, "messages[0].content[0].name"),
        ({"system": [{"type": "text"}]}, "system[0].text"),
        ({"system": 3}, "system"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tools": [TOOL, {"name": "g"}]}, "tools[1].input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "sometimes"}}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.name"),
        ({"thinking": {"type": "deep"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": -2}}, "thinking.budget_tokens"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop_sequences": ["a"] * 99}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"temperature": -1}, "temperature"),
        ({"output_config": {"format": {"type": "yaml"}}}, "output_config.format.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], path: str) -> None:
    """contracts.md 3: wrong type or bad value is 400 invalid_request with the path named."""
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    assert (caught.value.path, caught.value.code) == (path, "invalid_request")


FIELDS = [f.name for f in msgspec.structs.fields(anthropic_messages.MessagesBody)]


@settings(max_examples=200, deadline=None)
@given(body=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4), content=JSON)
def test_any_json_is_a_call_or_an_invalid_request(body: dict[str, Any], content: Any) -> None:
    messages = [{"role": "user", "content": content}]
    try:
        call = anthropic_messages.parse_request(json.dumps({"messages": messages, **body}).encode())
    except InvalidRequest as error:
        msgspec.json.encode(anthropic_messages.error_body(error, 400))
    else:
        assert len(call.requests) == 1


def join(payloads: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client puts together from the events of a stream: the message, in the shape of the whole one."""
    start, *rest, stop = payloads
    assert start["type"] == "message_start" and stop == {"type": "message_stop"}
    message = start["message"]
    open_block: int | None = None
    arguments = ""
    for payload in rest:
        kind = payload["type"]
        if kind == "message_delta":
            assert open_block is None
            message |= payload["delta"] | {name: payload[name] for name in ("usage", "timings")}
            continue
        if kind == "content_block_start":
            assert open_block is None and payload["index"] == len(message["content"])
            open_block, arguments = payload["index"], ""
            message["content"].append(payload["content_block"])
        assert payload["index"] == open_block
        if kind == "content_block_delta":
            delta, target = payload["delta"], message["content"][-1]
            arguments += delta.get("partial_json", "")
            for name in ("text", "thinking", "signature"):
                if name in delta:
                    target[name] += delta[name]
        elif kind == "content_block_stop":
            open_block = None
            if message["content"][-1]["type"] == "tool_use":
                message["content"][-1]["input"] = json.loads(arguments or "{}")
    return message


@settings(max_examples=300, deadline=None)
@given(answer=answers(), parallel=st.booleans(), omitted=st.booleans())
def test_joined_stream_equals_the_whole_answer(answer: Answer, parallel: bool, omitted: bool) -> None:
    """contracts.md 3: streamed content, joined, equals the non-streamed answer, over all cuts."""
    call = parse(
        tools=[TOOL],
        tool_choice={"type": "auto", "disable_parallel_tool_use": not parallel},
        thinking={"type": "adaptive", "display": "omitted" if omitted else "summarized"},
    )
    projector = anthropic_messages.Projector(call, "m", 1)
    events = [PromptProcessed((1, 2, 3), cached_tokens=1), *answer]
    frames = [frame for event in events for frame in projector.push(event)] + projector.finish()
    payloads = [msgspec.json.decode(frame.data) for frame in frames]
    assert [frame.event for frame in frames] == [payload["type"] for payload in payloads]
    whole = anthropic_messages.build_response(call, [collect(events)], "m", 1)
    assert join(payloads) == msgspec.json.decode(msgspec.json.encode(whole))
