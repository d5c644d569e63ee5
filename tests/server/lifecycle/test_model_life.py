"""The life of one model, led by engines that die when they are told to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from helexa_engine.errors import EngineDied, HelexaError, ModelDoesNotFit, ModelNotFound
from helexa_engine.testing.fake_engine import FakeEngine
from helexa_server.lifecycle.model_life import ModelLife, Progress, Recovery

QUICK = Recovery(limit=3, backoff_seconds=0.01)


class Loads:
    """Gives an engine at each load, or raises what stands in its place; counts them."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self.outcomes = list(outcomes)
        self.engines: list[FakeEngine] = []
        self.count = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, progress: Progress) -> FakeEngine:
        self.count += 1
        progress("weights", 0.5)
        await self.gate.wait()
        outcome = self.outcomes.pop(0) if self.outcomes else None
        if outcome is not None:
            raise outcome
        self.engines.append(FakeEngine([]))
        return self.engines[-1]


def run(work: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await work

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_from_unloaded_to_ready_and_back() -> None:
    async def work() -> None:
        loads = Loads()
        life = ModelLife(loads, QUICK)
        assert life.status == "unloaded" and life.engine is None
        loads.gate.clear()
        starting = [asyncio.create_task(life.start()) for _ in range(2)]
        await until(lambda: life.progress == ("weights", 0.5))
        assert life.status == "loading"
        with pytest.raises(TimeoutError):
            await life.until_ready(0.01)
        loads.gate.set()
        await asyncio.gather(*starting)
        assert loads.count == 1, "two callers load it once"
        assert life.status == "ready" and await life.until_ready(0) is loads.engines[0]
        assert life.load_seconds is not None and life.recoveries == 0
        await life.stop()
        assert life.status == "unloaded" and life.engine is None and loads.engines[0].closed
        await life.start()
        assert loads.count == 2 and life.engine is loads.engines[1]
        await life.stop()

    run(work())


def test_a_first_load_that_fails_is_not_repeated() -> None:
    async def work() -> None:
        loads = Loads(ModelDoesNotFit(2, 1, "cpu"))
        life = ModelLife(loads, QUICK)
        for _ in range(2):
            with pytest.raises(ModelDoesNotFit):
                await life.start() if loads.count == 0 else await life.until_ready(1)
        assert life.status == "unloaded" and isinstance(life.error, ModelDoesNotFit) and loads.count == 1
        await life.start()  # the cause is mended
        assert life.status == "ready"
        await life.stop()

    run(work())


def test_what_dies_is_loaded_again() -> None:
    async def work() -> None:
        loads = Loads()
        life = ModelLife(loads, QUICK)
        await life.start()
        loads.gate.clear()
        died = EngineDied("by hand", signal="SIGKILL")
        loads.engines[0].die(died)
        await until(lambda: life.status == "recovering")
        assert life.engine is None and life.error is died and life.retry_after_seconds >= 1
        waiting = asyncio.create_task(life.until_ready(10))
        await until(lambda: loads.count == 2)
        loads.gate.set()
        assert await waiting is loads.engines[1]
        assert (life.status, life.recoveries, life.error) == ("ready", 1, died) and life.recovery_seconds > 0
        await life.stop()

    run(work())


def test_a_load_that_fails_in_a_recovery_is_tried_again() -> None:
    async def work() -> None:
        loads = Loads(None, ModelDoesNotFit(2, 1, "cpu"), RuntimeError("no threads left"))
        life = ModelLife(loads, QUICK)
        await life.start()
        loads.engines[0].die(EngineDied("x"))
        await until(lambda: len(loads.engines) == 2)
        await life.until_ready(1)
        assert loads.count == 4 and life.recoveries == 1
        await life.stop()

    run(work())


def test_it_is_given_up_after_so_many_deaths_in_a_row() -> None:
    async def work() -> None:
        loads = Loads()
        life = ModelLife(loads, QUICK)
        await life.start()
        for _ in range(4):
            engine = await life.until_ready(5)
            engine.die(EngineDied("by hand", signal="SIGKILL"))  # type: ignore[attr-defined]
            await until(lambda: life.engine is not engine)  # noqa: B023
        await until(lambda: life.status == "failed")
        assert loads.count == 4 and life.recoveries == 3
        for _ in range(2):
            with pytest.raises(EngineDied, match="given up after 3 recoveries in a row.*restart.*by hand") as caught:
                await life.until_ready(1)
        assert caught.value.facts == {"signal": "SIGKILL"}
        await life.start()
        assert life.status == "ready"
        await life.stop()

    run(work())


def test_a_healthy_time_resets_the_count() -> None:
    async def work() -> None:
        loads = Loads()
        life = ModelLife(loads, Recovery(limit=1, backoff_seconds=0.0, healthy_seconds=0.0))
        await life.start()
        for count in range(5):
            loads.engines[-1].die(EngineDied("x"))
            await until(lambda: life.recoveries == count + 1)  # noqa: B023
        assert life.status == "ready"
        await life.stop()

    run(work())


@pytest.mark.parametrize("when", ["loading", "recovering"])
def test_it_can_be_stopped_at_any_time(when: str) -> None:
    async def work() -> None:
        loads = Loads(*([None, RuntimeError("no threads left")] if when == "recovering" else []))
        life = ModelLife(loads, Recovery(backoff_seconds=60.0))
        if when == "recovering":
            await life.start()
            loads.engines[0].die(EngineDied("x"))
            await until(lambda: loads.count == 2 and not loads.outcomes)
        else:
            loads.gate.clear()
            starting = asyncio.create_task(life.start())
            await until(lambda: loads.count == 1)
            starting.cancel()
        await life.stop()
        assert life.status == "unloaded" and loads.count == (2 if when == "recovering" else 1)

    run(work())


def test_pauses_double_up_to_a_minute() -> None:
    recovery = Recovery(backoff_seconds=2.0)
    assert [recovery.pause(attempt) for attempt in range(1, 9)] == [0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    assert Recovery(backoff_seconds=90.0).pause(3) == 90.0


def test_an_error_that_is_none_of_ours_is_made_one() -> None:
    async def work() -> None:
        life = ModelLife(Loads(RuntimeError("no threads left")), QUICK)
        with pytest.raises(HelexaError, match="RuntimeError: no threads left"):
            await life.start()
        assert not isinstance(life.error, ModelNotFound)

    run(work())
