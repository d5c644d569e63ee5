"""The Responses wire format by itself: what it reads, and that a joined stream is the whole answer."""

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
    Finished,
    PromptProcessed,
    Timings,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
    Usage,
    collect,
)
from helexa_engine.generate_request import GenerateRequest
from helexa_engine.sampling_params import StructuredOutput
from helexa_server.wire import openai_responses
from helexa_server.wire.frame import Call

from .streams import JSON, Answer, answers

TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def parse(**body: Any) -> Call:
    return openai_responses.parse_request(json.dumps({"input": "Hi", **body}).encode())


def request(**body: Any) -> GenerateRequest:
    return parse(**body).requests[0]


def test_unknown_fields_are_ignored() -> None:
    """contracts.md 3: unknown body fields are ignored; store is accepted and false."""
    call = parse(store=True, service_tier="auto", prompt_cache_key="k", user="me", truncation="auto")
    assert call.requests[0].messages == [{"role": "user", "content": "Hi"}] and call.repeated["store"] is False


def test_an_agents_session() -> None:
    """contracts.md 3: typed items or a plain string; instructions; function_call and function_call_output; reasoning items."""
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Sandbox: off"}]},
        {"role": "user", "content": "Fix it"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "look"}]},
        {
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
        },
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "f", "arguments": ""},
        {"type": "function_call_output", "call_id": "c1", "output": "one"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "two"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "again"}], "content": None},
        {"type": "function_call", "call_id": "c3", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c3", "output": "three"},
        {"type": "reasoning", "summary": [], "encrypted_content": "not ours"},
        {"role": "assistant", "content": "Done.", "phase": "final_answer"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "user", "content": "Thanks"},
    ]

    def call(name: str, arguments: str) -> dict[str, Any]:
        return {"id": name, "type": "function", "function": {"name": "f", "arguments": arguments}}

    assert request(instructions="You are an agent.", input=items).messages == [
        {"role": "system", "content": "You are an agent."},
        {"role": "developer", "content": "Sandbox: off"},
        {"role": "user", "content": "Fix it"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "look",
            "tool_calls": [call("c1", '{"a": 1}'), call("c2", "{}")],
        },
        {"role": "tool", "content": "one", "tool_call_id": "c1"},
        {"role": "tool", "content": "two", "tool_call_id": "c2"},
        {"role": "assistant", "content": None, "reasoning_content": "again", "tool_calls": [call("c3", "{}")]},
        {"role": "tool", "content": "three", "tool_call_id": "c3"},
        {"role": "assistant", "content": "Done."},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Thanks"},
    ]


def test_unknown_items_parts_and_hosted_tools_are_skipped_with_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    """contracts.md 3: unknown content blocks and hosted tool types are skipped with one log line."""
    caplog.set_level(logging.WARNING)
    items = [
        {"type": "web_search_call", "id": "ws_1"},
        {"role": "user", "content": [{"type": "hint"}, {"type": "input_text", "text": "x"}]},
    ]
    parsed = request(input=items, tools=[{"type": "web_search"}, TOOL])
    assert parsed.messages == [{"role": "user", "content": "x"}] and len(caplog.records) == 3
    function = {"name": "f", "parameters": {"type": "object"}}
    assert parsed.tools == [{"type": "function", "function": function}]


def test_functions_of_a_namespace() -> None:
    """Codex groups what other programs run; the model sees one name, the client gets both parts back and sends them again."""
    inner = [{"type": "function", "name": "find", "description": "Finds."}, {"type": "custom", "name": "free"}]
    tools = [{"type": "namespace", "name": "mcp__docs", "description": "Docs.", "tools": inner}, TOOL]
    call = parse(tools=tools)
    names = [tool["function"]["name"] for tool in call.requests[0].tools or ()]
    assert names == ["mcp__docs__find", "f"]
    events = [
        PromptProcessed((1,)),
        ToolCallStart(0, 0, "c1", "mcp__docs__find"),
        ToolCallDelta(0, 0, "{}"),
        ToolCallStart(0, 1, "c2", "f"),
        finish(),
    ]
    whole = openai_responses.build_response(call, [collect(events)], "m", 1)
    first, second = whole["output"]
    assert (first["namespace"], first["name"]) == ("mcp__docs", "find") and "namespace" not in second
    again = request(input=[*whole["output"], {"role": "user", "content": ""}], tools=tools)
    (turn, _) = again.messages or ()
    assert [item["function"]["name"] for item in turn["tool_calls"]] == names


