"""The handlers. :class:`Generate` serves every wire format; the others describe the server and its models."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from helexa_engine.errors import HelexaError, InvalidRequest, Overloaded
from helexa_engine.events import Collector, Event, Failed
from helexa_engine.generate_request import GenerateRequest
from helexa_engine.version import __version__

from . import metrics, sse
from .admission import Admission, Place
from .auth import IS_ADMIN, OWNER
from .config import ServerConfig
from .devices import Devices
from .errors import (
    RECORD,
    BodyTooLarge,
    EmbeddingsUnsupported,
    RequestCancelled,
    RequestNotFound,
    ServiceUnavailable,
    UnsupportedMediaType,
    as_helexa_error,
    error_response,
    status_of,
)
from .lifecycle.manager import ModelManager
from .lifecycle.model_life import Engine
from .request_ids import CLIENT_ID, REQUEST_ID
from .request_record import RequestRecord
from .running_requests import RunningRequests, Steerable
from .served_model import RETRY_AFTER_SECONDS, ServedModel, ServedModels
from .wire import anthropic_messages, openai_chat
from .wire.frame import Call, Frame, Projection, Wire, decode

log = logging.getLogger(__name__)

Result = TypeVar("Result")


async def read_json_body(request: Request) -> bytes:
    """The body, at most ``max_body_bytes`` of it.

    JSON must be declared: browsers send undeclared or ``text/plain`` bodies to other sites, a loopback server among
    them, without asking. Raises :class:`UnsupportedMediaType`, :class:`BodyTooLarge`.
    """
    declared = request.headers.get("content-type", "")
    if declared.partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType(f"expected content-type application/json, got {declared!r:.80}")
    config: ServerConfig = request.app.state.config
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > config.max_body_bytes:
            raise BodyTooLarge(f"the body exceeds {config.max_body_bytes} bytes", max_bytes=config.max_body_bytes)
    return bytes(body)


def json_response(payload: Any, status: int = 200) -> Response:
    """``payload`` as JSON, of whatever msgspec encodes."""
    return Response(msgspec.json.encode(payload), status, media_type="application/json")


# -- Generating


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


async def unless_disconnected(receive: Receive, work: Awaitable[Result]) -> Result:
    """Awaits ``work``, and cancels it the moment the client goes. The request's body must be read. Raises :class:`ClientGone`."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


#: Events kept for a client that reads more slowly than the model writes; beyond them the request waits for it.
MAX_BACKLOG = 1024


class Generation:
    """The running requests of one call: their events merged as they come. Leaving the context aborts what still runs."""

    def __init__(self, model: ServedModel, requests: tuple[GenerateRequest, ...], manager: ModelManager) -> None:
        self._model = model
        self._requests = requests
        self._manager = manager
        self._events: asyncio.Queue[tuple[int, Event | None]] = asyncio.Queue(MAX_BACKLOG)
        self._tasks: list[asyncio.Task[None]] = []
        self._running = len(requests)

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._run(i, request)) for i, request in enumerate(self._requests)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cancel(self) -> None:
        """Ends the requests: :meth:`next` raises :class:`RequestCancelled` ahead of whatever has not been read."""
        for task in self._tasks:
            task.cancel()
        while not self._events.empty():
            self._events.get_nowait()
        self._events.put_nowait((0, Failed(RequestCancelled("the request was cancelled"))))

    def stop_thinking(self) -> None:
        """Ends the reasoning of those that are at it."""
        if (engine := self._model.engine) is not None:
            for request in self._requests:
                engine.stop_thinking(request.request_id)

    async def _run(self, prompt_index: int, request: GenerateRequest) -> None:
        try:
            async with (
                self._manager.lease(self._model) as engine,
                contextlib.aclosing(engine.generate(self._model.with_defaults(request))) as events,  # closing aborts it
            ):
                async for event in events:
                    await self._events.put((prompt_index, event))
        except Exception as error:
            await self._events.put((prompt_index, Failed(as_helexa_error(error))))
        await self._events.put((prompt_index, None))

    async def next(self) -> tuple[int, Event] | None:
        """The next event with the index of its prompt; None after the last. Raises the error of a :class:`Failed`."""
        while self._running:
            prompt_index, event = await self._events.get()
            if isinstance(event, Failed):
                raise event.error
            if event is not None:
                return prompt_index, event
            self._running -= 1
        return None


