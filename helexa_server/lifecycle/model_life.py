"""The life of one model: loaded, ready, dead and loaded again, given up, unloaded. Nothing of HTTP here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from helexa_engine.errors import EngineDied, HelexaError
from helexa_engine.events import Event
from helexa_engine.generate_request import GenerateRequest

log = logging.getLogger(__name__)

Status = Literal["unloaded", "loading", "ready", "recovering", "failed", "unloading"]

#: What engines count; a model's counts go on from one engine to the next.
TOTALS = (
    "prompt_tokens_total",
    "generation_tokens_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "preemptions_total",
    "steps_total",
)

#: Called with (stage, share done); from any thread.
Progress = Callable[[str, float], None]


class Tokenizer(Protocol):
    def encode(self, text: str, /) -> list[int]: ...

    def decode(self, token_ids: Iterable[int], /) -> str: ...


class Engine(Protocol):
    """The part of :class:`helexa_engine.AsyncEngine` that the server needs."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def model_info(self) -> Any: ...

    async def encode_chat(self, request: GenerateRequest) -> list[int]: ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]: ...

    def stop_thinking(self, request_id: str) -> bool: ...

    def stats(self) -> Any: ...

    async def until_dead(self) -> EngineDied: ...

    async def aclose(self, timeout: float = ...) -> None: ...


class ModelUnloaded(HelexaError):
    """The model is not loaded, or it was unloaded while it was waited for."""

    code = "model_unloaded"


#: Loads a model; cancelling it leaves nothing behind.
Load = Callable[[Progress], Awaitable[Engine]]


@dataclass(frozen=True, slots=True)
class Recovery:
    """How often a model that dies is loaded again.

    Attributes:
        limit: times in a row; then it is given up.
        backoff_seconds: the first is at once; before the second is this pause, and each next one is twice as long, up to a minute.
        healthy_seconds: after so long without a death the count begins anew.
    """

    limit: int = 5
    backoff_seconds: float = 1.0
    healthy_seconds: float = 300.0

    def pause(self, attempt: int) -> float:
        """Seconds before attempt 1, 2 ..."""
        if attempt == 1:
            return 0.0
        return min(self.backoff_seconds * 2.0 ** (attempt - 2), max(self.backoff_seconds, 60.0))