def test_an_image_is_refused_by_its_own_code() -> None:
    """contracts.md 3: images on a text model are 400 vision_unsupported."""
    with pytest.raises(InvalidRequest) as caught:
        parse(input=[{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AA"}]}])
    assert (caught.value.code, caught.value.path) == ("vision_unsupported", "input[0].content[0]")


@pytest.mark.parametrize("name", ["previous_response_id", "conversation", "prompt", "background"])
def test_what_would_need_a_memory_is_refused(name: str) -> None:
    """contracts.md 3: previous_response_id is a 400 in the envelope until it is built."""
    with pytest.raises(InvalidRequest) as caught:
        parse(**{name: True if name == "background" else "resp_1"})
    assert caught.value.path == name
    assert parse(**{name: None})


def test_settings() -> None:
    parsed = request(max_output_tokens=5, temperature=0.5, top_p=0.9, top_k=3, seed=1, stop="END", top_logprobs=2)
    params = parsed.sampling_params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (5, 0.5, 0.9, 3)
    assert (params.seed, params.stop, params.logprobs) == (1, ("END",), 2)
    assert request().sampling_params.logprobs is None and request().sampling_params.max_tokens is None
    assert request(include=["message.output_text.logprobs"]).sampling_params.logprobs == 0
    assert request().chat_template_kwargs == {} and request(reasoning={}).chat_template_kwargs == {}
    assert request(reasoning={"effort": "none"}).chat_template_kwargs["enable_thinking"] is False
    low = request(reasoning={"effort": "low"}, parallel_tool_calls=False)
    assert low.chat_template_kwargs["enable_thinking"] is True and not low.parallel_tool_calls
    assert low.sampling_params.thinking_budget and request().sampling_params.thinking_budget is None
    assert request(thinking_budget=9).sampling_params.thinking_budget == 9
    assert request(tools=[TOOL], tool_choice={"type": "function", "name": "f"}).tool_choice == {"name": "f"}
    assert request(tools=[TOOL], tool_choice="required").tool_choice == "required"


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, StructuredOutput(json_object=True)),
        ({"type": "json_schema", "name": "s", "schema": SCHEMA}, StructuredOutput(json_schema=SCHEMA)),
    ],
)
def test_text_format(form: dict[str, Any], expected: StructuredOutput | None) -> None:
    """contracts.md 3: structured output in this wire's words."""
    assert request(text={"format": form, "verbosity": "low"}).sampling_params.structured == expected


def content(**part: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": [part]}]}


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"input": []}, "messages"),
        ({"input": None}, "input"),
        ({"input": [3]}, "input[0]"),
        ({"input": [{}]}, "input[0].type"),
        ({"input": [{"type": "message", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        (content(text="x"), "input[0].content[0]"),
        (content(type="input_text"), "input[0].content[0].text"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call", "call_id": "c"}]}, "input[0].name"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
        ({"input": [{"type": "item_reference", "id": "rs_1"}]}, "input[0]"),
        ({"input": [{"type": "reasoning", "encrypted_content": "helexa1.!"}]}, "input[0].encrypted_content"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{**TOOL, "parameters": []}]}, "tools[0].parameters"),
        ({"tools": [{"type": "namespace", "name": "n"}]}, "tools[0].tools"),
        ({"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function"}]}]}, "tools[0].tools[0].name"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 99}, "top_logprobs"),
        ({"temperature": -1}, "temperature"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], path: str) -> None:
    """contracts.md 3: wrong type or bad value is 400 invalid_request with the path named."""
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    assert (caught.value.path, caught.value.code) == (path, "invalid_request")


FIELDS = [f.name for f in msgspec.structs.fields(openai_responses.ResponsesBody)]


@settings(max_examples=200, deadline=None)
@given(body=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4), content=JSON)
def test_any_json_is_a_call_or_an_invalid_request(body: dict[str, Any], content: Any) -> None:
    items = [{"role": "user", "content": content}]
    try:
        call = openai_responses.parse_request(json.dumps({"input": items, **body}).encode())
    except InvalidRequest as error:
        msgspec.json.encode(openai_responses.error_body(error, 400))
    else:
        msgspec.json.encode(openai_responses.build_response(call, [collect([finish()])], "m", 1))


def finish() -> Finished:
    return Finished(0, "stop", Usage(3, 1), Timings(0.0, 0.0, 0.0))


