"""Several models in one server: single-flight, room, leases, pins, idle times, failing loads, unloads in every phase."""

from __future__ import annotations

import asyncio

import pytest

from helexa_engine.errors import EngineDied, HelexaError, ModelDoesNotFit, UnsupportedCheckpoint
from helexa_server.errors import ServiceUnavailable
from helexa_server.lifecycle.model_life import Recovery

from .fake_models import Fleet, run, settle, until

SIZES = {"a": 40, "b": 40, "c": 40}


# -- Loading on request


def test_a_request_for_an_unloaded_model_loads_it_once_for_all_who_wait() -> None:
    """Hazard 20: load is single-flight per model."""

    async def work() -> None:
        fleet = Fleet(100, SIZES)
        fleet.sources["a"].gate.clear()
        holders = [fleet.holding("a") for _ in range(5)]
        await until(lambda: fleet.models["a"].life.progress == ("weights", 0.5))
        assert fleet.status("a") == "loading" and not holders[0].entered.is_set()
        fleet.sources["a"].gate.set()
        for holder in holders:
            await holder.entered.wait()
            await holder.leave()
        assert fleet.sources["a"].loads == 1 and fleet.status("a") == "ready"
        assert fleet.models["a"].reserved_bytes == 40 and not fleet.models["a"].leases
        await fleet.manager.close()
        assert fleet.machine.held == {} and fleet.manager.reserved_bytes == 0

    run(work())


def test_who_leaves_while_it_loads_leaves_the_load_to_the_others() -> None:
    async def work() -> None:
        fleet = Fleet(100, SIZES)
        fleet.sources["a"].gate.clear()
        first, second = fleet.holding("a"), fleet.holding("a")
        await until(lambda: fleet.sources["a"].loads == 1)
        await first.cancel()
        fleet.sources["a"].gate.set()
        await second.entered.wait()
        await second.leave()
        assert fleet.sources["a"].loads == 1 and not fleet.models["a"].leases

    run(work())


def test_a_load_that_takes_longer_than_a_request_waits() -> None:
    """Hazard 25: a transient state is 503 with Retry-After."""

    async def work() -> None:
        fleet = Fleet(100, SIZES, load_wait_seconds=0.01)
        fleet.sources["a"].gate.clear()
        error = await fleet.holding("a").over()
        assert isinstance(error, ServiceUnavailable) and error.retry_after_seconds >= 1
        assert fleet.status("a") == "loading", "it goes on for those who come again"
        fleet.sources["a"].gate.set()
        await until(lambda: fleet.status("a") == "ready")

    run(work())


def test_loads_come_one_after_the_other() -> None:
    async def work() -> None:
        fleet = Fleet(1000, SIZES)
        await asyncio.gather(*(fleet.manager.load(model) for model in fleet.models.values()))
        assert fleet.machine.most_loading == 1 and len(fleet.machine.held) == 3

    run(work())


def test_a_load_that_fails_tells_those_who_wait_and_is_tried_again_after_a_pause() -> None:
    async def work() -> None:
        fleet = Fleet(100, SIZES, retry_seconds=2.0)
        broken = UnsupportedCheckpoint("it is broken", "a.gguf")
        fleet.sources["a"].outcomes = [broken, None]
        holders = [fleet.holding("a") for _ in range(2)]
        assert [await holder.over() for holder in holders] == [broken, broken]
        life = fleet.models["a"].life
        assert life.status == "unloaded" and life.error is broken and fleet.sources["a"].loads == 1
        for _ in range(3):
            assert await fleet.holding("a").over() is broken
        assert fleet.sources["a"].loads == 1, "a broken file is not read for every request"
        fleet.machine.now += 2.0
        await fleet.use("a")
        assert life.status == "ready" and fleet.sources["a"].loads == 2

    run(work())


def test_who_asks_for_a_load_need_not_wait_for_the_pause() -> None:
    async def work() -> None:
        fleet = Fleet(100, SIZES, retry_seconds=1000.0)
        fleet.sources["a"].outcomes = [RuntimeError("no threads left")]
        with pytest.raises(HelexaError, match="no threads left"):
            await fleet.manager.load(fleet.models["a"])
        await fleet.manager.load(fleet.models["a"])
        assert fleet.status("a") == "ready"

    run(work())


def test_a_model_that_was_given_up_comes_back_when_it_is_loaded_on_demand() -> None:
    async def work() -> None:
        fleet = Fleet(100, SIZES, recovery=Recovery(limit=0))
        await fleet.use("a")
        fleet.sources["a"].engines[0].die(EngineDied("by hand"))
        await until(lambda: fleet.status("a") == "failed")
        assert fleet.models["a"].reserved_bytes == 0
        assert isinstance(await fleet.holding("a").over(), EngineDied)
        await fleet.manager.load(fleet.models["a"])
        assert fleet.status("a") == "ready"

    run(work())


