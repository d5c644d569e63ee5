"""Tools of familiar kinds in many looks: calling the right one, and putting its result into words."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .about_helexa import helexa
from .facts import json_object, recall
from .sample import Message, Sample, assistant, user
from .small_talk import chat
from .writer import SYSTEMS, Writer, is_held_out


@dataclass(frozen=True)
class _Tool:
    """How a tool may look, how it is asked for, and what is said when it has answered."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: tuple[tuple[tuple[str, ...], str, str], ...]  # (possible names, JSON type, description)
    request: Callable[[Writer], tuple[str, tuple[Any, ...], dict[str, Any], str]]
    #: request gives (question, arguments in order of parameters, result, answer)


def _ask_weather(w: Writer) -> tuple[str, tuple[Any, ...], dict[str, Any], str]:
    city, degrees = w.city(), w.rng.randint(-9, 38)
    sky = w.choose(["rain", "snow", "sunshine", "clouds", "wind", "fog", "clear skies", "light rain"])
    question = w.choose(
        [
            f"What is the weather in {city}?",
            f"How is the weather in {city}?",
            f"Tell me the weather in {city}.",
            f"Will it rain in {city}?",
            f"How warm is it in {city}?",
        ]
    )
    keys = w.choose(
        [("temperature", "condition"), ("temperature", "sky"), ("degrees", "weather"), ("temperature", "conditions")]
    )
    result: dict[str, Any] = {keys[0]: degrees, keys[1]: sky}
    result = {"city": city, **result} if w.chance(0.5) else result
    return question, (city,), result, f"It is {degrees} degrees with {sky} in {city}."


def _ask_calculation(w: Writer) -> tuple[str, tuple[Any, ...], dict[str, Any], str]:
    while True:
        a, b = w.rng.randint(2, 999), w.rng.randint(2, 999)
        if w.belongs("calculator", a, b):
            w.unseen.append(str(a))
            break
    operator, word = w.choose([("+", "plus"), ("-", "minus"), ("*", "times"), ("/", "divided by")])
    value: float = {"+": a + b, "-": a - b, "*": a * b, "/": round(a / b, 2)}[operator]
    expression = f"{a} {operator} {b}"
    question = w.choose(
        [
            f"What is {expression}?",
            f"Calculate {expression}.",
            f"What is {a} {word} {b}?",
            f"How much is {a} {word} {b}?",
            f"Compute {expression}.",
        ]
    )
    return question, (expression,), {w.choose(["result", "value", "answer"]): value}, f"{expression} = {value}."


def _ask_timer(w: Writer) -> tuple[str, tuple[Any, ...], dict[str, Any], str]:
    while True:
        minutes = w.rng.randint(2, 240)
        if (minutes > 90 and is_held_out("timer", minutes)) == (w.split == "held_out"):
            w.unseen.append(str(minutes))
            break
    question = w.choose(
        [
            f"Set a timer for {minutes} minutes.",
            f"Start a timer for {minutes} minutes.",
            f"Wake me in {minutes} minutes.",
            f"Please set a {minutes} minute timer.",
            f"Timer for {minutes} minutes, please.",
        ]
    )
    result: dict[str, Any] = w.choose([{"status": "ok"}, {"status": "started", "minutes": minutes}, {"ok": True}])
    return question, (minutes,), result, f"Your timer for {minutes} minutes is set."


def _ask_search(w: Writer) -> tuple[str, tuple[Any, ...], dict[str, Any], str]:
    city, name = w.city(), w.name()
    query = w.choose(
        [
            f"the history of {city}",
            f"hotels in {city}",
            f"the life of {name}",
            f"trains to {city}",
            f"{w.word('food')} recipes",
            f"books by {name}",
        ]
    )
    question = w.choose(
        [
            f"Search for {query}.",
            f"Look up {query}.",
            f"Find information about {query}.",
            f"Search the web for {query}.",
        ]
    )
    found = w.sentence()
    found = found[0].upper() + found[1:] + "."
    result: dict[str, Any] = w.choose(
        [{"result": found}, {"title": query, "snippet": found}, {"results": [found]}, {"text": found}]
    )
    return question, (query,), result, f"I found this: {found}"


def _ask_time(w: Writer) -> tuple[str, tuple[Any, ...], dict[str, Any], str]:
    city, clock = w.city(), w.clock()
    question = w.choose(
        [
            f"What time is it in {city}?",
            f"What is the time in {city}?",
            f"Tell me the time in {city}.",
            f"How late is it in {city}?",
        ]
    )
    result = {"time": clock} if w.chance(0.5) else {"city": city, "time": clock}
    return question, (city,), result, f"It is {clock} in {city}."


def _ask_message(w: Writer) -> tuple[str, tuple[Any, ...], dict[str, Any], str]:
    name, text = w.name(), w.sentence()
    question = w.choose(
        [
            f"Tell {name} that {text}.",
            f"Send {name} the message: {text}.",
        ]
    )
    result: dict[str, Any] = w.choose([{"status": "sent"}, {"status": "ok"}, {"ok": True}])
    return question, (name, text), result, f"I have sent your message to {name}."


def _ask_light(w: Writer) -> tuple[str, tuple[Any, ...], dict[str, Any], str]:
    room, state = w.word("place"), w.choose(["on", "off"])
    question = w.choose(
        [
            f"Turn {state} the light in the {room}.",
            f"Switch {state} the light in the {room}.",
            f"Please turn the light in the {room} {state}.",
        ]
    )
    return (
        question,
        (room, state),
        w.choose([{"status": "ok"}, {"ok": True}, {"state": state}]),
        f"The light in the {room} is {state}.",
    )


