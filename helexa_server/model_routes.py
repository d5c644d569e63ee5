"""The routes that show, load and unload models. None waits for a device."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from helexa_engine.version import __version__

from . import sse
from .config import ServerConfig
from .endpoints import ClientGone, json_response, read_json_body, unless_disconnected
from .errors import RequestCancelled
from .lifecycle.manager import ModelManager
from .lifecycle.model_events import Listener
from .served_model import ServedModel, ServedModels
from .wire.frame import Frame, decode

Name = Annotated[str, msgspec.Meta(min_length=1)]


class LoadProgress(msgspec.Struct):
    stage: str
    fraction: float


class ModelStatus(msgspec.Struct):
    """A model as it is now.

    ``status``: unloaded, loading, ready, recovering, failed or unloading. ``error``: what the last load failed with, or what the model
    last died of. ``reserved_bytes``: the memory it holds, 0 while it is not loaded. ``idle_seconds``: null while it is used or not loaded.
    ``last_used``: seconds since 1970. Token counts are those since the server was started.
    """

    id: str
    aliases: list[str]
    status: str
    progress: LoadProgress | None
    error: str | None
    pinned: bool
    at_start: bool
    ttl_seconds: float | None
    idle_seconds: float | None
    last_used: float | None
    reserved_bytes: int
    max_model_len: int | None
    requests_running: int
    requests_waiting: int
    prompt_tokens: int
    generation_tokens: int
    tokens_per_second: float
    loads: int
    evictions: int
    recoveries: int
    load_seconds: float | None


class Memory(msgspec.Struct):
    """``total_bytes``: what all models may take together. ``free_bytes``: what another one may take now."""

    total_bytes: int
    reserved_bytes: int
    free_bytes: int


class ModelsStatus(msgspec.Struct):
    models: list[ModelStatus]
    memory: Memory
    version: str
    uptime_seconds: float


class LoadBody(msgspec.Struct):
    """``pin`` pins the model, or lets it go. Without ``wait`` the answer comes when the load is under way."""

    model: Name
    pin: bool | None = None
    wait: bool = True


class UnloadBody(msgspec.Struct):
    """Running requests have ``wait_seconds`` to end, by default those of the server's shutdown."""

    model: Name
    wait_seconds: Annotated[float, msgspec.Meta(ge=0)] | None = None


async def get_models(request: Request) -> Response:
    """Every model that this server may load, and how it is."""
    manager: ModelManager = request.app.state.manager
    models: ServedModels = request.app.state.models
    memory = Memory(manager.budget.total_bytes, manager.reserved_bytes, manager.free_bytes)
    listed = [_status(model, manager) for model in models]
    return json_response(ModelsStatus(listed, memory, __version__, time.monotonic() - request.app.state.started))


async def load_model(request: Request) -> Response:
    """Loads a model, unloading others where its memory is needed; answers when it is ready, or at once when told not to wait."""
    body = decode(await read_json_body(request), LoadBody)
    manager, model = _found(request, body.model)
    try:
        await unless_disconnected(request.receive, manager.load(model, pin=body.pin, wait=body.wait))
    except ClientGone:
        raise RequestCancelled("the client has gone; the load goes on") from None
    return json_response(_status(model, manager))


async def unload_model(request: Request) -> Response:
    """Unloads a model, or ends its load; a request for it has it loaded again."""
    body = decode(await read_json_body(request), UnloadBody)
    manager, model = _found(request, body.model)
    await manager.unload(model, body.wait_seconds)
    return json_response(_status(model, manager))


async def model_events(request: Request) -> Response:
    """Changes of models as they happen, as server-sent events: a snapshot of all first, then a model each."""
    manager: ModelManager = request.app.state.manager
    return EventStream(manager, request.app.state.config)


class EventStream(Response):
    """Until the client goes or the server ends."""

    def __init__(self, manager: ModelManager, config: ServerConfig) -> None:
        super().__init__()
        self._manager = manager
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": sse.HEADERS})

        async def write(body: bytes, more: bool = True) -> None:
            try:
                async with asyncio.timeout(self._config.stall_seconds):
                    await send({"type": "http.response.body", "body": body, "more_body": more})
            except TimeoutError:
                raise ClientGone from None

        async def run(listener: Listener) -> None:
            while True:
                try:
                    async with asyncio.timeout(self._config.keep_alive_seconds):
                        item = await listener.next()
                except TimeoutError:
                    await write(sse.encode(Frame(b"{}", "ping")))
                    continue
                if item is None:
                    return await write(b"", more=False)
                if isinstance(item, list):
                    frame = Frame(msgspec.json.encode({"models": item}), "snapshot")
                else:
                    frame = Frame(msgspec.json.encode(item), "model")
                await write(sse.encode(frame))

        with self._manager.events.listening() as listener:
            try:
                await unless_disconnected(receive, run(listener))
            except ClientGone:
                return


def _found(request: Request, name: str) -> tuple[ModelManager, ServedModel]:
    """Raises :class:`ModelNotFound`."""
    models: ServedModels = request.app.state.models
    return request.app.state.manager, models.find(name)


def _status(model: ServedModel, manager: ModelManager) -> ModelStatus:
    life, engine = model.life, model.engine
    stats = None if engine is None else engine.stats()
    since_used = manager.seconds_since_use(model)
    return ModelStatus(
        id=model.id,
        aliases=list(model.aliases),
        status=life.status,
        progress=LoadProgress(*life.progress) if life.status in ("loading", "recovering") else None,
        error=None if life.error is None else life.error.message,
        pinned=model.pinned,
        at_start=model.at_start,
        ttl_seconds=model.ttl_seconds,
        idle_seconds=manager.idle_seconds(model),
        last_used=None if since_used is None else time.time() - since_used,
        reserved_bytes=model.reserved_bytes,
        max_model_len=None if engine is None else engine.model_info.max_model_len,
        requests_running=0 if stats is None else stats.num_running,
        requests_waiting=sum(not held.is_serving for held in model.leases)
        + (0 if stats is None else stats.num_waiting),
        prompt_tokens=life.total("prompt_tokens_total"),
        generation_tokens=life.total("generation_tokens_total"),
        tokens_per_second=0.0 if stats is None else stats.decode_tokens_per_second,
        loads=life.loads,
        evictions=model.evictions,
        recoveries=life.recoveries,
        load_seconds=life.load_seconds,
    )