def join(payloads: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client puts together from the events of a stream; checks their order and numbers on the way."""
    assert [payload.pop("sequence_number") for payload in payloads] == list(range(len(payloads)))
    created, in_progress, *rest, end = payloads
    assert (created["type"], in_progress["type"]) == ("response.created", "response.in_progress")
    assert created["response"] == in_progress["response"] and created["response"]["output"] == []
    items: list[dict[str, Any]] = []
    text, stage = "", "item"
    for payload in rest:
        kind = payload["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert stage == "item" and payload["output_index"] == len(items)
            item = payload["item"]
            assert item["status"] == "in_progress"
            text, stage = "", "arguments" if item["type"] == "function_call" else "part"
            continue
        assert payload["output_index"] == len(items)
        if kind == "output_item.done":
            assert stage == "done" and payload["item"]["id"] == item["id"]
            items.append(payload["item"])
            stage = "item"
            continue
        assert payload["item_id"] == item["id"]
        assert payload.get("summary_index" if "summary" in kind else "content_index", 0) == 0
        if kind in ("content_part.added", "reasoning_summary_part.added"):
            assert stage == "part" and payload["part"]["text"] == ""
            stage = "text"
        elif kind.endswith(".delta"):
            assert stage in ("text", "arguments")
            text += payload["delta"]
        elif kind == "function_call_arguments.done":
            assert payload["arguments"] == (text or "{}")
            stage = "done"
        elif kind in ("content_part.done", "reasoning_summary_part.done"):
            assert payload["part"]["text"] == text and stage == "text done"
            stage = "done"
        else:
            assert kind in ("output_text.done", "reasoning_text.done", "reasoning_summary_text.done")
            assert payload["text"] == text
            stage = "text done"
    assert stage == "item" and end["type"] == f"response.{end['response']['status']}"
    assert end["response"]["output"] == items
    return end["response"]


@settings(max_examples=300, deadline=None)
@given(answer=answers(), parallel=st.booleans(), sealed=st.booleans(), summary=st.booleans())
def test_joined_stream_equals_the_whole_answer(answer: Answer, parallel: bool, sealed: bool, summary: bool) -> None:
    """contracts.md 3: streamed content, joined, equals the non-streamed answer, over all cuts; created > in_progress >
    item added > part added > delta* > done* > completed, with type and sequence_number."""
    include = ["reasoning.encrypted_content"] if sealed else []
    reasoning = {"effort": "high", "summary": "auto"} if summary else None
    call = parse(tools=[TOOL], parallel_tool_calls=parallel, include=include, reasoning=reasoning)
    projector = openai_responses.Projector(call, "m", 1)
    events = [PromptProcessed((1, 2, 3), cached_tokens=1), *answer]
    frames = [frame for event in events for frame in projector.push(event)] + projector.finish()
    payloads = [msgspec.json.decode(frame.data) for frame in frames]
    assert [frame.event for frame in frames] == [payload["type"] for payload in payloads]
    whole = msgspec.json.decode(msgspec.json.encode(openai_responses.build_response(call, [collect(events)], "m", 1)))
    assert join(payloads) == whole
    thoughts = [
        item["summary" if summary else "content"][0]["text"] for item in whole["output"] if item["type"] == "reasoning"
    ]
    back = request(
        input=[item for item in whole["output"] if item["type"] == "reasoning"] + [{"role": "user", "content": ""}]
    )
    assert [turn["reasoning_content"] for turn in back.messages or () if "reasoning_content" in turn] == thoughts
    if sealed:
        kept = [{**item, "content": None, "summary": []} for item in whole["output"] if item["type"] == "reasoning"]
        again = request(input=[*kept, {"role": "user", "content": ""}])
        assert again.messages == back.messages, "a client that keeps no text sends back what was sealed"


def test_logprobs_go_with_their_text() -> None:
    def scored(text: str) -> TokenLogprob:
        return TokenLogprob(1, text, text.encode(), -0.25)

    events = [
        PromptProcessed((1,)),
        ContentDelta(0, "a", (1,), (scored("a"),)),
        ContentDelta(0, "", (2,), (scored("b"),)),
        finish(),
    ]
    call = parse(top_logprobs=0, include=["message.output_text.logprobs"])
    projector = openai_responses.Projector(call, "m", 1)
    frames = [frame for event in events for frame in projector.push(event)] + projector.finish()
    payloads = [msgspec.json.decode(frame.data) for frame in frames]
    streamed = [item for p in payloads if p["type"].endswith("text.delta") for item in p["logprobs"]]
    whole = openai_responses.build_response(call, [collect(events, logprobs=True)], "m", 1)
    assert [item["token"] for item in streamed] == ["a", "b"]
    assert whole["output"][0]["content"][0]["logprobs"] == streamed
    assert join(payloads)["output"] == msgspec.json.decode(msgspec.json.encode(whole["output"]))
