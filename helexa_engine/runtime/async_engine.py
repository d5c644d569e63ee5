"""The engine for servers: requests in, asynchronous iterators of events out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import EngineConfig
from ..errors import EngineDied
from ..events import Event, Failed, Finished
from ..generate_request import GenerateRequest
from .engine import EngineStats
from .load import LoadedModel, ModelInfo, Progress, load_model

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer


class AsyncEngine:
    """One loaded model, answering many requests at once.

    Loading blocks: in a server call this in a thread. The iterators may be used from any event loop.

    Args:
        model: see :class:`helexa_engine.LLM`.
        config: how to load and run it.
        progress: called with (stage, share done from 0 to 1).

    Raises:
        ModelNotFound, UnsupportedCheckpoint, ModelDoesNotFit, InvalidRequest, BackendUnavailable.
    """

    def __init__(
        self, model: str | Path, config: EngineConfig | None = None, *, progress: Progress | None = None
    ) -> None:
        self._loaded = load_model(model, config or EngineConfig(), progress)
        self._loaded.warm_grammars()

    @classmethod
    def of(cls, loaded: LoadedModel) -> AsyncEngine:
        """Around a model that is loaded already."""
        engine = cls.__new__(cls)
        engine._loaded = loaded
        return engine

    @property
    def tokenizer(self) -> Tokenizer:
        return self._loaded.tokenizer

    @property
    def model_info(self) -> ModelInfo:
        return self._loaded.info

    def stats(self) -> EngineStats:
        """Gauges and counters; never waits for the device."""
        return self._loaded.thread.stats()

    async def encode_chat(self, request: GenerateRequest) -> list[int]:
        """Token ids of the request's messages as the model would get them.

        Raises:
            InvalidRequest, TemplateRenderFailed.
        """
        return await asyncio.to_thread(self._loaded.encode_chat, request)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """The events of one request, as they come. Closing the iterator aborts the request within one step, in any phase.

        Raises:
            HelexaError: the request is refused (before the first event), or the engine is dead. What fails later comes as
                :class:`Failed`.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[list[Event]] = asyncio.Queue()
        # Rendering and encoding a long prompt takes milliseconds that other streams would feel.
        engine_request, event_maker = await asyncio.to_thread(self._loaded.prepare, request)

        def deliver(events: list[Event]) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, events)

        unfinished = request.sampling_params.n
        self._loaded.thread.submit(engine_request, event_maker, deliver)
        try:
            while unfinished:
                for event in await queue.get():
                    if isinstance(event, Failed):
                        unfinished = 0
                    elif isinstance(event, Finished):
                        unfinished -= 1
                    yield event
        finally:
            self._loaded.thread.abort(request.request_id)

    def stop_thinking(self, request_id: str) -> bool:
        """Ends the reasoning of a running request, which goes on with its answer. False for an unknown id."""
        return self._loaded.thread.stop_thinking(request_id)

    async def aclose(self, timeout: float = 10.0) -> None:
        """Ends running requests with :class:`EngineDied` and frees the model.

        Raises:
            EngineDied: the step under way did not end within ``timeout`` seconds; its thread ends with the process.
        """
        if not await asyncio.to_thread(self._loaded.close, timeout):
            raise EngineDied(f"the engine did not stop within {timeout:g} seconds")