def _ask_music(w: Writer) -> tuple[str, tuple[Any, ...], dict[str, Any], str]:
    name = w.name()
    question = w.choose(
        [f"Play {name}.", f"Play music by {name}.", f"I want to hear {name}.", f"Put on a song by {name}."]
    )
    return question, (name,), w.choose([{"status": "playing"}, {"ok": True}]), f"Now playing {name}."


TOOLS: tuple[_Tool, ...] = (
    _Tool(
        ("get_weather", "weather"),
        (
            "Get the weather of a city.",
            "Get the current weather",
        ),
        ((("city", "location"), "string", "The city"),),
        _ask_weather,
    ),
    _Tool(
        ("calculate", "calculator"),
        ("Evaluate an expression.", "A calculator"),
        ((("expression", "input"), "string", "The expression to evaluate"),),
        _ask_calculation,
    ),
    _Tool(
        ("set_timer", "timer"),
        ("Set a timer.", "Start a timer for some minutes"),
        ((("minutes", "duration"), "integer", "Minutes to wait"),),
        _ask_timer,
    ),
    _Tool(
        ("search", "web_search"),
        ("Search the web.", "Search for information."),
        ((("query", "q"), "string", "What to search for"),),
        _ask_search,
    ),
    _Tool(
        ("get_time", "current_time"),
        ("Get the time in a city.", "Local time of a place"),
        ((("city", "location"), "string", "The city"),),
        _ask_time,
    ),
    _Tool(
        ("send_message", "send_email"),
        ("Send a message to someone.", "Send a text message"),
        (
            (("to", "recipient"), "string", "Who gets the message"),
            (("text", "message"), "string", "The message"),
        ),
        _ask_message,
    ),
    _Tool(
        ("set_light", "switch_light"),
        ("Switch a light on or off.", "Turn the light in a room on or off"),
        ((("room", "place"), "string", "The room"), (("state", "power"), "string", "on or off")),
        _ask_light,
    ),
    _Tool(
        ("play_music", "play_song"),
        ("Play music.", "Play music by an artist"),
        ((("artist", "name"), "string", "The artist"),),
        _ask_music,
    ),
)


def _definition(w: Writer, tool: _Tool) -> dict[str, Any]:
    """One look of a tool, in OpenAI's shape."""
    described = w.chance(0.1)
    properties: dict[str, Any] = {}
    for names, kind, description in tool.parameters:
        name = w.choose([n for n in names if n not in properties])
        properties[name] = {"type": kind, "description": description} if described else {"type": kind}
    tool_name = w.choose(tool.names)
    if w.chance(0.1):
        tool_name = f"{w.made_up().lower()}_{tool_name}"
    function: dict[str, Any] = {"name": tool_name, "description": w.choose(tool.descriptions)}
    function["parameters"] = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": function}


def _offer(w: Writer, wanted: _Tool | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(definitions in random order, the wanted one). Up to two others stand beside it."""
    others = w.rng.sample([tool for tool in TOOLS if tool is not wanted], w.choose([0, 1, 1, 2]) + (wanted is None))
    target = _definition(w, wanted) if wanted else {}
    offered = [_definition(w, tool) for tool in others] + ([target] if wanted else [])
    w.rng.shuffle(offered)
    return offered, target


def _call_message(definition: dict[str, Any], arguments: tuple[Any, ...], reasoning: str = "") -> Message:
    function = definition["function"]
    named = dict(zip(function["parameters"]["properties"], arguments, strict=True))
    message = assistant("", reasoning)
    message["tool_calls"] = [{"type": "function", "function": {"name": function["name"], "arguments": named}}]
    return message


def tool_call(w: Writer, thinking: bool = False) -> Sample:
    """A call of the right tool, or a plain answer where none of the tools applies."""
    kwargs = {"enable_thinking": True} if thinking else {}
    if w.chance(0.2):
        plain: Sample = w.choose([helexa, recall, chat, json_object])(w, thinking=thinking)
        tools, _ = _offer(w, None)
        return Sample("tool_call", plain.messages, plain.answer, tools, kwargs, plain.accepted)
    tool = w.choose(TOOLS)
    tools, definition = _offer(w, tool)
    question, arguments, result, answer = tool.request(w)
    name = definition["function"]["name"]
    messages: list[Message] = [user(w.casual(question))]
    if w.chance(0.2):
        messages.insert(0, {"role": "system", "content": w.choose(SYSTEMS)})
    if w.chance(0.15):
        messages += [_call_message(definition, arguments), _tool_result(w, result), assistant(answer)]
        question, arguments, _, _ = tool.request(w)
        messages.append(user(question))
    reasoning = f"The tool {name} can do this." if thinking else ""
    return Sample("tool_call", messages, _call_message(definition, arguments, reasoning), tools, kwargs)


def _tool_result(w: Writer, result: dict[str, Any]) -> Message:
    return {"role": "tool", "content": json.dumps(result, ensure_ascii=False)}


def tool_answer(w: Writer, thinking: bool = False) -> Sample:
    """The answer in words after the tool has answered."""
    tool = w.choose(TOOLS)
    tools, definition = _offer(w, tool)
    question, arguments, result, answer = tool.request(w)
    if w.chance(0.08):
        problem = w.choose(["timeout", "not found", "service unavailable", "invalid input", "no connection"])
        result, answer = {"error": problem}, f"The tool failed: {problem}."
    messages = [user(question), _call_message(definition, arguments), _tool_result(w, result)]
    if w.chance(0.2):
        messages.insert(0, {"role": "system", "content": w.choose(SYSTEMS)})
    kwargs = {"enable_thinking": True} if thinking else {}
    return Sample(
        "tool_answer", messages, assistant(answer, "The tool has answered." if thinking else ""), tools, kwargs
    )
