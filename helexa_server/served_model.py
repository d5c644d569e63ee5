"""A model on offer: its name, and its engine once that is loaded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from helexa_engine.errors import HelexaError, InvalidRequest, ModelNotFound
from helexa_engine.events import Event
from helexa_engine.generate_request import GenerateRequest

from .errors import ServiceUnavailable

#: What a client is told to wait when a model is still loading.
RETRY_AFTER_SECONDS = 5.0


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

    async def aclose(self) -> None: ...


class ServedModel:
    """Holds the engine of one model. Requests that come before it is loaded wait in :meth:`ready`."""

    def __init__(self, model_id: str, sampling: Mapping[str, Any] | None = None) -> None:
        """``sampling`` are fields of :class:`SamplingParams`, for requests that leave them open; they come before the model's own."""
        self.id = model_id
        self.sampling = dict(sampling or {})
        self.created = int(time.time())
        self._settled = asyncio.Event()
        self._engine: Engine | None = None
        self._error: HelexaError | None = None
        self._progress = ("waiting", 0.0)
        self.load_seconds: float | None = None

    @property
    def engine(self) -> Engine | None:
        """The engine, or None while it is loading or when that failed."""
        return self._engine

    @property
    def progress(self) -> tuple[str, float]:
        """Stage of the load and the share of it that is done, 0 to 1."""
        return self._progress

    def with_defaults(self, request: GenerateRequest) -> GenerateRequest:
        """``request`` with what it leaves open filled from this server's defaults for the model."""
        params = request.sampling_params
        filled = {name: value for name, value in self.sampling.items() if getattr(params, name) is None}
        return replace(request, sampling_params=replace(params, **filled)) if filled else request

    def report(self, stage: str, fraction: float) -> None:
        """Notes how far the load is. May be called from any thread."""
        self._progress = (stage, fraction)

    def loaded(self, engine: Engine) -> None:
        self._engine = engine
        self._settled.set()

    def failed(self, error: HelexaError) -> None:
        self._error = error
        self._settled.set()

    async def ready(self, wait_seconds: float) -> Engine:
        """The engine, waiting for the load. Raises :class:`ServiceUnavailable`, or the error the load ended with."""
        try:
            async with asyncio.timeout(wait_seconds):
                await self._settled.wait()
        except TimeoutError:
            raise ServiceUnavailable(f"model {self.id!r} is still loading", RETRY_AFTER_SECONDS) from None
        if self._error is not None:
            raise self._error
        assert self._engine is not None
        return self._engine


class ServedModels:
    """The models of one server by name, in the order they were given."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = {model.id: model for model in models}
        if len(self._models) < len(models):
            raise InvalidRequest("models", f"two models have the same name: {', '.join(m.id for m in models)}")
        if not models:
            raise InvalidRequest("models", "expected at least one model")

    def __iter__(self) -> Any:
        return iter(self._models.values())

    def find(self, name: str | None) -> ServedModel:
        """The model of this name; without a name, the only one. Raises :class:`ModelNotFound`, :class:`InvalidRequest`."""
        if not name:
            if len(self._models) > 1:
                raise InvalidRequest("model", f"name one of {', '.join(self._models)}")
            return next(iter(self._models.values()))
        if name not in self._models:
            raise ModelNotFound(name, f"this server has {', '.join(self._models)}")
        return self._models[name]


def model_name(model: str) -> str:
    """The name clients use for ``model``: a file's stem, a folder's name, else the id as it is."""
    path = Path(model)
    if model.endswith(".gguf"):
        return path.stem
    return path.resolve().name if path.is_dir() else model
