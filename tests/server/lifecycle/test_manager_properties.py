"""Random requests, loads, unloads, deaths and waits: whatever comes, no model in use is evicted and everyone who waits gets an end."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helexa_engine.errors import EngineDied, HelexaError, UnsupportedCheckpoint

from .fake_models import Fleet, Holder, run, settle

NAMES = ("a", "b", "c", "d")

OF_MODELS = ("load", "unload", "die", "break", "hold up", "let go")
OF_OTHERS = ("leave", "go", "later")
#: What happens, requests most often, and to which model, to which request, or how much later.
STEP = st.tuples(st.sampled_from(("request",) * 9 + OF_MODELS + OF_OTHERS * 2), st.integers(0, 7))


class Play:
    """Plays steps and checks after each what must hold."""

    def __init__(self, sizes: list[int], pinned: set[str]) -> None:
        named = {name: {"pin": name in pinned, "ttl_seconds": 3.0 if name == "d" else None} for name in NAMES}
        self.fleet = Fleet(
            100,
            dict(zip(NAMES, sizes, strict=True)),
            named,
            load_wait_seconds=0.05,
            unload_wait_seconds=0.0,
            retry_seconds=1.0,
        )
        self.holders: list[Holder] = []
        self.asking: list[asyncio.Task[Any]] = []
        self.forced: set[Holder] = set()  # whose model was unloaded on demand or died

    async def step(self, what: str, number: int) -> None:
        fleet = self.fleet
        argument: Any = number if what in OF_OTHERS else NAMES[number % len(NAMES)]
        if what == "request":
            self.holders.append(fleet.holding(argument))
        elif what in ("leave", "go") and argument < len(self.holders):
            holder = self.holders.pop(argument)
            await (holder.cancel() if what == "go" or not holder.entered.is_set() else holder.leave())
        elif what == "load":
            self.asking.append(asyncio.create_task(fleet.manager.load(fleet.models[argument])))
        elif what == "unload":
            self.forced.update(self.holders)
            self.asking.append(asyncio.create_task(fleet.manager.unload(fleet.models[argument])))
        elif what == "die" and fleet.models[argument].engine is not None:
            fleet.sources[argument].engines[-1].die(EngineDied("by hand"))
        elif what == "break":
            fleet.sources[argument].outcomes = [UnsupportedCheckpoint("it is broken", argument)]
        elif what == "hold up":
            fleet.sources[argument].gate.clear()
        elif what == "let go":
            fleet.sources[argument].gate.set()
        elif what == "later":
            fleet.machine.now += argument
            self.asking.append(asyncio.create_task(fleet.manager.unload_idle()))
        await settle()
        self.check()

    def check(self) -> None:
        machine, manager = self.fleet.machine, self.fleet.manager
        assert sum(machine.held.values()) <= machine.memory_bytes
        assert machine.loading <= 1, "loads come one after the other"
        for name, model in self.fleet.models.items():
            if model.engine is not None:
                assert model.reserved_bytes == model.engine.model_info.reserved_bytes
            elif model.life.status == "unloaded":
                assert model.reserved_bytes == 0
            serving = [holder for holder in self.holders if holder.name == name and holder.is_in]
            for holder in serving:
                engine = holder.engine
                assert engine is not None
                assert not engine.closed or engine.has_died or holder in self.forced, "evicted while in use"
            assert len(serving) <= len(model.leases)
        live = {
            id(model.engine): model.reserved_bytes for model in self.fleet.models.values() if model.engine is not None
        }
        assert live.items() <= machine.held.items()
        assert manager.reserved_bytes >= sum(live.values())

    async def end(self) -> None:
        """Everyone who waits comes to an end, and nothing is left."""
        for source in self.fleet.sources.values():
            source.gate.set()
        for holder in self.holders:
            await holder.leave()
        for outcome in await asyncio.gather(*self.asking, return_exceptions=True):
            assert outcome is None or isinstance(outcome, float | HelexaError), outcome
        await self.fleet.manager.close()
        assert self.fleet.machine.held == {} and self.fleet.manager.reserved_bytes == 0
        assert not any(model.leases or model.is_leaving for model in self.fleet.models.values())


@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.lists(st.sampled_from((20, 45, 60, 110)), min_size=4, max_size=4),
    pinned=st.sets(st.sampled_from(NAMES), max_size=1),
    steps=st.lists(STEP, min_size=5, max_size=25),
)
def test_no_model_in_use_is_evicted_and_everyone_gets_an_end(
    sizes: list[int], pinned: set[str], steps: list[tuple[str, int]]
) -> None:
    async def work() -> None:
        play = Play(sizes, pinned)
        for what, number in steps:
            await play.step(what, number)
        await play.end()

    run(work())
