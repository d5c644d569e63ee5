"""A model on offer: its name, its defaults, and its life."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from helexa_engine.errors import InvalidRequest, ModelNotFound
from helexa_engine.generate_request import GenerateRequest

from .errors import ServiceUnavailable
from .lifecycle.model_life import Engine, ModelLife

#: What a client is told to wait when the server is about to end.
RETRY_AFTER_SECONDS = 5.0


class ServedModel:
    """One model under the name that clients use. Requests that come before it is loaded wait in :meth:`ready`."""

    def __init__(self, model_id: str, sampling: Mapping[str, Any] | None = None, life: ModelLife | None = None) -> None:
        """``sampling`` are fields of :class:`SamplingParams`, for requests that leave them open; they come before the model's own."""
        self.id = model_id
        self.sampling = dict(sampling or {})
        self.created = int(time.time())
        self.life = life or ModelLife()

    @property
    def engine(self) -> Engine | None:
        """The engine, or None while the model is not ready."""
        return self.life.engine

    def with_defaults(self, request: GenerateRequest) -> GenerateRequest:
        """``request`` with what it leaves open filled from this server's defaults for the model."""
        params = request.sampling_params
        filled = {name: value for name, value in self.sampling.items() if getattr(params, name) is None}
        return replace(request, sampling_params=replace(params, **filled)) if filled else request

    async def ready(self, wait_seconds: float) -> Engine:
        """The engine, waiting for the load. Raises :class:`ServiceUnavailable`, or the error the load ended with."""
        try:
            return await self.life.until_ready(wait_seconds)
        except TimeoutError:
            raise self.unavailable() from None

    def unavailable(self) -> ServiceUnavailable:
        """What a request gets that has waited in vain."""
        words = {"recovering": "has died and is being loaded again", "unloaded": "is not loaded"}
        return ServiceUnavailable(
            f"model {self.id!r} {words.get(self.life.status, 'is still loading')}", self.life.retry_after_seconds
        )


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
