"""From errors to HTTP: the status of each kind, the nested envelope for all of them, and the errors only a server has."""

from __future__ import annotations

import logging
import math
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from helexa_engine.errors import (
    BackendUnavailable,
    DeviceOutOfMemory,
    EngineDied,
    HelexaError,
    InvalidRequest,
    ModelDoesNotFit,
    ModelNotFound,
    Overloaded,
    TemplateRenderFailed,
    UnsupportedCheckpoint,
)

from .wire import anthropic_messages, openai

log = logging.getLogger(__name__)

#: Keys in the ASGI scope: the record of a request whose endpoint writes its log line; the error a request ended with.
RECORD, ERROR = "helexa.record", "helexa.error"


class ServiceUnavailable(HelexaError):
    """The model is loading or the server is shutting down; try again after ``retry_after_seconds``."""

    code = "service_unavailable"

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message, retry_after_seconds=retry_after_seconds)
        self.retry_after_seconds = retry_after_seconds


class InsufficientQuota(HelexaError):
    """The tokens that the key may use are used up. Repeating does not help."""

    code = "insufficient_quota"


class InvalidApiKey(HelexaError):
    """No key, or not the right one."""

    code = "invalid_api_key"


class PermissionDenied(HelexaError):
    """The key is good, but not for this."""

    code = "permission_denied"


class HostNotAllowed(HelexaError):
    """The request names another host than this server."""

    code = "host_not_allowed"


class RequestNotFound(HelexaError):
    """No request that runs has this name, or none of this client's."""

    code = "request_not_found"


class RequestCancelled(HelexaError):
    """Somebody else ended the request."""

    code = "request_cancelled"


class HeadersTooLarge(HelexaError):
    """The request's headers exceed what is read of them."""

    code = "headers_too_large"


class NotHttp(HelexaError):
    """What came is no HTTP request."""

    code = "invalid_http"


class EmbeddingsUnsupported(HelexaError):
    """The model writes text and gives no embeddings."""

    code = "embeddings_unsupported"


class BodyTooLarge(HelexaError):
    """The request body exceeds ``max_body_bytes``."""

    code = "request_too_large"


class UnsupportedMediaType(HelexaError):
    """The body is not declared as JSON."""

    code = "unsupported_media_type"


class RouteNotFound(HelexaError):
    """No route has this path."""

    code = "not_found"


class MethodNotAllowed(HelexaError):
    """The route exists, for other methods."""

    code = "method_not_allowed"


class InternalError(HelexaError):
    """A fault of ours. The log has the traceback; the client gets none of it."""

    code = "internal_error"


class CannotListen(HelexaError):
    """The address to listen on cannot be had."""

    code = "cannot_listen"


#: Status by exception type, never by message text. A subclass without a row takes its parent's.
STATUS: dict[type[HelexaError], int] = {
    InvalidRequest: 400,
    NotHttp: 400,
    InvalidApiKey: 401,
    PermissionDenied: 403,
    HostNotAllowed: 403,
    ModelNotFound: 404,
    RouteNotFound: 404,
    RequestNotFound: 404,
    MethodNotAllowed: 405,
    BodyTooLarge: 413,
    UnsupportedMediaType: 415,
    ModelDoesNotFit: 422,
    TemplateRenderFailed: 422,
    UnsupportedCheckpoint: 422,
    BackendUnavailable: 422,
    Overloaded: 429,
    InsufficientQuota: 429,
    HeadersTooLarge: 431,
    RequestCancelled: 499,  # nginx's word; clients must not take it for something to repeat, as they do 409
    HelexaError: 500,
    EngineDied: 500,
    EmbeddingsUnsupported: 501,
    DeviceOutOfMemory: 503,
    ServiceUnavailable: 503,
}


def status_of(error: HelexaError) -> int:
    """The HTTP status of an error, by its type."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def error_body(error: HelexaError, scope: Scope) -> dict[str, Any]:
    """The envelope that the caller understands, also of errors raised before an endpoint, and so its wire, is known."""
    anthropic = scope["path"].startswith("/v1/messages") or "anthropic-version" in Headers(scope=scope)
    body = anthropic_messages.error_body if anthropic else openai.error_body
    return body(error, status_of(error))


def error_response(error: HelexaError, scope: Scope, headers: dict[str, str] | None = None) -> Response:
    """The envelope with its status, and ``Retry-After`` where the error says when to come back."""
    scope[ERROR] = error
    status = status_of(error)
    headers = dict(headers or {})
    retry_after = getattr(error, "retry_after_seconds", None)
    if retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(retry_after)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status == 501 or isinstance(error, InsufficientQuota):
        headers["x-should-retry"] = "false"  # clients repeat what ends with 429 or 5xx
    body = msgspec.json.encode(error_body(error, scope))
    return Response(body, status, headers, media_type="application/json")


def as_helexa_error(error: Exception) -> HelexaError:
    """``error`` itself when it is one of ours; else the traceback goes to the log and :class:`InternalError` to the client."""
    if isinstance(error, HelexaError):
        return error
    log.error("internal error", exc_info=error)
    return InternalError("internal error; the server's log has the details")


async def on_helexa_error(request: Request, error: Exception) -> Response:
    """One of ours, raised by an endpoint that has not answered yet."""
    assert isinstance(error, HelexaError)
    return error_response(error, request.scope)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405, raised before a handler runs."""
    assert isinstance(error, HTTPException)
    kind = {404: RouteNotFound, 405: MethodNotAllowed}.get(error.status_code)
    if kind is None:
        return error_response(as_helexa_error(error), request.scope)
    what = "no such route" if error.status_code == 404 else f"{request.method} is not allowed here"
    return error_response(kind(f"{request.url.path}: {what}"), request.scope, dict(error.headers or {}))


async def on_exception(request: Request, error: Exception) -> Response:
    """Anything unforeseen. Starlette raises it again after this, so the server logs it once, with the traceback."""
    return error_response(InternalError("internal error; the server's log has the details"), request.scope)


HANDLERS: dict[Any, Any] = {
    HelexaError: on_helexa_error,
    HTTPException: on_http_exception,
    Exception: on_exception,
}
