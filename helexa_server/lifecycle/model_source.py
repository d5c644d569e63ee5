"""Where the engines of a model come from, and what memory they need."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from helexa_engine.config import EngineConfig

from .model_life import Engine, Progress

if TYPE_CHECKING:
    from helexa_engine.runtime.memory_need import MemoryNeed


class ModelSource(Protocol):
    """What :class:`~.manager.ModelManager` loads a model from."""

    async def need(self) -> MemoryNeed:
        """The memory that must be free. Raises :class:`HelexaError`."""
        ...

    async def load(self, available_bytes: int, progress: Progress) -> Engine:
        """A new engine, which takes its share of ``available_bytes``. Raises :class:`HelexaError`; cancelling leaves nothing."""
        ...


class WorkerSource:
    """A model that runs in a worker process of its own."""

    def __init__(self, model: str, config: EngineConfig, watchdog_seconds: float) -> None:
        self._model = model
        self._config = config
        self._watchdog_seconds = watchdog_seconds

    async def need(self) -> MemoryNeed:
        from helexa_engine.runtime.memory_need import memory_need

        return await asyncio.to_thread(memory_need, self._model, self._config)

    async def load(self, available_bytes: int, progress: Progress) -> Engine:
        from helexa_engine.runtime.async_engine import AsyncEngine

        engine: Engine = await AsyncEngine.load(
            self._model,
            self._config,
            progress=progress,
            watchdog_seconds=self._watchdog_seconds,
            available_bytes=available_bytes,
        )
        return engine
