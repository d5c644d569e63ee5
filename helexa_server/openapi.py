"""``/openapi.json``: the routes and their bodies, from the types that read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec

from helexa_engine.version import __version__

from . import endpoints, model_routes, status_page
from .metrics import CONTENT_TYPE
from .wire import anthropic_messages, openai_chat, openai_completions, openai_responses

REF = "#/components/schemas/{name}"


class Error(msgspec.Struct):
    """What went wrong. ``code`` is stable; facts such as ``prompt_len`` and ``max`` stand beside these fields."""

    message: str
    type: str
    code: str
    param: str | None


class ErrorEnvelope(msgspec.Struct):
    """What every error of an OpenAI-shaped route is answered with."""

    error: Error


class MessagesErrorEnvelope(msgspec.Struct):
    """The same in Anthropic's form, on ``/v1/messages`` and to callers that send ``anthropic-version``."""

    type: str
    error: Error


class TokenCount(msgspec.Struct):
    """How many tokens the prompt has."""

    input_tokens: int


class Prompt(msgspec.Struct):
    """The rendered prompt."""

    prompt: str
    count: int


class Tokens(msgspec.Struct):
    """Token ids of a text or of messages."""

    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizedText(msgspec.Struct):
    """The text of token ids, under both names."""

    prompt: str
    content: str


class Cancelled(msgspec.Struct):
    """How many requests were ended."""

    id: str
    cancelled: int


class Stopped(msgspec.Struct):
    """How many requests were told to answer."""

    id: str
    stopped: int


class Status(msgspec.Struct):
    """How one model is."""

    status: str


class ModelHealth(msgspec.Struct):
    """``status``: unloaded, loading, ready, recovering, failed or unloading. ``last_error``: what the model last died of, or what its load
    failed with."""

    id: str
    status: str
    recoveries: int
    last_error: str | None


class Health(msgspec.Struct):
    """That the process is up."""

    status: str
    models: list[ModelHealth]


class Version(msgspec.Struct):
    """Which server this is."""

    name: str
    version: str


class Model(msgspec.Struct):
    """``limit``, ``capabilities`` and ``max_model_len`` are there once the model is loaded, ``progress`` until then."""

    id: str
    object: str
    created: int
    owned_by: str
    status: str
    aliases: list[str]
    type: str
    display_name: str
    created_at: str
    progress: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    max_model_len: int | msgspec.UnsetType = msgspec.UNSET
    limit: dict[str, int] | msgspec.UnsetType = msgspec.UNSET
    capabilities: dict[str, bool] | msgspec.UnsetType = msgspec.UNSET


class ModelList(msgspec.Struct):
    """All models, in OpenAI's words and Anthropic's."""

    object: str
    data: list[Model]
    has_more: bool
    first_id: str
    last_id: str


class Discovery(msgspec.Struct):
    """The host and its devices. ``seconds_old`` is the age of the figures: those of a driver that does not answer are the last ones."""

    version: str
    host: dict[str, str]
    devices: list[dict[str, Any]]
    driver: dict[str, Any] | None
    cuda: dict[str, Any]
    seconds_old: float | None


@dataclass(frozen=True, slots=True)
class Operation:
    """One route.

    Attributes:
        summary: what it does, from the docstring of what does it.
        body: type of the JSON body; None for a route without one.
        answer: type of the JSON answer; None for an object of the wire format's own.
        failures: statuses beyond those that every route may have.
        media_types: what an answer may be.
    """

    method: str
    path: str
    summary: str
    body: type | None = None
    answer: type | None = None
    failures: tuple[int, ...] = ()
    media_types: tuple[str, ...] = ("application/json",)


_BODY = (400, 413, 415)  # a body can be bad, too long or no JSON
_MODEL = (404, 503)  # a model can be unknown, or loading for too long
_LOAD = (422,)  # or never load at all
_ANY = (401, 403, 431, 500)

#: Media type of a stream.
EVENTS = "text/event-stream"


def _first_line(documented: Any) -> str:
    return (documented.__doc__ or "").partition("\n")[0].replace("``", "")


def _generate(path: str, wire: Any, body: type) -> Operation:
    failures = (*_BODY, *_MODEL, *_LOAD, 429, 499)
    return Operation("post", path, _first_line(wire), body, None, failures, ("application/json", EVENTS))


def _post(path: str, handler: Callable[..., Any], body: type, answer: type | None, *failures: int) -> Operation:
    return Operation("post", path, _first_line(handler), body, answer, (*_BODY, *_MODEL, *_LOAD, *failures))


