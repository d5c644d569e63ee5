"""The HTTP application: the whole route table, and :func:`serve`, which ``helexa serve`` calls."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from helexa_engine.errors import HelexaError

from . import endpoints, model_routes, openapi, status_page
from .admission import Admission
from .allowed_hosts import AllowedHosts
from .auth import RequireApiKey
from .config import ServerConfig
from .devices import Devices
from .endpoints import Generate
from .energy import EnergyMeter
from .errors import HANDLERS, CannotListen
from .http_protocol import HttpProtocol
from .lifecycle.budget import Budget
from .lifecycle.card_memory import memory_of
from .lifecycle.catalogue import Catalogue
from .lifecycle.manager import ModelManager
from .lifecycle.model_events import ModelEvents
from .lifecycle.model_life import Recovery
from .lifecycle.model_source import WorkerSource
from .logs import configure_logging
from .metrics import ModelMetrics
from .request_ids import RequestIds
from .running_requests import RunningRequests
from .served_model import ServedModel, ServedModels
from .wire import anthropic_messages, openai_chat, openai_completions, openai_responses

log = logging.getLogger(__name__)


async def get_openapi(request: Request) -> Response:
    """This description of the server."""
    return endpoints.json_response(openapi.document())


ROUTES = [
    Route("/v1/chat/completions", Generate(openai_chat), methods=["POST"]),
    Route("/v1/completions", Generate(openai_completions), methods=["POST"]),
    Route("/v1/embeddings", endpoints.embeddings, methods=["POST"]),
    Route("/v1/responses", Generate(openai_responses), methods=["POST"]),
    Route("/v1/messages", Generate(anthropic_messages), methods=["POST"]),
    Route("/v1/messages/count_tokens", endpoints.count_tokens, methods=["POST"]),
    Route("/v1/models", endpoints.list_models),
    Route("/v1/models/{model_id:path}", endpoints.get_model),
    Route("/models", model_routes.get_models),
    Route("/models/load", model_routes.load_model, methods=["POST"]),
    Route("/models/unload", model_routes.unload_model, methods=["POST"]),
    Route("/models/events", model_routes.model_events),
    Route("/v1/requests/{request_id}/cancel", endpoints.cancel_request, methods=["POST"]),
    Route("/v1/requests/{request_id}/stop-thinking", endpoints.stop_thinking, methods=["POST"]),
    Route("/apply-template", endpoints.apply_template, methods=["POST"]),
    Route("/tokenize", endpoints.tokenize, methods=["POST"]),
    Route("/detokenize", endpoints.detokenize, methods=["POST"]),
    Route("/", status_page.status_page),
    Route("/openapi.json", get_openapi),
    Route("/health", endpoints.health),
    Route("/ready", endpoints.ready),
    Route("/version", endpoints.version),
    Route("/discovery", endpoints.discovery),
    Route("/metrics", endpoints.get_metrics),
]


#: Pages on this machine may read the answers, whatever port they come from; no other page may.
LOCAL_PAGES = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"


class App(Starlette):
    """Starlette with our layers around even its own error page: every answer has its id, and local pages may read it."""

    def build_middleware_stack(self) -> ASGIApp:
        shared = CORSMiddleware(
            super().build_middleware_stack(),
            allow_origin_regex=LOCAL_PAGES,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "request-id", "retry-after"),
        )
        return RequestIds(shared)


def create_app(models: Sequence[ServedModel], config: ServerConfig, budget: Budget | None = None) -> Starlette:
    """The ASGI application over ``models``, which may be loading or not loaded yet. Raises :class:`InvalidRequest`.

    ``budget`` is the memory that they may take; default: as ``config`` says.
    """
    keys = config.keys()
    middleware = [Middleware(AllowedHosts, config=config)]
    if keys:
        middleware.append(Middleware(RequireApiKey, keys=keys))
    app = App(routes=ROUTES, middleware=middleware, exception_handlers=HANDLERS)
    app.router.redirect_slashes = False
    app.state.config = config
    app.state.started = time.monotonic()
    app.state.models = ServedModels(models)
    app.state.manager = ModelManager(
        models,
        budget or Budget(config.memory_budget_bytes()),
        recovery=Recovery(config.recovery_limit, config.recovery_backoff_seconds),
        load_wait_seconds=config.load_wait_seconds,
        unload_wait_seconds=config.shutdown_seconds,
        retry_seconds=config.recovery_backoff_seconds,
    )
    app.state.running = RunningRequests()
    app.state.admission = Admission(config, keys)
    app.state.rejected = Counter()
    app.state.energy = EnergyMeter()
    app.state.devices = Devices()
    app.state.metrics = {model.id: ModelMetrics() for model in models}
    return app


def serve(catalogue: Catalogue, config: ServerConfig) -> int:
    """Listens, loads the models that are to be loaded at start, and serves until SIGINT or SIGTERM; 0 after an orderly end.

    The port is bound first: while models load, ``/health`` answers and requests wait. A server that is given one model to load ends
    with that one's error if it cannot be; of several it serves those that can be, and ends with the first one's error if none can.

    Raises:
        CannotListen: the port is in use or not ours to take.
        HelexaError: whatever loading a model raises.
    """
    configure_logging(config.log_format)
    return asyncio.run(_serve(catalogue, config))


async def _serve(catalogue: Catalogue, config: ServerConfig) -> int:
    models = [
        ServedModel(
            entry.id,
            entry.sampling,
            source=WorkerSource(entry.model, entry.engine, config.watchdog_seconds),
            aliases=entry.settings.aliases or (),
            pin=entry.settings.pin,
            ttl_seconds=entry.settings.ttl_seconds,
            at_start=entry.settings.load == "at start",
        )
        for entry in catalogue
    ]
    budget = Budget(config.memory_budget_bytes(), memory_of(entry.engine for entry in catalogue))
    app = create_app(models, config, budget)
    manager: ModelManager = app.state.manager
    with listen(config.host, config.port) as listener:
        server = Server(app, config)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.stop)
        at_start = [model for model in models if model.at_start]
        for model in at_start:
            model.may_evict = False  # of one another
            model.life.begin()  # now, so that whoever comes first finds it loading
        loading = asyncio.create_task(_load_at_start(manager, at_start))
        keeping = asyncio.create_task(manager.keep())
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        log.info("listening on %s", url(listener))
        try:
            await asyncio.wait((serving, loading), return_when=asyncio.FIRST_COMPLETED)
            if loading.done() and loading.exception() is not None:
                server.stop()
            await serving
        finally:
            loading.cancel()
            keeping.cancel()
            await asyncio.gather(loading, keeping, return_exceptions=True)
            await manager.close()
        if not loading.cancelled() and (error := loading.exception()) is not None:
            raise error
    return 0


async def _load_at_start(manager: ModelManager, models: Sequence[ServedModel]) -> None:
    """Loads them one after the other, each in the memory that those before it left and without unloading any. Raises the first error
    when none can be loaded."""

    async def load(model: ServedModel) -> HelexaError | None:
        try:
            await manager.load(model)
        except HelexaError as error:
            if len(models) > 1:
                log.error("%s cannot be loaded: %s", model.id, error)
            return error
        finally:
            model.may_evict = True
        log.info("%s is ready after %.1f s", model.id, model.life.load_seconds)
        return None

    errors = await asyncio.gather(*(load(model) for model in models))
    if errors and None not in errors:
        error = errors[0]
        assert error is not None
        raise error


def listen(host: str, port: int) -> socket.socket:
    """A bound, listening TCP socket. Raises :class:`CannotListen` that names the address and the way out."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise CannotListen(f"cannot resolve host {host!r}: {error.strerror}", host=host) from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise CannotListen(_bind_advice(error, host, port), host=host, port=port) from None
    return listener


def _bind_advice(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use; stop the program that holds it or choose another with --port"
    if error.errno == errno.EACCES:
        return f"port {port} on {host} needs privileges; choose one above 1023 with --port"
    return f"cannot listen on {host}, port {port}: {error.strerror}; choose another address with --host"


def url(listener: socket.socket) -> str:
    """The address people reach ``listener`` at."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn without its signal handlers, which end the process by the signal; :meth:`stop` ends it in good order."""

    def __init__(self, app: Starlette, config: ServerConfig) -> None:
        self._events: ModelEvents = app.state.manager.events
        super().__init__(
            uvicorn.Config(
                app,
                http=HttpProtocol,
                h11_max_incomplete_event_size=config.max_header_bytes,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=int(config.shutdown_seconds),
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the streams that would never end by themselves, and then what uvicorn ends."""
        self._events.close()
        await super().shutdown(sockets)

    def stop(self) -> None:
        """First call: no new connections, running requests have ``shutdown_seconds``. Second call: end now."""
        self.force_exit = self.should_exit
        self.should_exit = True