# -- Making room


def test_the_least_recently_used_model_makes_room() -> None:
    async def work() -> None:
        fleet = Fleet(100, SIZES)
        await fleet.use("a")
        await fleet.use("b")
        await fleet.use("a")
        await fleet.use("c")
        assert [fleet.status(name) for name in SIZES] == ["ready", "unloaded", "ready"]
        assert [fleet.models[name].evictions for name in SIZES] == [0, 1, 0]
        await fleet.use("b")
        assert [fleet.status(name) for name in SIZES] == ["unloaded", "ready", "ready"]
        assert sum(fleet.machine.held.values()) == fleet.manager.reserved_bytes == 80

    run(work())


def test_as_many_make_room_as_it_takes_and_no_more() -> None:
    async def work() -> None:
        fleet = Fleet(100, {"a": 30, "b": 30, "c": 30, "big": 60, "small": 10})
        for name in ("a", "b", "c", "small"):
            await fleet.use(name)
        await fleet.use("big")
        assert [fleet.status(name) for name in ("a", "b", "c", "small")] == ["unloaded", "unloaded", "ready", "ready"]

    run(work())


def test_two_loads_in_a_row_without_memory_for_both() -> None:
    """Hazard 11: the second sees what the first has reserved, also before it has touched it."""

    async def work() -> None:
        fleet = Fleet(100, {"a": 60, "b": 60})
        first, second = fleet.holding("a"), fleet.holding("b")
        await first.entered.wait()
        await settle()
        assert fleet.status("b") == "loading" and fleet.sources["b"].loads == 0
        await first.leave()
        await second.entered.wait()
        assert fleet.status("a") == "unloaded" and fleet.machine.held.keys() == {id(fleet.sources["b"].engines[0])}
        await second.leave()

    run(work())


def test_a_model_in_use_is_waited_for_and_never_evicted() -> None:
    async def work() -> None:
        fleet = Fleet(100, {"a": 60, "b": 60}, load_wait_seconds=0.02)
        holder = fleet.holding("a")
        await holder.entered.wait()
        error = await fleet.holding("b").over()
        assert isinstance(error, ServiceUnavailable) and error.retry_after_seconds >= 1
        await until(lambda: fleet.status("b") == "unloaded")
        assert "models in use hold (a)" in str(fleet.models["b"].life.error)
        assert fleet.status("a") == "ready" and fleet.models["a"].evictions == 0
        await holder.leave()
        await fleet.use("b")
        assert fleet.status("b") == "ready", "no pause after that: it was no fault of the model's"

    run(work())


def test_what_waits_for_memory_lets_smaller_loads_go_ahead() -> None:
    async def work() -> None:
        fleet = Fleet(100, {"a": 60, "b": 60, "small": 10})
        holder = fleet.holding("a")
        await holder.entered.wait()
        waiting = fleet.holding("b")
        await until(lambda: fleet.models["b"].life.progress[0] == "waiting for memory")
        await fleet.use("small")
        assert fleet.status("small") == "ready" and not waiting.entered.is_set()
        await holder.leave()
        await waiting.entered.wait()
        await waiting.leave()

    run(work())


def test_idle_models_stay_where_unloading_them_would_not_help() -> None:
    async def work() -> None:
        fleet = Fleet(100, {"a": 60, "idle": 20, "b": 60}, load_wait_seconds=0.02)
        await fleet.use("idle")
        holder = fleet.holding("a")
        await holder.entered.wait()
        assert isinstance(await fleet.holding("b").over(), ServiceUnavailable)
        assert fleet.status("idle") == "ready"
        await holder.leave()

    run(work())


def test_what_can_never_fit_beside_the_pinned_is_told_at_once_with_the_bytes() -> None:
    async def work() -> None:
        fleet = Fleet(100, SIZES | {"big": 70}, {"a": {"pin": True}})
        await fleet.use("a")
        await fleet.use("b")
        error = await fleet.holding("big").over()
        assert isinstance(error, ModelDoesNotFit) and "unload a, which is pinned" in str(error)
        assert (error.needed_bytes, error.free_bytes) == (70, 60)
        assert fleet.status("b") == "ready", "nothing is unloaded in vain"
        fleet.machine.now += 10
        await fleet.manager.unload(fleet.models["a"])
        await fleet.use("big")
        assert fleet.status("big") == "ready" and fleet.status("b") == "unloaded"

    run(work())


def test_what_fits_no_empty_machine_is_told_by_the_load() -> None:
    async def work() -> None:
        fleet = Fleet(100, {"big": 120})
        error = await fleet.holding("big").over()
        assert isinstance(error, ModelDoesNotFit) and (error.needed_bytes, error.free_bytes) == (120, 100)

    run(work())


