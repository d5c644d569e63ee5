"""Text completions over a live server, with the real openai client."""

from __future__ import annotations

import json
from dataclasses import replace

import openai
import pytest

from helexa_engine.errors import EngineDied
from helexa_engine.events import ContentDelta, Event, Failed, PromptProcessed
from helexa_engine.generate_request import GenerateRequest
from helexa_engine.testing.fake_engine import FakeEngine

from .answer_scripts import PROMPT, answer, finished, token, words
from .live import Serve, wait_until


def test_whole_and_streamed(serve: Serve) -> None:
    engine = FakeEngine(answer())
    client = serve(engine).openai()
    got = client.completions.create(model="fake", prompt="Say", max_tokens=4)
    assert got.id.startswith("cmpl-") and got.object == "text_completion"
    assert got.choices[0].text == "Hello there friend" and got.choices[0].finish_reason == "stop"
    assert got.choices[0].logprobs is None
    assert got.usage.total_tokens == 8 and got.timings["predicted_n"] == 3
    assert engine.requests[0].prompt == "Say" and engine.requests[0].messages is None
    chunks = list(
        client.completions.create(model="fake", prompt="Say", stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].text for c in chunks[:-1]) == "Hello there friend"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompt_forms(serve: Serve, prompt: object, parsed: list[object]) -> None:
    """Choice i of prompt p is number p * n + i, whichever prompt is done first."""

    def script(request: GenerateRequest) -> list[Event | float]:
        which = parsed.index(request.prompt)
        pause = 0.05 * (len(parsed) - which)
        return [PROMPT, *[step for i in range(2) for step in (pause, *words(f"p{which} a{i}", i), finished(i, 2))]]

    engine = FakeEngine(script)
    client = serve(engine).openai()
    got = client.completions.create(model="fake", prompt=prompt, n=2)
    expected = [f"p{p} a{i}" for p in range(len(parsed)) for i in range(2)]
    assert [(c.index, c.text) for c in got.choices] == list(enumerate(expected))
    assert got.usage.prompt_tokens == 5 * len(parsed) and got.usage.completion_tokens == 4 * len(parsed)
    joined = [""] * len(expected)
    for chunk in client.completions.create(model="fake", prompt=prompt, n=2, stream=True):
        joined[chunk.choices[0].index] += chunk.choices[0].text
    assert joined == expected


def test_echo_with_logprobs(serve: Serve) -> None:
    """The prompt's text and tokens come first; offsets count characters, also where one spans tokens."""
    prompt = PromptProcessed(
        (1, 2), prompt_text="Hé", prompt_logprobs=(token("H", None), token("é", top=(token("é"),)))
    )
    halves = [replace(token(f"bytes:\\x{byte:02x}"), token_bytes=bytes([byte])) for byte in "ß".encode()]
    script = [
        prompt,
        ContentDelta(0, "", (3,), (halves[0],)),
        ContentDelta(0, "ß", (4,), (halves[1],)),
        ContentDelta(0, "!", (5,), (token("!"),)),
        finished(),
    ]
    engine = FakeEngine(script)
    client = serve(engine).openai()
    ask = {"model": "fake", "prompt": "Hé", "echo": True, "logprobs": 1}
    whole = client.completions.create(**ask).choices[0]
    assert whole.text == "Héß!"
    assert whole.logprobs.tokens == ["H", "é", "bytes:\\xc3", "bytes:\\x9f", "!"]
    assert whole.logprobs.token_logprobs == [None, -0.5, -0.5, -0.5, -0.5]
    assert whole.logprobs.text_offset == [0, 1, 2, 2, 3]
    assert whole.logprobs.top_logprobs[:2] == [None, {"é": -0.5}]
    params = engine.requests[0].sampling_params
    assert engine.requests[0].echo and (params.logprobs, params.prompt_logprobs) == (1, 1)
    choices = [c.choices[0] for c in client.completions.create(**ask, stream=True)]
    assert "".join(c.text for c in choices) == whole.text
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [item for c in choices for item in getattr(c.logprobs, name)] == getattr(whole.logprobs, name)


def test_a_suffix_asks_for_the_middle(serve: Serve) -> None:
    engine = FakeEngine(answer())
    client = serve(engine).openai().completions
    for suffix in ("end", "", None):  # editors send an empty one where nothing follows
        client.create(model="fake", prompt="x", suffix=suffix)
    assert [request.suffix for request in engine.requests] == ["end", None, None]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [1, "a"]}, "prompt[0]"),
        ({"prompt": [[1], "a"]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": [1], "suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 65}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_bad_fields(serve: Serve, fields: dict[str, object], param: str) -> None:
    engine = FakeEngine(answer())
    with pytest.raises(openai.BadRequestError) as caught:
        serve(engine).openai().completions.create(**{"model": "fake", "prompt": "x", **fields})
    assert (caught.value.code, caught.value.param) == ("invalid_request", param)
    assert not engine.requests


def test_one_prompt_failing_aborts_the_others(serve: Serve) -> None:
    def script(request: GenerateRequest) -> list[object]:
        return [PROMPT, 60.0] if request.prompt == "slow" else [PROMPT, 0.05, RuntimeError("broken")]

    engine = FakeEngine(script)
    with pytest.raises(openai.InternalServerError):
        serve(engine).openai().completions.create(model="fake", prompt=["slow", "bad"])
    assert engine.aborted == [request.request_id for request in engine.requests if request.prompt == "slow"]


def test_error_in_mid_stream_is_an_error_event(serve: Serve) -> None:
    live = serve(FakeEngine([PROMPT, *words("Hello there"), Failed(EngineDied("the engine stopped"))]))
    with live.http() as http:
        frames = http.post("/v1/completions", json={"prompt": "a", "stream": True}).text.strip().split("\n\n")
    assert json.loads(frames[-1].removeprefix("data: "))["error"]["code"] == "engine_died"
    assert "".join(json.loads(frame.removeprefix("data: "))["choices"][0]["text"] for frame in frames[:-1]) == (
        "Hello there"
    )


def test_silence_is_filled_with_chunks_that_say_nothing(serve: Serve) -> None:
    live = serve(FakeEngine([PROMPT, 0.35, *words("late"), finished()]), keep_alive_seconds=0.1)
    chunks = list(live.openai().completions.create(model="fake", prompt="a", stream=True))
    said = [choice.text for chunk in chunks for choice in chunk.choices]
    assert len(chunks) >= 5 and "".join(said) == "late" and not any(choice.text for choice in chunks[0].choices)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_its_request(serve: Serve, stream: bool) -> None:
    engine = FakeEngine([PROMPT, *words("some words"), 60.0])
    with serve(engine).http(timeout=0.3) as http, pytest.raises(Exception, match="timed out"):
        http.post("/v1/completions", json={"prompt": "a", "stream": stream})
    wait_until(lambda: engine.aborted == [engine.requests[0].request_id], seconds=2.0)