class Generate:
    """ASGI endpoint of one wire format: body > requests > events > frames, or one response."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        models: ServedModels = request.app.state.models
        try:
            call = self.wire.parse_request(await read_json_body(request))
        except ClientDisconnect:
            return
        model = models.find(call.model)
        admission: Admission = request.app.state.admission
        with admission.enter(model, scope.get(OWNER), call.requests) as place:
            await self._answer(call, model, place, scope, receive, send)

    async def _answer(
        self, call: Call, model: ServedModel, place: Place, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """The answer of a call that was let in."""
        request = Request(scope, receive)
        config: ServerConfig = request.app.state.config
        names = [asked.request_id for asked in call.requests]
        if (client_id := scope[CLIENT_ID]) is None:
            scope[REQUEST_ID] = names[0]
        else:
            names.append(client_id)
        record = scope[RECORD] = RequestRecord(
            request.url.path, model.id, names[0], request.app.state.metrics[model.id], client_id, place.spend
        )
        projector = self.wire.Projector(call, model.id, int(time.time()))
        stream = Stream(send, projector, config)
        generation = Generation(model, tuple(map(place.marked, call.requests)), request.app.state.manager)
        running: RunningRequests = request.app.state.running
        try:
            async with generation:
                with running.entered(names, scope.get(OWNER), generation):
                    if call.stream:
                        await unless_disconnected(receive, stream.run(generation, record))
                    else:
                        response = await unless_disconnected(receive, self._whole(call, model, generation, record))
                        await response(scope, receive, send)
        except ClientGone:
            record.client_gone = True
        except Exception as error:
            record.error = as_helexa_error(error)
            if isinstance(error, Overloaded):  # it was let in, and then there was no seat
                request.app.state.rejected[metrics.rejection(error)] += 1
            await stream.fail(record.error)
        except asyncio.CancelledError:  # the grace period of a shutdown is over
            record.error = ServiceUnavailable("the server is shutting down", RETRY_AFTER_SECONDS)
            await stream.fail(record.error)
        finally:
            record.close()

    async def _whole(self, call: Call, model: ServedModel, generation: Generation, record: RequestRecord) -> Response:
        """The non-streamed answer: the same events, collected."""
        collectors = [
            Collector(request.sampling_params.n, request.sampling_params.logprobs is not None)
            for request in call.requests
        ]
        while (item := await generation.next()) is not None:
            prompt_index, event = item
            record.push(event, prompt_index)
            collectors[prompt_index].push(event)
        results = [collector.result() for collector in collectors]
        return json_response(self.wire.build_response(call, results, model.id, int(time.time())))


class Stream:
    """Writes the frames of one call. The status goes out with the first frame, so what fails before it has its own status."""

    def __init__(self, send: Send, projector: Projection, config: ServerConfig) -> None:
        self._send = send
        self._projector = projector
        self._keep_alive_seconds = config.keep_alive_seconds
        self._stall_seconds = config.stall_seconds
        self._started = False

    async def run(self, generation: Generation, record: RequestRecord) -> None:
        """Writes every frame of ``generation``, keep-alives between them, and the last. Raises what the generation raises."""
        while (item := await self._next(generation)) is not None:
            prompt_index, event = item
            record.push(event, prompt_index)
            await self._write(self._projector.push(event, prompt_index))
        await self._write(self._projector.finish(), last=True)

    async def fail(self, error: HelexaError) -> None:
        """Ends the stream with the wire format's error; raises it where nothing has been sent."""
        if not self._started:
            raise error
        with contextlib.suppress(ClientGone):
            await self._write(self._projector.fail(error, status_of(error)), last=True)

    async def _next(self, generation: Generation) -> tuple[int, Event] | None:
        """The next item; meanwhile frames that change nothing after every silence."""
        while True:
            try:
                # A silence loses nothing: an item stays queued until it is taken.
                async with asyncio.timeout(self._keep_alive_seconds):
                    return await generation.next()
            except TimeoutError:
                await self._write(self._projector.keep_alive())

    async def _write(self, frames: list[Frame], last: bool = False) -> None:
        if not frames:
            return
        if not self._started:
            self._started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": sse.HEADERS})
        body = b"".join(map(sse.encode, frames))
        try:
            async with asyncio.timeout(self._stall_seconds):  # sending waits while the client does not read
                await self._send({"type": "http.response.body", "body": body, "more_body": not last})
        except TimeoutError:
            raise ClientGone from None


