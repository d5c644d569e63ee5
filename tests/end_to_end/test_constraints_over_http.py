"""What the demo model is held to, asked through the server by the openai client: forced calls, formats, budgets of thinking."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from helexa_engine.config import EngineConfig
from helexa_engine.runtime.async_engine import AsyncEngine
from tests.server.live import Live, live_server

QUESTION = [{"role": "user", "content": "What is helexa?"}]
ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "count": {"$ref": "#/$defs/Count"}},
    "required": ["name", "count"],
}
ORDER = {
    "type": "function",
    "function": {
        "name": "order",
        "description": "Orders things.",
        "parameters": {
            "$defs": {"Count": {"type": "integer", "minimum": 1, "maximum": 9}, "Item": ITEM},
            "type": "object",
            "properties": {
                "items": {"type": "array", "items": {"$ref": "#/$defs/Item"}, "minItems": 1, "maxItems": 2},
                "speed": {"enum": ["slow", "fast"]},
            },
            "required": ["items", "speed"],
            "additionalProperties": False,
        },
    },
}
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": NOTHING}}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "maximum": 150, "minimum": 0},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    engine = AsyncEngine("demo", EngineConfig(max_model_len=2048))
    with live_server(engine) as live:
        yield live
    asyncio.run(engine.aclose())


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return live.openai(timeout=120)


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "fake", "messages": QUESTION, "temperature": 0, "max_tokens": 600} | options
    )


def check_order(arguments: str) -> None:
    order = json.loads(arguments)
    assert set(order) == {"items", "speed"} and order["speed"] in ("slow", "fast") and 1 <= len(order["items"]) <= 2
    assert all(1 <= item["count"] <= 9 and len(item["name"]) <= 8 for item in order["items"])


@pytest.mark.parametrize("effort", ["none", "high"])
@pytest.mark.parametrize("temperature", [0, 1.3])
def test_a_named_call_whatever_the_model_would_say(client: openai.OpenAI, effort: str, temperature: float) -> None:
    named = {"type": "function", "function": {"name": "order"}}
    options = {
        "tools": [ORDER, CLOCK],
        "tool_choice": named,
        "reasoning_effort": effort,
        "temperature": temperature,
        "seed": 5,
    }
    options["extra_body"] = {"thinking_budget": 20}
    choice = ask(client, **options).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    [call] = choice.message.tool_calls
    assert call.function.name == "order" and call.id.startswith("call_")
    check_order(call.function.arguments)
    pieces = [chunk.choices[0].delta.tool_calls for chunk in ask(client, **options, stream=True)]
    fragments = [piece[0].function.arguments for piece in pieces if piece]
    assert "".join(fragments) == call.function.arguments and fragments[0] == "" and len(fragments) > 4


def test_required_calls_may_be_several_unless_the_client_says_no(client: openai.OpenAI) -> None:
    for parallel in (True, False):
        choice = ask(
            client, tools=[CLOCK, ORDER], tool_choice="required", parallel_tool_calls=parallel, seed=1
        ).choices[0]
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        assert parallel or len(choice.message.tool_calls) == 1
        for call in choice.message.tool_calls:
            if call.function.name == "order":
                check_order(call.function.arguments)
            else:
                assert (call.function.name, json.loads(call.function.arguments)) == ("clock", {})


def test_a_call_of_the_models_own_accord_is_held_to_the_schema(client: openai.OpenAI) -> None:
    """What it would write stands in the free call; the schema leaves it another city, and leaves words as they are."""

    def weather(city: dict[str, Any]) -> dict[str, Any]:
        parameters = {"type": "object", "properties": {"city": city}, "required": ["city"]}
        function = {"name": "get_weather", "description": "Get the weather of a city.", "parameters": parameters}
        return {"type": "function", "function": function}

    def called(city: dict[str, Any], **options: Any) -> dict[str, Any]:
        asked = [{"role": "user", "content": "How is the weather in Oslo?"}]
        message = (
            ask(client, messages=asked, tools=[weather(city)], reasoning_effort="none", **options).choices[0].message
        )
        [call] = message.tool_calls
        assert call.function.name == "get_weather"
        arguments: dict[str, Any] = json.loads(call.function.arguments)
        return arguments

    assert called({"type": "string"}) == {"city": "Oslo"}
    assert called({"enum": ["Atlantis"]}) == {"city": "Atlantis"}
    assert called({"type": "integer", "minimum": 5, "maximum": 5}, temperature=1.2, seed=2) == {"city": 5}
    message = ask(client, tools=[weather({"enum": ["Atlantis"]})], reasoning_effort="none").choices[0].message
    assert message.content and not message.tool_calls


def test_a_format_beside_tools_gives_json_or_a_call(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    for seed in range(3):
        message = ask(client, tools=[CLOCK], response_format=form, temperature=1.5, seed=seed).choices[0].message
        if message.tool_calls:
            assert {call.function.name for call in message.tool_calls} == {"clock"} and message.content is None
        else:
            assert set(json.loads(message.content)) == {"name", "age"}


@pytest.mark.parametrize(
    ("options", "check"),
    [
        ({"response_format": {"type": "json_object"}}, lambda text: isinstance(json.loads(text), dict)),
        (
            {"response_format": {"type": "json_object", "schema": PERSON}},
            lambda text: set(json.loads(text)) == {"name", "age"},
        ),
        ({"extra_body": {"json_schema": PERSON}}, lambda text: set(json.loads(text)) == {"name", "age"}),
        ({"extra_body": {"regex": "[a-c]{4}-[0-9]{2}"}}, lambda text: re.fullmatch("[a-c]{4}-[0-9]{2}", text)),
        (
            {"extra_body": {"grammar": 'start: "yes" | "no" " " /[0-9]{3}/'}},
            lambda text: re.fullmatch("yes|no [0-9]{3}", text),
        ),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("effort", ["none", "high"])
def test_formats(client: openai.OpenAI, options: dict[str, Any], check: Any, effort: str) -> None:
    """Also past the end of the turn, and before it: a complete answer ends whatever ignore_eos and min_tokens say."""
    for extra in ({}, {"ignore_eos": True, "min_tokens": 40}):
        body = options.get("extra_body", {}) | {"thinking_budget": 8} | extra
        choice = ask(
            client, **{**options, "extra_body": body}, reasoning_effort=effort, temperature=0.8, seed=3
        ).choices[0]
        if choice.finish_reason == "length":  # a string that never ends is JSON so far
            assert options["response_format"] == {"type": "json_object"}
            continue
        assert choice.finish_reason == "stop" and check(choice.message.content), choice.message.content


def test_what_a_schema_cannot_be_held_to_is_a_400_that_names_it(client: openai.OpenAI) -> None:
    schema = {"type": "array", "uniqueItems": True}
    for form, path in [
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}, "response_format.json_schema.schema"),
        ({"type": "json_object", "schema": schema}, "response_format.schema"),
    ]:
        with pytest.raises(openai.BadRequestError, match="uniqueItems") as caught:
            ask(client, response_format=form)
        assert (caught.value.code, caught.value.param) == ("invalid_request", path)


def test_thinking_budget(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        ask(client, extra_body={"thinking_budget": -5})
    free = ask(client, reasoning_effort="high").choices[0].message
    for budget in (0, 3):
        answer = ask(client, reasoning_effort="high", extra_body={"thinking_budget": budget}, max_tokens=40)
        details = answer.usage.completion_tokens_details
        assert details.reasoning_tokens <= budget + 3  # the tags, and the newline before the closing one
        assert "</think>" not in (answer.choices[0].message.content or "")
        thought = getattr(answer.choices[0].message, "reasoning_content", None) or ""
        assert (getattr(free, "reasoning_content", None) or "").startswith(thought)


def test_stop_thinking(live: Live) -> None:
    """A model that is made to think to the end of its tokens, told to answer in the middle of it."""
    engine: Any = live.model.engine
    opening, closing = (engine.tokenizer.token_id(tag) for tag in ("<think>", "</think>"))
    with live.openai(timeout=120) as client, live.http() as http:
        endless = {str(opening): 100, str(closing): -100}
        chunks = ask(client, reasoning_effort="high", logit_bias=endless, max_tokens=1900, stream=True)
        kinds = []
        for chunk in chunks:
            delta = chunk.choices[0].delta
            if getattr(delta, "reasoning_content", None):
                if not kinds:
                    assert http.post(f"/v1/requests/{chunk.id}/stop-thinking").json()["stopped"] == 1
                kinds.append("reasoning")
            elif delta.content:
                kinds.append("content")
    assert kinds[0] == "reasoning" and kinds[-1] == "content" and kinds == sorted(kinds, reverse=True)


def test_no_calls_where_the_client_wants_none(client: openai.OpenAI, live: Live) -> None:
    """Not even those that the model is bent on making."""
    engine: Any = live.model.engine
    bent = {str(engine.tokenizer.token_id("<tool_call>")): 60}
    options = {"tools": [CLOCK], "reasoning_effort": "none", "logit_bias": bent, "max_tokens": 30}
    assert "<tool_call>" not in (ask(client, tool_choice="none", **options).choices[0].message.content or "")


def test_constrained_answers_beside_free_ones_change_nothing(live: Live) -> None:
    """Several at once, each with its own constraint or none: each as it would be alone."""
    import concurrent.futures

    asked: list[dict[str, Any]] = [
        {},
        {"response_format": {"type": "json_object", "schema": PERSON}},
        {"tools": [ORDER], "tool_choice": "required", "parallel_tool_calls": False},
        {"extra_body": {"regex": "[a-c]{4}-[0-9]{2}"}},
        {"n": 2, "seed": 4, "temperature": 1.0, "response_format": {"type": "json_object", "schema": PERSON}},
    ]

    def answer(options: dict[str, Any]) -> list[Any]:
        with live.openai(timeout=120) as client:
            choices = ask(client, **{"reasoning_effort": "none", "max_tokens": 200} | options).choices
        return [
            (c.message.content, [(t.function.name, t.function.arguments) for t in c.message.tool_calls or ()])
            for c in choices
        ]

    alone = [answer(options) for options in asked]
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(answer, asked)) == alone