class ModelLife:
    """Holds the engine of one model and loads it again when it dies.

    ``unloaded`` > ``loading`` > ``ready`` > (``recovering`` > ``ready``)* > ``failed``; and from anywhere > ``unloading`` > ``unloaded``.
    A load that fails at the first try leaves the model ``unloaded``, with its error; once the model was ready, a death or a load that
    fails is tried again, at once and then after pauses that double, as often in a row as ``recovery`` says. All but :meth:`report` are
    for one event loop.

    Args:
        load: gives a new engine; None for a life that is led from outside, by :meth:`loaded` and :meth:`failed`.

    Attributes:
        status: see above.
        engine: the engine while it is ``ready``, else None.
        progress: stage of the load and the share of it that is done, 0 to 1.
        error: what the model last died of, or what its load failed with; None if nothing ever happened.
        loads: how often a load, or a recovery, came to its end.
        recoveries: how often it has come back.
        recovery_seconds: from the death to ``ready``, of all recoveries together.
        load_seconds: of the last load.
        past: :data:`TOTALS` of the engines that have gone.
        on_change: called when ``status`` has changed.
        on_progress: called when ``progress`` has.
    """

    def __init__(self, load: Load | None = None, recovery: Recovery | None = None) -> None:
        self._load = load
        self._recovery = recovery or Recovery()
        self.status: Status = "unloaded" if load is not None else "loading"
        self.engine: Engine | None = None
        self.progress = ("waiting", 0.0)
        self.error: HelexaError | None = None
        self.loads = 0
        self.recoveries = 0
        self.recovery_seconds = 0.0
        self.load_seconds: float | None = None
        self.past: Counter[str] = Counter(dict.fromkeys(TOTALS, 0))
        self.on_change: Callable[[], None] = lambda: None
        self.on_progress: Callable[[], None] = lambda: None
        self._ended_with: HelexaError = ModelUnloaded("the model is not loaded")
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._retry_at = 0.0

    # -- What others ask for

    @property
    def is_unloaded(self) -> bool:
        """Or about to be."""
        return self.status in ("unloaded", "unloading")

    @property
    def can_load(self) -> bool:
        """False for a life that is led from outside."""
        return self._load is not None

    def begin(self) -> None:
        """Begins to load the model where it is ``unloaded`` or ``failed``; it is kept alive from then on."""
        if self.status in ("unloaded", "failed"):
            assert self._load is not None
            self._loop = asyncio.get_running_loop()
            self.progress = ("waiting", 0.0)
            self._change("loading")
            self._task = asyncio.create_task(self._live(self._load))

    async def start(self) -> None:
        """Loads the model, unless that is under way or done, and keeps it alive from then on; returns when it is ready.

        Raises:
            HelexaError: what the load failed with.
        """
        while self.status == "unloading":
            await self._changed.wait()
        self.begin()
        await self.until_ready(None)

    async def until_ready(self, seconds: float | None) -> Engine:
        """The engine, waiting for a load or a recovery for at most ``seconds``.

        Raises:
            TimeoutError: it is not ready yet.
            ModelUnloaded: nothing loads it, or it was unloaded meanwhile.
            HelexaError: what the load failed with, or why the model was given up.
        """
        async with asyncio.timeout(seconds):
            while self.engine is None:
                if self.status in ("failed", "unloaded"):
                    raise self._ended_with.with_traceback(None)  # raised again and again: it must not grow
                await self._changed.wait()
        return self.engine

    async def stop(self, timeout: float = 10.0) -> None:
        """Unloads the model, from whatever state; running requests end with :class:`EngineDied`. Takes little more than ``timeout``
        seconds, and comes to its end even when who waits for it is cancelled."""
        if self._stopping is None:
            if self.status == "unloaded":
                return
            engine = self._leave()
            self._change("unloading")
            self._stopping = asyncio.create_task(self._stop(engine, timeout))
        await asyncio.shield(self._stopping)

    async def _stop(self, engine: Engine | None, timeout: float) -> None:
        try:
            if self._task is not None:
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)
                self._task = None
            if engine is not None:
                await engine.aclose(timeout)
        finally:
            self._stopping = None
            self._end("unloaded", ModelUnloaded("the model was unloaded"))

    @property
    def retry_after_seconds(self) -> float:
        """When it is worth asking again: after the pause and a load like the last one."""
        pause = max(0.0, self._retry_at - time.monotonic()) if self.status == "recovering" else 0.0
        share = self.progress[1] if self.status == "loading" or pause == 0.0 else 0.0
        return pause + max(1.0, (self.load_seconds or 5.0) * (1.0 - share))

    def total(self, name: str) -> int:
        """One of :data:`TOTALS`, of all engines of this model."""
        return self.past[name] + (0 if self.engine is None else int(getattr(self.engine.stats(), name)))

    # -- Transitions

    def report(self, stage: str, fraction: float) -> None:
        """Notes how far the load is. May be called from any thread."""
        self.progress = (stage, fraction)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._progressed)

    def _progressed(self) -> None:
        self.on_progress()

    def loaded(self, engine: Engine) -> None:
        self.engine = engine
        self.loads += 1
        self._change("ready")

    def died(self, error: HelexaError) -> None:
        """The engine is gone, or a load to replace it failed, and another load will follow."""
        self._leave()
        self.error = error
        self.progress = ("recovering", 0.0)
        self._change("recovering")

    def failed(self, error: HelexaError) -> None:
        """The model is given up."""
        self._leave()
        self.error = error
        self._end("failed", error)

    def _leave(self) -> Engine | None:
        """The engine, which is no longer ours."""
        engine, self.engine = self.engine, None
        if engine is not None:
            stats = engine.stats()
            self.past.update({name: getattr(stats, name) for name in TOTALS})
        return engine

    def _end(self, status: Status, error: HelexaError) -> None:
        self._ended_with = error
        self._change(status)

    def _change(self, status: Status) -> None:
        self.status = status
        self._changed.set()
        self._changed = asyncio.Event()
        self.on_change()

    # -- Keeping it alive

    async def _live(self, load: Load) -> None:
        attempt = 0
        died_at: float | None = None
        while True:
            started = time.monotonic()
            try:
                engine = await load(self.report)
            except Exception as caught:
                error = _as_helexa_error(caught)
                if died_at is None:
                    self.error = error
                    self._end("unloaded", error)
                    return
            else:
                ready_at = time.monotonic()
                self.load_seconds = ready_at - started
                if died_at is not None:
                    self.recoveries += 1
                    self.recovery_seconds += ready_at - died_at
                self.loaded(engine)
                error = await engine.until_dead()
                died_at = time.monotonic()
                if died_at - ready_at >= self._recovery.healthy_seconds:
                    attempt = 0
            attempt += 1
            if attempt > self._recovery.limit:
                self.failed(
                    EngineDied(
                        f"the model was given up after {self._recovery.limit} recoveries in a row; load it again (helexa "
                        f"load) or restart the server once the cause is mended. It last ended so: {error.message}",
                        **error.facts,
                    )
                )
                log.error("%s", self.error)
                return
            pause = self._recovery.pause(attempt)
            self._retry_at = time.monotonic() + pause
            self.died(error)
            log.error(
                "%s; loading the model again in %.3g s (try %d of %d)", error, pause, attempt, self._recovery.limit
            )
            await asyncio.sleep(pause)


def _as_helexa_error(error: Exception) -> HelexaError:
    if isinstance(error, HelexaError):
        return error
    log.error("loading failed", exc_info=error)
    failure = HelexaError(f"loading failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