def test_pinned_models_stay() -> None:
    async def work() -> None:
        fleet = Fleet(100, SIZES, {"a": {"pin": True}})
        for name in ("a", "b", "c"):
            await fleet.use(name)
        assert [fleet.status(name) for name in SIZES] == ["ready", "unloaded", "ready"]
        await fleet.manager.load(fleet.models["c"], pin=True)
        await fleet.manager.load(fleet.models["a"], pin=False)
        await fleet.use("b")
        assert [fleet.status(name) for name in SIZES] == ["unloaded", "ready", "ready"]

    run(work())


def test_room_is_made_for_the_context_that_is_wanted_and_less_is_taken_where_there_is_no_more() -> None:
    async def work() -> None:
        fleet = Fleet(100, {"a": 30, "b": 30})
        fleet.sources["a"].wanted = fleet.sources["b"].wanted = 80
        await fleet.use("a")
        await fleet.use("b")
        assert fleet.status("a") == "unloaded" and fleet.models["b"].reserved_bytes == 80
        fleet = Fleet(100, {"a": 60, "b": 30})
        fleet.sources["b"].wanted = 80
        holder = fleet.holding("a")
        await holder.entered.wait()
        await fleet.use("b")
        assert fleet.status("b") == "ready" and fleet.models["b"].reserved_bytes == 40
        await holder.leave()

    run(work())


def test_a_load_that_may_evict_none_takes_what_is_left_or_says_what_is_missing() -> None:
    """As at the start of a server: its models unload none of each other."""

    async def work() -> None:
        fleet = Fleet(100, {"a": 60, "b": 30, "c": 30})
        fleet.sources["b"].wanted = 80
        for model in fleet.models.values():
            model.may_evict = False
        await fleet.use("a")
        await fleet.use("b")
        assert fleet.models["b"].reserved_bytes == 40
        error = await fleet.holding("c").over()
        assert isinstance(error, ModelDoesNotFit) and (error.needed_bytes, error.free_bytes) == (30, 0)
        assert "smaller max_model_len" in str(error)
        assert [fleet.status(name) for name in ("a", "b", "c")] == ["ready", "ready", "unloaded"]
        fleet.models["c"].may_evict = True
        fleet.machine.now += 10
        await fleet.use("c")
        assert [fleet.status(name) for name in ("a", "b", "c")] == ["unloaded", "ready", "ready"]

    run(work())


def test_memory_of_a_model_that_is_being_unloaded_is_not_free_before_it_has_gone() -> None:
    async def work() -> None:
        fleet = Fleet(100, {"a": 60, "b": 60})
        await fleet.use("a")
        fleet.sources["a"].engines[0].close_gate.clear()
        unloading = asyncio.create_task(fleet.manager.unload(fleet.models["a"]))
        await until(lambda: fleet.status("a") == "unloading")
        holder = fleet.holding("b")
        await settle()
        assert fleet.sources["b"].loads == 0 and fleet.models["a"].reserved_bytes == 60
        fleet.sources["a"].engines[0].close_gate.set()
        await unloading
        await holder.entered.wait()
        await holder.leave()

    run(work())


# -- Unloading


def test_unloading_lets_running_requests_end_and_later_ones_load_it_again() -> None:
    async def work() -> None:
        fleet = Fleet(100, SIZES)
        running = fleet.holding("a")
        await running.entered.wait()
        unloading = asyncio.create_task(fleet.manager.unload(fleet.models["a"]))
        await settle()
        late = fleet.holding("a")
        await settle()
        assert fleet.status("a") == "ready" and not late.entered.is_set() and not unloading.done()
        await running.leave()
        await unloading
        assert running.ended_with is None
        await late.entered.wait()
        assert fleet.sources["a"].loads == 2
        await late.leave()

    run(work())


def test_requests_that_run_on_are_ended_with_words() -> None:
    async def work() -> None:
        fleet = Fleet(100, SIZES)
        running = fleet.holding("a")
        await running.entered.wait()
        await fleet.manager.unload(fleet.models["a"], 0.01)
        error = await running.over()
        assert isinstance(error, ServiceUnavailable) and "model 'a' was unloaded" in error.message
        assert fleet.status("a") == "unloaded" and fleet.machine.held == {}

    run(work())


def test_unloading_while_it_loads_cancels_the_load() -> None:
    async def work() -> None:
        fleet = Fleet(100, SIZES)
        fleet.sources["a"].gate.clear()
        waiting = fleet.holding("a")
        await until(lambda: fleet.sources["a"].loads == 1)
        await fleet.manager.unload(fleet.models["a"])
        error = await waiting.over()
        assert isinstance(error, ServiceUnavailable) and "was unloaded" in error.message
        assert fleet.status("a") == "unloaded" and fleet.machine.loading == 0
        await fleet.use("b")  # nobody holds the turn

    run(work())


