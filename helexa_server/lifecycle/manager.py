"""Loads the models of a server when they are asked for, makes room for them, and unloads what nobody uses."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial

from helexa_engine.errors import ModelDoesNotFit

from ..errors import ServiceUnavailable
from ..served_model import ServedModel
from .budget import Budget
from .lease import Lease
from .model_events import ModelEvents
from .model_life import Engine, ModelLife, ModelUnloaded, Progress, Recovery

log = logging.getLogger(__name__)

#: How long those that are told to leave a model have to abort their requests before its engine is closed.
_ABORT_SECONDS = 1.0


class ModelManager:
    """The one that loads, leases and unloads; for one event loop.

    Loads come one after the other, so that each sees the memory the ones before it left; recoveries too. A load whose model needs more
    than is free unloads others, the least recently used first, but none that is pinned or leased. Where leased ones stand in its way it
    lets other loads go ahead and tries again whenever something has changed, for ``load_wait_seconds``.

    Args:
        models: each with a ``source`` gets a life here; others are led from outside.
        load_wait_seconds: how long a request waits for its model, and a load for room.
        unload_wait_seconds: how long running requests may go on before an unload ends them.
        retry_seconds: a load that has failed is not tried again for a request before that.
        clock: for idle times and the pause above.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        budget: Budget,
        *,
        recovery: Recovery | None = None,
        load_wait_seconds: float = 60.0,
        unload_wait_seconds: float = 10.0,
        retry_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models = tuple(models)
        self.budget = budget
        self.events = ModelEvents(self._models)
        self._load_wait_seconds = load_wait_seconds
        self._unload_wait_seconds = unload_wait_seconds
        self._retry_seconds = retry_seconds
        self._clock = clock
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._unloads: dict[str, asyncio.Task[None]] = {}
        for model in models:
            if model.source is not None:
                model.life = ModelLife(partial(self._load_in_turn, model), recovery)
            model.life.on_change = partial(self._on_change, model)
            model.life.on_progress = partial(self.events.publish, model)

    @property
    def reserved_bytes(self) -> int:
        """What all models together have reserved."""
        return sum(model.reserved_bytes for model in self._models)

    @property
    def free_bytes(self) -> int:
        return self.budget.free(self.reserved_bytes)

    def idle_seconds(self, model: ServedModel) -> float | None:
        """How long nobody has used a loaded model; None while somebody does, or it is not loaded."""
        return None if model.leases or model.engine is None else self.seconds_since_use(model)

    def seconds_since_use(self, model: ServedModel) -> float | None:
        """How long ago somebody last used it or it was loaded; None if that never was."""
        return None if model.last_used is None else max(0.0, self._clock() - model.last_used)

    # -- Using

    @contextlib.asynccontextmanager
    async def lease(self, model: ServedModel) -> AsyncIterator[Engine]:
        """The engine of ``model``, which is loaded first if it is not; it is not unloaded to make room while this is open.

        Raises:
            ServiceUnavailable: it is not there in time; or it was unloaded on demand, in which case the body is cancelled.
            HelexaError: what the load failed with.
        """
        held = Lease()
        model.leases.add(held)
        try:
            engine = await self._ready(model)
            try:
                async with held.scope():
                    yield engine
            except TimeoutError:
                if held.is_ended:
                    raise self._unloaded(model) from None
                raise
        finally:
            model.leases.discard(held)
            model.last_used = self._clock()
            self._notify()

    async def _ready(self, model: ServedModel) -> Engine:
        if model.engine is not None and not model.is_leaving:
            return model.engine
        try:
            async with asyncio.timeout(self._load_wait_seconds):
                await self._until_left(model)
                if model.life.status == "unloaded" and model.life.can_load:
                    if self._clock() < model.retry_at and model.life.error is not None:
                        raise model.life.error.with_traceback(None)
                    model.life.begin()
                return await model.life.until_ready(None)
        except TimeoutError:
            raise model.unavailable() from None
        except ModelUnloaded:
            raise self._unloaded(model) from None

    def _unloaded(self, model: ServedModel) -> ServiceUnavailable:
        return ServiceUnavailable(f"model {model.id!r} was unloaded; ask again to have it loaded", 1.0)

    # -- Loading and unloading on demand

    async def load(self, model: ServedModel, *, pin: bool | None = None, wait: bool = True) -> None:
        """Loads a model that is not loaded, also one that was given up, and pins it or lets it go if ``pin`` says so.

        Returns when it is ready or, without ``wait``, when the load is under way.

        Raises:
            ServiceUnavailable: there is no room, and those that use it did not leave in time; or the model was unloaded meanwhile.
            HelexaError: what the load failed with.
        """
        if pin is not None and pin != model.pinned:
            model.pinned = pin
            self._on_change(model)
        await self._until_left(model)
        if model.life.can_load:
            model.life.begin()
        if wait:
            try:
                await model.life.until_ready(None)
            except ModelUnloaded:
                raise self._unloaded(model) from None

    async def unload(self, model: ServedModel, wait_seconds: float | None = None) -> None:
        """Unloads a model, from whatever state: a load is cancelled, running requests have ``wait_seconds`` to end (by default those of
        the server) and are then ended. Requests that come meanwhile wait, and have it loaded again.

        Comes to its end also when who waits for it is cancelled.
        """
        if model.life.status == "unloaded":
            return
        unloading = self._unloads.get(model.id)
        if unloading is None:
            model.is_leaving = True
            seconds = self._unload_wait_seconds if wait_seconds is None else wait_seconds
            unloading = self._unloads[model.id] = asyncio.create_task(self._unload(model, seconds))
        await asyncio.shield(unloading)

    async def _unload(self, model: ServedModel, wait_seconds: float) -> None:
        try:
            if not await self._until_unused(model, wait_seconds):
                for held in _serving(model):
                    held.end()
                await self._until_unused(model, _ABORT_SECONDS)
            await model.life.stop()
        finally:
            del self._unloads[model.id]
            model.is_leaving = False
            self._notify()

    async def _until_unused(self, model: ServedModel, seconds: float) -> bool:
        """Whether nobody uses the engine any more, at the latest after ``seconds``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while _serving(model):
                    await self._changed.wait()
        return not _serving(model)

    async def _until_left(self, model: ServedModel) -> None:
        while model.is_leaving or model.life.status == "unloading":
            await self._changed.wait()

    # -- Making room

    async def _load_in_turn(self, model: ServedModel, progress: Progress) -> Engine:
        """A load, or one of a recovery: when it is this one's turn and there is room."""
        assert model.source is not None
        try:
            async with contextlib.AsyncExitStack() as turn:
                available_bytes = await self._room(model, turn, progress)
                engine = await model.source.load(available_bytes, progress)
                model.reserved_bytes = engine.model_info.reserved_bytes
                model.last_used = self._clock()
                return engine
        except ServiceUnavailable:
            raise
        except Exception:
            model.retry_at = self._clock() + self._retry_seconds
            raise

    async def _room(self, model: ServedModel, turn: contextlib.AsyncExitStack, progress: Progress) -> int:
        """The bytes that ``model`` may take its share of; ``turn`` keeps other loads from them.

        Raises:
            ModelDoesNotFit: it never will, beside the models that are pinned.
            ServiceUnavailable: others are in use for too long.
        """
        deadline = asyncio.get_running_loop().time() + self._load_wait_seconds
        while True:
            async with contextlib.AsyncExitStack() as mine:
                progress("waiting for its turn", 0.0)
                await mine.enter_async_context(self._turn)
                changed = self._changed
                available_bytes = await self._make_room(model, progress)
                if available_bytes is not None:
                    await turn.enter_async_context(mine.pop_all())
                    return available_bytes
            progress("waiting for memory", 0.0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await changed.wait()
            if asyncio.get_running_loop().time() >= deadline:
                users = ", ".join(other.id for other in self._others(model) if other.reserved_bytes)
                raise ServiceUnavailable(
                    f"model {model.id!r} needs memory that models in use hold ({users}); try again later",
                    model.life.retry_after_seconds,
                )

    async def _make_room(self, model: ServedModel, progress: Progress) -> int | None:
        """Free bytes for ``model``, after unloading others where that helps; None when those that hold too much are in use."""
        assert model.source is not None
        if not any(other.reserved_bytes for other in self._others(model)):
            return self.budget.free(0)  # whether that is enough, the load itself says
        progress("planning", 0.0)
        need = await model.source.need()
        unpinned = self.budget.total_bytes - sum(other.reserved_bytes for other in self._others(model) if other.pinned)
        if need.least_bytes > unpinned:
            raise self._does_not_fit(model, need.least_bytes, unpinned)
        while True:
            for other in self._others(model):
                await self._until_left_memory(other)
            free = self.budget.free(sum(other.reserved_bytes for other in self._others(model)))
            if free >= need.wanted_bytes:
                return free
            if not model.may_evict:
                if free < need.least_bytes:
                    raise self._does_not_fit(model, need.least_bytes, free)
                return free
            idle = [other for other in self._others(model) if _may_be_evicted(other)]
            reachable = self.budget.total_bytes - sum(
                other.reserved_bytes for other in self._others(model) if other not in idle
            )
            if not idle or need.least_bytes > reachable:
                break
            await self._evict(min(idle, key=lambda other: other.last_used or 0.0), model)
        if free >= need.least_bytes:
            return free
        if not any(other.reserved_bytes and not other.pinned for other in self._others(model)):
            raise self._does_not_fit(model, need.least_bytes, free)
        return None

    def _others(self, model: ServedModel) -> Iterator[ServedModel]:
        return (other for other in self._models if other is not model)

    async def _until_left_memory(self, model: ServedModel) -> None:
        """A model that is being unloaded holds its memory to the end of that."""
        if model.life.status == "unloading":
            await model.life.stop()

    async def _evict(self, model: ServedModel, for_model: ServedModel) -> None:
        log.info("unloading %s to make room for %s", model.id, for_model.id)
        model.evictions += 1
        await model.life.stop()

    def _does_not_fit(self, model: ServedModel, needed_bytes: int, free_bytes: int) -> ModelDoesNotFit:
        pinned = ", ".join(other.id for other in self._others(model) if other.pinned and other.reserved_bytes)
        if pinned:
            advice = f"unload {pinned}, which is pinned"
        elif not model.may_evict:
            advice = "give those that are loaded before it a smaller max_model_len; a request for it unloads them"
        else:
            advice = "take a smaller model or a larger memory_budget"
        return ModelDoesNotFit(needed_bytes, max(0, free_bytes), "this server", advice)

    # -- Over time

    async def keep(self) -> None:
        """Unloads idle models as their time comes; until it is cancelled."""
        while True:
            changed = self._changed
            seconds = await self.unload_idle()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await changed.wait()

    async def unload_idle(self) -> float | None:
        """Unloads the models that were idle for their ``ttl_seconds``; how long until the next one may be, None if none will."""
        soonest: float | None = None
        for model in self._models:
            idle = self.idle_seconds(model)
            if model.ttl_seconds is None or model.pinned or idle is None:
                continue
            left = model.ttl_seconds - idle
            if left <= 0:
                log.info("unloading %s after %.0f idle seconds", model.id, idle)
                try:
                    await self.unload(model, 0.0)
                except Exception:  # the others' time comes all the same
                    log.exception("unloading %s failed", model.id)
            else:
                soonest = left if soonest is None else min(soonest, left)
        return soonest

    async def close(self) -> None:
        """Unloads everything; running requests end."""
        self.events.close()
        await asyncio.gather(*(model.life.stop() for model in self._models))

    # -- Telling

    def _on_change(self, model: ServedModel) -> None:
        if model.life.status in ("unloaded", "failed"):
            model.reserved_bytes = 0
        self.events.publish(model)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _serving(model: ServedModel) -> list[Lease]:
    return [held for held in model.leases if held.is_serving]


def _may_be_evicted(model: ServedModel) -> bool:
    return bool(model.reserved_bytes) and not (model.pinned or model.leases or model.is_leaving)
