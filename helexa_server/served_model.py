"""A model on offer: its names, its defaults, its life, and who holds it. And all of them by name."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from helexa_engine.errors import InvalidRequest, ModelNotFound
from helexa_engine.generate_request import GenerateRequest

from .errors import ServiceUnavailable
from .lifecycle.lease import Lease
from .lifecycle.model_life import Engine, ModelLife
from .lifecycle.model_source import ModelSource

#: What a client is told to wait when the server is about to end.
RETRY_AFTER_SECONDS = 5.0


class ServedModel:
    """One model under the names that clients use.

    Args:
        sampling: fields of :class:`SamplingParams`, for requests that leave them open; they come before the model's own.
        life: one that is led from outside; default: one that a :class:`~.lifecycle.manager.ModelManager` gives it with ``source``.
        source: where engines come from.
        aliases: further names; answers carry ``model_id`` whatever name was asked for.
        pin: whether it is never unloaded to make room, nor for want of requests.
        ttl_seconds: how long it stays loaded without a request; None: until its memory is needed.
        at_start: whether the server loads it when it starts.

    Attributes:
        leases: who uses it, or waits to.
        last_used: when one of them last left or the model was loaded, by the manager's clock.
        reserved_bytes: what it holds of the machine's memory, 0 while it is not loaded.
        evictions: how often it was unloaded to make room.
        retry_at: when a load that failed may be tried again for a request, by the manager's clock.
        may_evict: whether its load may unload others.
        is_leaving: it is about to be unloaded and takes no further request before it is.
    """

    def __init__(
        self,
        model_id: str,
        sampling: Mapping[str, Any] | None = None,
        life: ModelLife | None = None,
        *,
        source: ModelSource | None = None,
        aliases: Sequence[str] = (),
        pin: bool = False,
        ttl_seconds: float | None = None,
        at_start: bool = True,
    ) -> None:
        self.id = model_id
        self.sampling = dict(sampling or {})
        self.created = int(time.time())
        self.life = life or ModelLife()
        self.source = source
        self.aliases = tuple(aliases)
        self.pinned = pin
        self.ttl_seconds = ttl_seconds
        self.at_start = at_start
        self.leases: set[Lease] = set()
        self.last_used: float | None = None
        self.reserved_bytes = 0
        self.evictions = 0
        self.retry_at = 0.0
        self.may_evict = True
        self.is_leaving = False

    @property
    def engine(self) -> Engine | None:
        """The engine, or None while the model is not ready."""
        return self.life.engine

    def with_defaults(self, request: GenerateRequest) -> GenerateRequest:
        """``request`` with what it leaves open filled from this server's defaults for the model."""
        params = request.sampling_params
        filled = {name: value for name, value in self.sampling.items() if getattr(params, name) is None}
        return replace(request, sampling_params=replace(params, **filled)) if filled else request

    def unavailable(self) -> ServiceUnavailable:
        """What a request gets that has waited in vain."""
        words = {
            "recovering": "has died and is being loaded again",
            "unloaded": "is not loaded",
            "unloading": "is being unloaded",
        }
        return ServiceUnavailable(
            f"model {self.id!r} {words.get(self.life.status, 'is still loading')}", self.life.retry_after_seconds
        )


class ServedModels:
    """The models of one server by name and alias, in the order they were given."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        if not models:
            raise InvalidRequest("models", "expected at least one model")
        self._models = list(models)
        self._by_name: dict[str, ServedModel] = {}
        for model in models:
            for name in (model.id, *model.aliases):
                if name in self._by_name:
                    raise InvalidRequest(
                        "models", f"two models have the same name {name!r}: {self._by_name[name].id} and {model.id}"
                    )
                self._by_name[name] = model

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

    def find(self, name: str | None) -> ServedModel:
        """The model of this name or alias; without a name, the only one, or the only one that is loaded at the start.

        Raises:
            ModelNotFound, InvalidRequest.
        """
        if name:
            if name not in self._by_name:
                raise ModelNotFound(name, f"this server has {', '.join(model.id for model in self)}")
            return self._by_name[name]
        usual = [model for model in self if model.at_start]
        for candidates in (self._models, usual):
            if len(candidates) == 1:
                return candidates[0]
        raise InvalidRequest("model", f"name one of {', '.join(model.id for model in self)}")
