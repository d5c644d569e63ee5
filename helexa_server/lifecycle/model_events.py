"""Changes of models as they happen, for those who watch: a picture of all first, then every change."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from ..served_model import ServedModel

#: Changes kept for a listener that does not take them; one that misses more gets a new picture instead.
MAX_BACKLOG = 256

#: Progress within a stage of a load is told no more often than this.
PROGRESS_SECONDS = 0.1


class ModelChange(msgspec.Struct, frozen=True):
    """How a model is now. ``stage`` and ``fraction`` say how far its load is; ``error`` what the last one, or the model, failed with."""

    model: str
    status: str
    stage: str
    fraction: float
    pinned: bool
    error: str | None


def change_of(model: ServedModel) -> ModelChange:
    stage, fraction = ("ready", 1.0) if model.engine is not None else model.life.progress
    error = model.life.error
    return ModelChange(
        model.id, model.life.status, stage, fraction, model.pinned, None if error is None else error.message
    )


#: What a listener takes: a change, all models at once, or None at the end.
Item = ModelChange | list[ModelChange] | None


class Listener:
    """The changes that one who watches has not taken yet."""

    def __init__(self, picture: Callable[[], list[ModelChange]]) -> None:
        self._picture = picture
        self._queue: asyncio.Queue[Item] = asyncio.Queue()
        self._queue.put_nowait(picture())

    async def next(self) -> Item:
        return await self._queue.get()

    def pending(self) -> list[Item]:
        """All that is there now."""
        return [self._queue.get_nowait() for _ in range(self._queue.qsize())]

    def put(self, item: ModelChange | None) -> None:
        if self._queue.qsize() >= MAX_BACKLOG:
            self.pending()
            self._queue.put_nowait(self._picture())  # which has this change too
            if item is not None:
                return
        self._queue.put_nowait(item)


class ModelEvents:
    """Tells every listener; none can hold up another."""

    def __init__(self, models: Sequence[ServedModel], clock: Callable[[], float] = time.monotonic) -> None:
        self._models = models
        self._clock = clock
        self._listeners: set[Listener] = set()
        self._told: dict[str, tuple[ModelChange, float]] = {}
        self._closed = False

    @property
    def num_listeners(self) -> int:
        return len(self._listeners)

    @contextlib.contextmanager
    def listening(self) -> Iterator[Listener]:
        listener = Listener(lambda: [change_of(model) for model in self._models])
        self._listeners.add(listener)
        if self._closed:
            listener.put(None)
        try:
            yield listener
        finally:
            self._listeners.remove(listener)

    def publish(self, model: ServedModel) -> None:
        """Tells how ``model`` is now, unless nothing but the progress of a stage has changed and that was told a moment ago."""
        if self._closed:
            return
        change, now = change_of(model), self._clock()
        if model.id in self._told:
            last, told_at = self._told[model.id]
            if change == last:
                return
            same = msgspec.structs.replace(last, fraction=change.fraction) == change
            if same and now - told_at < PROGRESS_SECONDS:
                return
        self._told[model.id] = change, now
        for listener in self._listeners:
            listener.put(change)

    def close(self) -> None:
        """Ends every stream of changes."""
        self._closed = True
        for listener in self._listeners:
            listener.put(None)