async def cancel_request(request: Request) -> Response:
    """Ends a request that runs, by the id its client gave it or by that of its answer."""
    found = _running(request)
    for running in found:
        running.cancel()
    return json_response({"id": request.path_params["request_id"], "cancelled": len(found)})


async def stop_thinking(request: Request) -> Response:
    """Ends the reasoning of a request that runs; it goes on with its answer."""
    found = _running(request)
    for running in found:
        running.stop_thinking()
    return json_response({"id": request.path_params["request_id"], "stopped": len(found)})


def _running(request: Request) -> list[Steerable]:
    """The client's requests by the name in the path. Raises :class:`RequestNotFound`."""
    name = request.path_params["request_id"]
    running: RunningRequests = request.app.state.running
    found = running.find(name, request.scope.get(OWNER), everyones=request.scope.get(IS_ADMIN, False))
    if not found:
        raise RequestNotFound(f"no request of yours goes by {name!r:.80} and still runs")
    return found


# -- Prompts, without an answer


async def count_tokens(request: Request) -> Response:
    """How many tokens the prompt of a Messages body has, as the model would get it."""
    call = anthropic_messages.parse_request(await read_json_body(request))
    async with _engine(request, call.model) as engine:
        return json_response({"input_tokens": len(await engine.encode_chat(call.requests[0]))})


async def apply_template(request: Request) -> Response:
    """The prompt that the model's template makes of a chat body, as text."""
    call = openai_chat.parse_request(await read_json_body(request))
    async with _engine(request, call.model) as engine:
        tokens = await engine.encode_chat(call.requests[0])
        prompt = await asyncio.to_thread(engine.tokenizer.decode, tokens)
    return json_response({"prompt": prompt, "count": len(tokens)})


# -- The server and its models


async def health(request: Request) -> Response:
    """The process is up, and how its models are. Never waits for a model."""
    models = [
        {
            "id": model.id,
            "status": model.life.status,
            "recoveries": model.life.recoveries,
            "last_error": None if model.life.error is None else model.life.error.message,
        }
        for model in request.app.state.models
    ]
    return json_response({"status": "ok", "models": models})


async def ready(request: Request) -> Response:
    """What is loaded at the start can serve; a model that could not be loaded beside others, or was unloaded since, holds nothing up."""
    at_start = [model for model in request.app.state.models if model.at_start]
    waiting = [model for model in at_start if model.engine is None and not model.life.is_unloaded]
    if not any(model.life.loads for model in at_start):
        waiting = at_start
    if waiting:
        stages = (
            f"{model.id} ({model.life.status}: {model.life.progress[0]}, {model.life.progress[1]:.0%})"
            for model in waiting
        )
        # Returned, not raised: a supervisor that polls is no rejected request to log.
        retry_after = max(model.life.retry_after_seconds for model in waiting)
        error = ServiceUnavailable(f"not ready: {', '.join(stages)}", retry_after)
        return error_response(error, request.scope)
    return json_response({"status": "ready"})


async def discovery(request: Request) -> Response:
    """What this host computes with, and why CUDA cannot be used where it cannot."""
    known: Devices = request.app.state.devices
    return json_response({"version": __version__, **await known.figures()})


async def version(request: Request) -> Response:
    """The server's name and version."""
    return json_response({"name": "helexa", "version": __version__})