def _act(what: str, handler: Callable[..., Any], answer: type) -> Operation:
    path = f"/v1/requests/{{request_id}}/{what}"
    return Operation("post", path, _first_line(handler), None, answer, (404,))


def _get(path: str, handler: Callable[..., Any], answer: type | None, *failures: int) -> Operation:
    return Operation("get", path, _first_line(handler), None, answer, failures)


OPERATIONS = (
    _generate("/v1/chat/completions", openai_chat, openai_chat.ChatBody),
    _generate("/v1/completions", openai_completions, openai_completions.CompletionBody),
    _generate("/v1/responses", openai_responses, openai_responses.ResponsesBody),
    _generate("/v1/messages", anthropic_messages, anthropic_messages.MessagesBody),
    _post("/v1/messages/count_tokens", endpoints.count_tokens, anthropic_messages.MessagesBody, TokenCount),
    _post("/v1/embeddings", endpoints.embeddings, endpoints.EmbeddingsBody, None, 501),
    _post("/apply-template", endpoints.apply_template, openai_chat.ChatBody, Prompt),
    _post("/tokenize", endpoints.tokenize, endpoints.TokenizeBody, Tokens),
    _post("/detokenize", endpoints.detokenize, endpoints.DetokenizeBody, DetokenizedText),
    _act("cancel", endpoints.cancel_request, Cancelled),
    _act("stop-thinking", endpoints.stop_thinking, Stopped),
    _get("/v1/models", endpoints.list_models, ModelList),
    _get("/v1/models/{model_id}", endpoints.get_model, Model, 404),
    _get("/models", model_routes.get_models, model_routes.ModelsStatus),
    _post("/models/load", model_routes.load_model, model_routes.LoadBody, model_routes.ModelStatus),
    _post("/models/unload", model_routes.unload_model, model_routes.UnloadBody, model_routes.ModelStatus),
    Operation("get", "/models/events", _first_line(model_routes.model_events), media_types=(EVENTS,)),
    _get("/health", endpoints.health, Health),
    _get("/ready", endpoints.ready, Status, 503),
    _get("/version", endpoints.version, Version),
    _get("/discovery", endpoints.discovery, Discovery),
    Operation("get", "/", _first_line(status_page.status_page), media_types=(status_page.CONTENT_TYPE,)),
    Operation("get", "/metrics", _first_line(endpoints.get_metrics), media_types=(CONTENT_TYPE,)),
)

#: Lists whose items are read one by one, and what an item is.
_ITEMS: dict[tuple[type, str], type] = {
    (anthropic_messages.MessagesBody, "messages"): anthropic_messages.Message,
    (openai_responses.ResponsesBody, "input"): openai_responses.Item,
}


@cache
def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document of this server."""
    bodies = [operation.body for operation in OPERATIONS if operation.body]
    answers = [operation.answer for operation in OPERATIONS if operation.answer]
    types: list[type] = list(dict.fromkeys([*bodies, *answers, *_ITEMS.values(), ErrorEnvelope, MessagesErrorEnvelope]))
    schemas, components = msgspec.json.schema_components(types, ref_template=REF)
    schema_of = dict(zip(types, schemas, strict=True))
    for (body, field), item in _ITEMS.items():
        name = schema_of[body]["$ref"].rpartition("/")[2]
        property_ = components[name]["properties"][field]
        arrays = [branch for branch in property_.get("anyOf", [property_]) if branch.get("type") == "array"]
        arrays[0]["items"] = schema_of[item]
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {"title": "helexa", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "api_key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{}, {"bearer": []}, {"api_key": []}],
    }


def _operation(operation: Operation, schema_of: dict[type, Any]) -> dict[str, Any]:
    answer = schema_of[operation.answer] if operation.answer else {"type": "object"}
    # A stream has no schema: what is said of one would be read as said of each event.
    schema_by_type = {"application/json": {"schema": answer}, EVENTS: {}}
    content = {kind: schema_by_type.get(kind, {"schema": {"type": "string"}}) for kind in operation.media_types}
    envelope = MessagesErrorEnvelope if operation.path.startswith("/v1/messages") else ErrorEnvelope
    failure = {"description": "Error", "content": {"application/json": {"schema": schema_of[envelope]}}}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {
            "200": {"description": "Answer", "content": content},
            **{str(status): failure for status in sorted({*_ANY, *operation.failures})},
        },
    }
    if operation.body:
        json_body = {"application/json": {"schema": schema_of[operation.body]}}
        described["requestBody"] = {"required": True, "content": json_body}
    names = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    if names:
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in names
        ]
    return described
