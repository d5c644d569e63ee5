"""The engine for servers: requests in, asynchronous iterators of events out. The model lives in a worker process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ..config import EngineConfig
from ..errors import EngineDied, HelexaError
from ..events import Event, Failed
from ..generate_request import GenerateRequest
from ..text.request_processor import RequestProcessor
from ..weights.checkpoint import open_checkpoint
from .exchange import EngineRequest, EngineStats, StepOutput
from .model_info import ModelInfo, Progress
from .request_events import RequestEvents, engine_request
from .text_side import request_processor
from .worker_process import WorkerProcess

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer


#: Outputs of one request that wait to be read, counted in tokens and the alternatives reported beside them: some tens of megabytes.
MAX_UNREAD = 1 << 18


class ReaderTooSlow(HelexaError):
    """The events of an answer were not read while the engine went on with it, so it was ended."""

    code = "reader_too_slow"


class _Inbox:
    """The outputs of one request, from the worker's thread to the reader's event loop. It is bounded: a reader that stays behind by
    more than ``limit`` gets :class:`ReaderTooSlow` after what waits. The engine itself never waits for a reader."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int, abort: Callable[[], None]) -> None:
        self._loop = loop
        self._limit = limit
        self._abort = abort
        self._queue: asyncio.Queue[StepOutput] = asyncio.Queue()
        self._received = 0  # the worker's thread alone writes this one
        self._read = 0  # and the event loop's this one
        self._is_full = False

    def put(self, output: StepOutput) -> None:
        """On the worker's thread."""
        if self._is_full:
            return
        self._received += _weight(output)
        if self._received - self._read > self._limit:
            self._is_full = True
            error = ReaderTooSlow(f"the answer was not read: more than {self._limit} tokens and alternatives wait")
            output = StepOutput(output.request_id, error=error)
            self._abort()
        self._loop.call_soon_threadsafe(self._queue.put_nowait, output)

    async def get(self) -> StepOutput:
        output = await self._queue.get()
        self._read += _weight(output)
        return output


def _weight(output: StepOutput) -> int:
    return 1 if output.logprobs is None else 1 + len(output.logprobs.top)


class AsyncEngine:
    """One loaded model, answering many requests at once.

    Text is this process's work, the model is the worker's: templates, tokens, stop strings and parsers here, ids there. What kills the
    worker costs this model and nothing else: :meth:`until_dead` tells, and a new engine is made.

    The constructor blocks while the model loads; :meth:`load` does not. The iterators may be used from any event loop.

    Args:
        model: see :class:`helexa_engine.LLM`.
        config: how to load and run it.
        progress: called with (stage, share done from 0 to 1), on another thread.
        watchdog_seconds: see :class:`~.worker_process.WorkerProcess`.

    Raises:
        ModelNotFound, UnsupportedCheckpoint, ModelDoesNotFit, InvalidRequest, BackendUnavailable, DownloadFailed.
        EngineDied: the worker process ended while it loaded.
    """

    def __init__(
        self,
        model: str | Path,
        config: EngineConfig | None = None,
        *,
        progress: Progress | None = None,
        watchdog_seconds: float = 120.0,
    ) -> None:
        self._worker = WorkerProcess(
            model, config or EngineConfig(), progress=progress, watchdog_seconds=watchdog_seconds
        )
        try:
            self._loaded(_processor(self._worker.located.result()), self._worker.loaded.result())
        except BaseException:
            self._worker.kill()
            raise

    @classmethod
    async def load(
        cls,
        model: str | Path,
        config: EngineConfig | None = None,
        *,
        progress: Progress | None = None,
        watchdog_seconds: float = 120.0,
        available_bytes: int | None = None,
    ) -> Self:
        """The engine of ``model`` once it is loaded. Cancelling this ends the worker. Raises as the constructor.

        ``available_bytes`` is what it may take its share of; default, and at most: what the machine has.
        """
        engine = cls.__new__(cls)
        engine._worker = WorkerProcess(
            model,
            config or EngineConfig(),
            progress=progress,
            watchdog_seconds=watchdog_seconds,
            available_bytes=available_bytes,
        )
        try:
            path = await asyncio.wrap_future(engine._worker.located)
            processor = await asyncio.to_thread(_processor, path)  # while the worker loads
            engine._loaded(processor, await asyncio.wrap_future(engine._worker.loaded))
        except BaseException:
            await asyncio.to_thread(engine._worker.kill)
            raise
        return engine

    def _loaded(self, processor: RequestProcessor, info: ModelInfo) -> None:
        self._processor = processor
        self.model_info = info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._processor.tokenizer

    @property
    def worker_pid(self) -> int | None:
        """The process that has the model."""
        return self._worker.pid

    def stats(self) -> EngineStats:
        """Gauges and counters as of the last step; never waits for the worker."""
        return self._worker.stats()

    async def encode_chat(self, request: GenerateRequest) -> list[int]:
        """Token ids of the request's messages as the model would get them.

        Raises:
            InvalidRequest, TemplateRenderFailed.
        """
        return await asyncio.to_thread(self._processor.encode_chat, request)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """The events of one request, as they come. Closing the iterator aborts the request within one step, in any phase.

        Raises:
            HelexaError: the request is refused or fails before its first event, or the engine is dead. What fails later comes as
                :class:`Failed`.
        """
        # Rendering and encoding a long prompt takes milliseconds that other streams would feel.
        asked, events = await asyncio.to_thread(self._prepare, request)
        abort = partial(self._worker.abort, request.request_id)
        inbox = _Inbox(asyncio.get_running_loop(), MAX_UNREAD, abort)
        self._worker.submit(asked, inbox.put)
        begun = False
        try:
            while not events.finished:
                for event in events.push(await inbox.get()):
                    if isinstance(event, Failed) and not begun:
                        raise event.error
                    begun = True
                    yield event
        finally:
            abort()

    def stop_thinking(self, request_id: str) -> bool:
        """Ends the reasoning of a running request, which goes on with its answer. False for an unknown id."""
        return self._worker.stop_thinking(request_id)

    async def until_dead(self) -> EngineDied:
        """Waits for the end of the worker process and says why it ended."""
        return await asyncio.wrap_future(self._worker.ended)

    async def aclose(self, timeout: float = 10.0) -> None:
        """Ends running requests with :class:`EngineDied` and frees the model, after the step under way; that is not waited for longer
        than ``timeout`` seconds."""
        await asyncio.to_thread(self._worker.close, timeout)

    def _prepare(self, request: GenerateRequest) -> tuple[EngineRequest, RequestEvents]:
        prepared = self._processor.prepare(request)
        asked = engine_request(request, prepared)
        asked.check(self.model_info.vocab_size, self.model_info.max_model_len)
        return asked, RequestEvents(self._processor, prepared, partial(self._worker.abort, request.request_id))


def _processor(path: Path) -> RequestProcessor:
    """The text side of the model at ``path``; whether it fits the model is for the worker to say."""
    with open_checkpoint(path) as checkpoint:
        return request_processor(checkpoint)