def test_unloading_while_it_recovers_ends_that() -> None:
    async def work() -> None:
        fleet = Fleet(100, SIZES, recovery=Recovery(backoff_seconds=60.0))
        await fleet.use("a")
        fleet.sources["a"].outcomes = [RuntimeError("no threads left")]  # so that the next try comes after the pause
        fleet.sources["a"].engines[0].die(EngineDied("by hand"))
        await until(lambda: fleet.status("a") == "recovering" and fleet.sources["a"].loads == 2)
        waiting = fleet.holding("a")
        await settle()
        await fleet.manager.unload(fleet.models["a"])
        assert isinstance(await waiting.over(), ServiceUnavailable) and fleet.status("a") == "unloaded"
        assert fleet.models["a"].reserved_bytes == 0

    run(work())


def test_unloading_twice_is_unloading_once_and_what_is_not_loaded_stays_so() -> None:
    async def work() -> None:
        fleet = Fleet(100, SIZES)
        await fleet.manager.unload(fleet.models["a"])
        await fleet.use("a")
        await asyncio.gather(*(fleet.manager.unload(fleet.models["a"]) for _ in range(3)))
        assert fleet.status("a") == "unloaded" and fleet.sources["a"].loads == 1

    run(work())


def test_an_unload_comes_to_its_end_when_nobody_waits_for_it() -> None:
    async def work() -> None:
        fleet = Fleet(100, SIZES)
        running = fleet.holding("a")
        await running.entered.wait()
        unloading = asyncio.create_task(fleet.manager.unload(fleet.models["a"], 0.01))
        await settle()
        unloading.cancel()
        await until(lambda: fleet.status("a") == "unloaded")
        assert isinstance(await running.over(), ServiceUnavailable) and not fleet.models["a"].is_leaving

    run(work())


# -- Idle times


def test_an_idle_model_is_unloaded_after_its_time() -> None:
    async def work() -> None:
        fleet = Fleet(100, SIZES, {"a": {"ttl_seconds": 10.0}, "b": {"ttl_seconds": 10.0, "pin": True}})
        for name in ("a", "b"):
            await fleet.use(name)
        fleet.machine.now = 5.0
        assert await fleet.manager.unload_idle() == 5.0
        holder = fleet.holding("a")
        await holder.entered.wait()
        fleet.machine.now = 100.0
        assert await fleet.manager.unload_idle() is None, "one in use is not idle"
        await holder.leave()
        assert await fleet.manager.unload_idle() == 10.0
        fleet.machine.now = 110.0
        assert await fleet.manager.unload_idle() is None
        assert (fleet.status("a"), fleet.status("b")) == ("unloaded", "ready")

    run(work())


def test_idle_models_are_looked_after_without_being_asked() -> None:
    async def work() -> None:
        fleet = Fleet(100, SIZES, {"a": {"ttl_seconds": 0.0}})
        keeping = asyncio.create_task(fleet.manager.keep())
        await fleet.use("a")
        await until(lambda: fleet.status("a") == "unloaded")
        keeping.cancel()

    run(work())


# -- Recoveries


def test_a_recovery_waits_for_its_turn_and_keeps_its_memory_meanwhile() -> None:
    async def work() -> None:
        fleet = Fleet(100, {"a": 60, "b": 30, "c": 30})
        await fleet.use("a")
        fleet.sources["b"].gate.clear()
        holder = fleet.holding("b")
        await until(lambda: fleet.sources["b"].loads == 1)
        leased = fleet.holding("a")
        await leased.entered.wait()
        fleet.sources["a"].engines[0].die(EngineDied("by hand"))
        await until(lambda: fleet.status("a") == "recovering")
        await settle()
        assert fleet.sources["a"].loads == 1 and fleet.models["a"].reserved_bytes == 60
        fleet.sources["b"].gate.set()
        await until(lambda: fleet.status("a") == "ready")
        assert fleet.models["a"].life.recoveries == 1 and fleet.machine.most_loading == 1
        await holder.leave()
        await leased.leave()

    run(work())


def test_counts_of_tokens_go_on_from_one_engine_to_the_next() -> None:
    async def work() -> None:
        fleet = Fleet(100, SIZES)
        for _ in range(2):
            await fleet.use("a")
            engine = fleet.sources["a"].engines[-1]
            engine.generation_tokens_total = 7
            assert fleet.models["a"].life.total("generation_tokens_total") == 7 * len(fleet.sources["a"].engines)
            await fleet.manager.unload(fleet.models["a"])
        assert fleet.models["a"].life.total("generation_tokens_total") == 14

    run(work())
