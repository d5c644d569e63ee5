"""AsyncEngine: many requests on one event loop, aborts in every phase, bounded shutdown."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from helexa_engine import LLM, AsyncEngine, EngineConfig, GenerateRequest, SamplingParams
from helexa_engine.errors import ContextLengthExceeded, EngineDied
from helexa_engine.events import Event, Failed, Finished, PromptProcessed, collect
from helexa_engine.testing.checkpoints import write_qwen3_folder

LONG = SamplingParams(temperature=0.0, max_tokens=500, ignore_eos=True)
SHORT = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def engine(folder: Path) -> Iterator[AsyncEngine]:
    made = AsyncEngine(folder, EngineConfig(max_model_len=640, max_num_seqs=2, max_num_batched_tokens=66, seed=0))
    yield made
    asyncio.run(made.aclose())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.002)


def idle(engine: AsyncEngine) -> bool:
    stats = engine.stats()
    return stats.num_running == stats.num_waiting == stats.kv_pages_used == 0


async def gather(engine: AsyncEngine, request: GenerateRequest) -> list[Event]:
    return [event async for event in engine.generate(request)]


def run(work: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await work

    asyncio.run(bounded())


def test_requests_run_together_and_answer_as_the_library_does(engine: AsyncEngine, folder: Path) -> None:
    prompts = ["Hello", "The quick brown fox " * 10, "a page holds", "x"]

    async def work() -> None:
        requests = [GenerateRequest(prompt=p, sampling_params=SHORT) for p in prompts]
        answers = [collect(events) for events in await asyncio.gather(*(gather(engine, r) for r in requests))]
        with LLM(folder, max_model_len=640) as llm:
            assert [a.token_ids for a in answers] == [r.token_ids for r in llm.generate(prompts, SHORT)]
        await until(lambda: idle(engine))

    run(work())


@pytest.mark.parametrize("phase", ["queued", "prefill", "decode"])
def test_closing_the_iterator_aborts_in_every_phase(engine: AsyncEngine, phase: str) -> None:
    async def work() -> None:
        others = [engine.generate(GenerateRequest(prompt="x", sampling_params=LONG)) for _ in range(2)]
        if phase == "queued":  # both seats are taken
            for other in others:
                await anext(other)
        prompt = [5] * 600 if phase != "decode" else "x"
        events = engine.generate(GenerateRequest(prompt=prompt, sampling_params=LONG if phase == "decode" else SHORT))
        if phase == "decode":
            for _ in range(4):
                await anext(events)
            await events.aclose()
        else:
            waiting = asyncio.ensure_future(anext(events))
            busy = {
                "queued": lambda: engine.stats().num_waiting == 1,
                "prefill": lambda: engine.stats().num_running == 1,
            }
            await until(busy[phase])
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        for other in others:
            await other.aclose()
        await until(lambda: idle(engine))
        steps = engine.stats().steps_total
        await asyncio.sleep(0.02)
        assert engine.stats().steps_total == steps

    run(work())


def test_a_refused_request_raises_before_the_first_event(engine: AsyncEngine) -> None:
    async def work() -> None:
        with pytest.raises(ContextLengthExceeded, match="prompt is too long: 640 tokens > 639 maximum"):
            await gather(engine, GenerateRequest(prompt=[1] * 640))
        assert idle(engine)

    run(work())


def test_several_answers_finish_one_by_one(engine: AsyncEngine) -> None:
    async def work() -> None:
        params = SamplingParams(temperature=1.0, seed=1, max_tokens=5, ignore_eos=True, n=3)
        events = await gather(engine, GenerateRequest(prompt="x", sampling_params=params))
        assert sum(isinstance(e, PromptProcessed) for e in events) == 1
        assert {e.index for e in events if isinstance(e, Finished)} == {0, 1, 2}

    run(work())


def test_death_fails_what_runs_and_refuses_what_comes(engine: AsyncEngine) -> None:
    async def work() -> None:
        events = engine.generate(GenerateRequest(prompt="x", sampling_params=LONG))
        await anext(events)
        os.kill(engine.worker_pid or 0, signal.SIGKILL)
        rest = [event async for event in events]
        assert isinstance(rest[-1], Failed) and isinstance(rest[-1].error, EngineDied)
        died = await engine.until_dead()
        assert "SIGKILL" in died.message and died.facts["signal"] == "SIGKILL"
        with pytest.raises(EngineDied):
            await gather(engine, GenerateRequest(prompt="x"))

    run(work())


def test_closing_ends_what_runs_in_bounded_time(folder: Path) -> None:
    async def work() -> None:
        engine = await asyncio.to_thread(AsyncEngine, folder, EngineConfig(max_model_len=640))
        running = asyncio.create_task(gather(engine, GenerateRequest(prompt="x", sampling_params=LONG)))
        await until(lambda: engine.stats().generation_tokens_total > 2)
        started = time.monotonic()
        await engine.aclose()
        assert time.monotonic() - started < 5
        last = (await running)[-1]
        assert isinstance(last, Failed) and isinstance(last.error, EngineDied)
        await engine.aclose()
        with pytest.raises(EngineDied):
            await gather(engine, GenerateRequest(prompt="x"))

    run(work())


def test_it_says_what_it_serves(engine: AsyncEngine, folder: Path) -> None:
    info = engine.model_info
    assert (info.name, info.architecture, info.vocab_size) == (folder.name, "qwen3", 400)
    assert info.limit == {"context": 640, "input": 639, "output": 639}
    assert info.weight_bytes > 0 and info.kv_bytes == engine.stats().kv_pages_total * 2 * 2 * 2 * 64 * 64 * 4
    assert engine.tokenizer.decode(engine.tokenizer.encode("Hello")) == "Hello"
