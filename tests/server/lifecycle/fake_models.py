"""Models whose loads take what a test says and when it says so: a server's worth of them over a memory of so many bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from helexa_engine.errors import HelexaError, ModelDoesNotFit
from helexa_engine.runtime.memory_need import MemoryNeed
from helexa_engine.testing.fake_engine import FakeEngine, FakeModelInfo
from helexa_server.lifecycle.budget import Budget
from helexa_server.lifecycle.manager import ModelManager
from helexa_server.lifecycle.model_life import Progress, Recovery
from helexa_server.served_model import ServedModel


class Machine:
    """Memory that engines hold, and a clock that stands unless it is moved.

    Attributes:
        held: bytes by the engines that live.
        most_loading: how many loads were ever under way at once.
    """

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self.held: dict[int, int] = {}
        self.loading = 0
        self.most_loading = 0
        self.now = 0.0

    @property
    def free_bytes(self) -> int:
        return self.memory_bytes - sum(self.held.values())

    def clock(self) -> float:
        return self.now


class MachineEngine(FakeEngine):
    """Holds memory until it is closed or dies."""

    def __init__(self, machine: Machine, reserved_bytes: int, script: Any) -> None:
        super().__init__(script, FakeModelInfo(reserved_bytes=reserved_bytes))
        self._machine = machine
        machine.held[id(self)] = reserved_bytes
        self.close_gate = asyncio.Event()
        self.close_gate.set()
        self.has_died = False

    def die(self, error: Any) -> None:
        self.has_died = True
        self._machine.held.pop(id(self), None)
        super().die(error)

    async def aclose(self, timeout: float = 10.0) -> None:
        await self.close_gate.wait()
        self._machine.held.pop(id(self), None)
        await super().aclose(timeout)


class FakeSource:
    """Needs ``size`` bytes at least, and wants ``wanted``; takes all of the latter that it may have.

    Attributes:
        gate: a load goes on once it is set.
        outcomes: what the next loads end with, None for an engine; then engines.
        engines: all there were.
        loads, plans: how often it was asked.
    """

    def __init__(self, machine: Machine, size: int, wanted: int | None = None, script: Any = ()) -> None:
        self._machine = machine
        self.size = size
        self.wanted = wanted or size
        self.script = script
        self.gate = asyncio.Event()
        self.gate.set()
        self.outcomes: list[Exception | None] = []
        self.engines: list[MachineEngine] = []
        self.loads = 0
        self.plans = 0

    async def need(self) -> MemoryNeed:
        self.plans += 1
        await asyncio.sleep(0)
        return MemoryNeed(self.size, self.wanted)

    async def load(self, available_bytes: int, progress: Progress) -> MachineEngine:
        self.loads += 1
        self._machine.loading += 1
        self._machine.most_loading = max(self._machine.most_loading, self._machine.loading)
        try:
            progress("weights", 0.5)
            await self.gate.wait()
            outcome = self.outcomes.pop(0) if self.outcomes else None
            if outcome is not None:
                raise outcome
            free = min(available_bytes, self._machine.free_bytes)
            if free < self.size:
                raise ModelDoesNotFit(self.size, free, "this machine")
            self.engines.append(MachineEngine(self._machine, min(self.wanted, free), self.script))
            return self.engines[-1]
        finally:
            self._machine.loading -= 1


class Fleet:
    """A manager over models on a machine.

    Args:
        memory_bytes: of the machine.
        sizes: of the models, by name.
        settings: of single models, by name.
    """

    def __init__(
        self,
        memory_bytes: int,
        sizes: dict[str, int],
        settings: dict[str, dict[str, Any]] | None = None,
        recovery: Recovery | None = None,
        **options: Any,
    ) -> None:
        self.machine = Machine(memory_bytes)
        self.sources = {name: FakeSource(self.machine, size) for name, size in sizes.items()}
        self.models = {
            name: ServedModel(name, source=source, **(settings or {}).get(name, {}))
            for name, source in self.sources.items()
        }
        self.budget = Budget(available=lambda: self.machine.free_bytes)
        self.manager = ModelManager(
            list(self.models.values()),
            self.budget,
            clock=self.machine.clock,
            recovery=recovery or Recovery(limit=2, backoff_seconds=0.0),
            **{"load_wait_seconds": 5.0, "unload_wait_seconds": 5.0, **options},
        )

    def status(self, name: str) -> str:
        return self.models[name].life.status

    async def use(self, name: str) -> None:
        """A request that comes and goes."""
        async with self.manager.lease(self.models[name]):
            pass
        self.machine.now += 1.0

    def holding(self, name: str) -> Holder:
        return Holder(self, name)


class Holder:
    """A request that lasts until it is told to end.

    Attributes:
        entered: set once it has its engine.
        engine: that engine.
        ended_with: the error it ended with.
    """

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.name = name
        self.engine: MachineEngine | None = None
        self.entered = asyncio.Event()
        self.ended_with: HelexaError | None = None
        self._leave = asyncio.Event()
        self._task = asyncio.create_task(self._hold(fleet, name))

    async def _hold(self, fleet: Fleet, name: str) -> None:
        try:
            async with fleet.manager.lease(fleet.models[name]) as engine:
                assert engine is fleet.sources[name].engines[-1]
                self.engine = fleet.sources[name].engines[-1]
                self.entered.set()
                await self._leave.wait()
        except HelexaError as error:
            self.ended_with = error

    @property
    def is_in(self) -> bool:
        """It has its engine, and has not left."""
        return self.engine is not None and not self._task.done()

    async def leave(self) -> None:
        """Also of one that waits: it goes as soon as it has its engine, or its error."""
        self._leave.set()
        await self._task

    async def over(self) -> HelexaError | None:
        """What it ended with, once it has."""
        await self._task
        return self.ended_with

    async def cancel(self) -> None:
        """The client goes."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def run(work: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await work

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def settle() -> None:
    """Everything that can go on without anyone's help has."""
    for _ in range(50):
        await asyncio.sleep(0)
