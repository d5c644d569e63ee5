"""The completions wire format by itself: a joined stream is the whole answer, over several prompts and answers."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from helexa_engine.errors import InvalidRequest
from helexa_engine.events import (
    ContentDelta,
    Event,
    Finished,
    PromptProcessed,
    Timings,
    TokenLogprob,
    Usage,
    collect,
)
from helexa_server.wire import openai_completions

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=5)


@st.composite
def tokens(draw: st.DrawFn, most: int = 3) -> tuple[TokenLogprob, ...]:
    """Tokens whose bytes may be parts of characters."""
    pieces = draw(st.lists(st.binary(max_size=3), max_size=most))
    alternatives = tuple(
        TokenLogprob(i, text, text.encode(), -1.0) for i, text in enumerate(draw(st.lists(TEXT, max_size=2)))
    )
    return tuple(TokenLogprob(1, repr(piece), piece, -0.25, alternatives) for piece in pieces)


@st.composite
def calls(draw: st.DrawFn) -> tuple[int, bool, list[tuple[int, Event]]]:
    """(answers a prompt, echo, events with their prompt) in any order that an engine may give them."""
    n, num_prompts, echo = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.booleans())
    events: list[tuple[int, Event]] = []
    queues: list[list[tuple[int, Event]]] = []
    for prompt in range(num_prompts):
        first = PromptProcessed((1, 2), 1, draw(tokens()) if echo else None, draw(TEXT) if echo else None)
        events.append((prompt, first))
        for i in range(n):
            deltas = [ContentDelta(i, text, (1,), draw(tokens())) for text in draw(st.lists(TEXT, max_size=3))]
            usage = Usage(2, draw(st.integers(0, 9)), 1)
            end = Finished(
                i, draw(st.sampled_from(["stop", "length"])), usage, Timings(0, 0.5, 0.25), None, (), draw(tokens())
            )
            queues.append([(prompt, event) for event in [*deltas, end]])
    while any(queues):
        events.append(draw(st.sampled_from([queue for queue in queues if queue])).pop(0))
    return n, echo, events


@settings(max_examples=200, deadline=None)
@given(drawn=calls(), include_usage=st.booleans(), logprobs=st.booleans())
def test_joined_stream_equals_the_whole_answer(
    drawn: tuple[int, bool, list[tuple[int, Event]]], include_usage: bool, logprobs: bool
) -> None:
    n, echo, events = drawn
    num_prompts = 1 + max(prompt for prompt, _ in events)
    body = {
        "prompt": ["x"] * num_prompts,
        "n": n,
        "echo": echo,
        "logprobs": 2 if logprobs else None,
        "stream_options": {"include_usage": include_usage},
    }
    call = openai_completions.parse_request(json.dumps(body).encode())
    projector = openai_completions.Projector(call, "m", 1)
    frames = [frame for prompt, event in events for frame in projector.push(event, prompt)] + projector.finish()
    assert frames.pop().data == b"[DONE]"
    chunks = [msgspec.json.decode(frame.data) for frame in frames]
    results = [
        collect([event for prompt, event in events if prompt == p], n=n, logprobs=logprobs) for p in range(num_prompts)
    ]
    whole = msgspec.json.decode(msgspec.json.encode(openai_completions.build_response(call, results, "m", 1)))

    joined: list[dict[str, Any]] = [{"index": i, "text": "", "logprobs": None} for i in range(n * num_prompts)]
    for chunk in chunks:
        for piece in chunk["choices"]:
            choice = joined[piece["index"]]
            choice["text"] += piece["text"]
            if piece["logprobs"] is not None:
                choice["logprobs"] = choice["logprobs"] or {name: [] for name in piece["logprobs"]}
                for name, values in piece["logprobs"].items():
                    choice["logprobs"][name] += values
            if piece["finish_reason"] is not None:
                assert "finish_reason" not in choice
                choice["finish_reason"], choice["stop_reason"] = piece["finish_reason"], piece["stop_reason"]
    assert joined == whole["choices"]
    assert {(c["id"], c["created"], c["model"]) for c in chunks} == {(whole["id"], 1, "m")}
    assert chunks[-1]["timings"] == whole["timings"]
    assert chunks[-1].get("usage") == (whole["usage"] if include_usage else None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [f.name for f in msgspec.structs.fields(openai_completions.CompletionBody)]


@settings(max_examples=200, deadline=None)
@given(body=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_any_json_is_a_call_or_an_invalid_request(body: dict[str, Any]) -> None:
    try:
        call = openai_completions.parse_request(json.dumps({"prompt": "x", **body}).encode())
    except InvalidRequest as error:
        msgspec.json.encode(openai_completions.error_body(error, 400))
    else:
        assert call.requests
