"""The scripted stand-in behaves like the engine it stands in for."""

from __future__ import annotations

import asyncio

import pytest

from helexa_engine.errors import EngineDied
from helexa_engine.events import collect
from helexa_engine.generate_request import GenerateRequest
from helexa_engine.testing.fake_engine import FakeEngine, scripted_answer


def test_script_is_played_and_collected() -> None:
    async def play() -> None:
        engine = FakeEngine(lambda request: scripted_answer("hi é", prompt=str(request.prompt)))
        events = [event async for event in engine.generate(GenerateRequest(prompt="abc"))]
        result = collect(events)
        assert (result.text, result.usage.prompt_tokens, result.usage.completion_tokens) == ("hi é", 3, 5)
        assert engine.tokenizer.decode(result.token_ids) == "hi é"
        assert engine.requests[0].prompt == "abc" and not engine.aborted and engine.num_running == 0
        await engine.aclose()
        with pytest.raises(EngineDied):
            await anext(engine.generate(GenerateRequest(prompt="abc")))

    asyncio.run(play())


def test_closing_the_iterator_counts_as_abort() -> None:
    async def play() -> None:
        engine = FakeEngine(scripted_answer("a long answer", pause=0.001))
        request = GenerateRequest(prompt="abc")
        events = engine.generate(request)
        await anext(events)
        assert engine.num_running == 1
        await events.aclose()
        assert engine.aborted == [request.request_id] and engine.num_running == 0

    asyncio.run(play())


def test_exceptions_of_the_script_are_raised() -> None:
    async def play() -> None:
        engine = FakeEngine([*scripted_answer("ab")[:2], EngineDied("gone")])
        events = engine.generate(GenerateRequest(prompt="abc"))
        await anext(events)
        await anext(events)
        with pytest.raises(EngineDied):
            await anext(events)

    asyncio.run(play())