async def get_metrics(request: Request) -> Response:
    """Prometheus' metrics of the server and its models."""
    state = request.app.state
    counted = ((model, state.metrics[model.id]) for model in state.models)
    text = metrics.render(counted, state.rejected, state.energy.joules())
    return Response(text, headers={"content-type": metrics.CONTENT_TYPE})


async def list_models(request: Request) -> Response:
    """The list in OpenAI's words and in Anthropic's at once."""
    data = [_model_body(model) for model in request.app.state.models]
    page = {"has_more": False, "first_id": data[0]["id"], "last_id": data[-1]["id"]}
    return json_response({"object": "list", "data": data, **page})


async def get_model(request: Request) -> Response:
    """One model: whether it is loaded, its limits and capabilities."""
    name = request.path_params["model_id"]
    return json_response(_model_body(_model(request, name))) if name else await list_models(request)


def _model_body(model: ServedModel) -> dict[str, Any]:
    body: dict[str, Any] = {
        "id": model.id,
        "object": "model",
        "type": "model",
        "display_name": model.id,
        "created": model.created,
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(model.created)),
        "owned_by": "helexa",
        "status": model.life.status,
        "aliases": model.aliases,
    }
    if model.engine is None:
        stage, fraction = model.life.progress
        body["progress"] = {"stage": stage, "fraction": fraction}
    else:
        body["max_model_len"] = model.engine.model_info.max_model_len
        body["limit"] = model.engine.model_info.limit
        body["capabilities"] = model.engine.model_info.capabilities
    return body


class TokenizeBody(msgspec.Struct):
    """vLLM calls the text ``prompt``, llama-server ``content``. With ``messages`` it is a chat body."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: list[dict[str, Any]] | None = None


class DetokenizeBody(msgspec.Struct):
    """Token ids whose text is asked for."""

    tokens: list[int]
    model: str | None = None


async def tokenize(request: Request) -> Response:
    """Token ids of a text as it is, without a template and with its special tokens as text; or of messages as the model gets them."""
    raw = await read_json_body(request)
    body = decode(raw, TokenizeBody)
    text = body.content if body.prompt is None else body.prompt
    if body.messages is None and text is None:
        raise InvalidRequest("prompt", "expected the text or the messages to tokenize")
    async with _engine(request, body.model) as engine:
        if body.messages is not None:
            tokens = await engine.encode_chat(openai_chat.parse_request(raw).requests[0])
        else:
            tokens = await asyncio.to_thread(engine.tokenizer.encode, text or "")
        return json_response({"tokens": tokens, "count": len(tokens), "max_model_len": engine.model_info.max_model_len})


async def detokenize(request: Request) -> Response:
    """Text of token ids, under vLLM's name and under llama-server's."""
    body = decode(await read_json_body(request), DetokenizeBody)
    async with _engine(request, body.model) as engine:
        for i, token_id in enumerate(body.tokens):
            if not 0 <= token_id < engine.model_info.vocab_size:
                raise InvalidRequest(
                    f"tokens[{i}]", f"expected a token id in [0, {engine.model_info.vocab_size}), got {token_id}"
                )
        text = await asyncio.to_thread(engine.tokenizer.decode, body.tokens)
    return json_response({"prompt": text, "content": text})


class EmbeddingsBody(msgspec.Struct):
    """What OpenAI's clients send."""

    input: str | list[Any]
    model: str | None = None


async def embeddings(request: Request) -> Response:
    """501: none of the models we know gives embeddings."""
    model = _model(request, decode(await read_json_body(request), EmbeddingsBody).model)
    raise EmbeddingsUnsupported(f"{model.id} writes text and gives no embeddings; ask a server with an embedding model")


def _engine(request: Request, name: str | None) -> AbstractAsyncContextManager[Engine]:
    """The engine of the model of this name, waiting for its load."""
    manager: ModelManager = request.app.state.manager
    return manager.lease(_model(request, name))


def _model(request: Request, name: str | None) -> ServedModel:
    models: ServedModels = request.app.state.models
    return models.find(name)
