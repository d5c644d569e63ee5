"""From errors to HTTP: the status of each kind, the nested envelope for all of them, and the errors only a server has."""

from __future__ import annotations

import logging
import math
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from helexa_engine.errors import (
    BackendUnavailable,
    EngineDied,
    HelexaError,
    InvalidRequest,
    ModelDoesNotFit,
    ModelNotFound,
    Overloaded,
    TemplateRenderFailed,
    UnsupportedCheckpoint,
)

from .wire import openai

log = logging.getLogger(__name__)

#: Key in the ASGI scope of a request whose endpoint writes its log line.
RECORD = "helexa.record"


class ServiceUnavailable(HelexaError):
    """The model is loading or the server is shutting down; try again after ``retry_after_seconds``."""

    code = "service_unavailable"

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message, retry_after_seconds=retry_after_seconds)
        self.retry_after_seconds = retry_after_seconds


class InvalidApiKey(HelexaError):
    """No key, or not the right one."""

    code = "invalid_api_key"


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
    InvalidApiKey: 401,
    ModelNotFound: 404,
    RouteNotFound: 404,
    MethodNotAllowed: 405,
    BodyTooLarge: 413,
    UnsupportedMediaType: 415,
    ModelDoesNotFit: 422,
    TemplateRenderFailed: 422,
    UnsupportedCheckpoint: 422,
    BackendUnavailable: 422,
    Overloaded: 429,
    HelexaError: 500,
    EngineDied: 500,
    ServiceUnavailable: 503,
}


def status_of(error: HelexaError) -> int:
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def error_response(error: HelexaError, headers: dict[str, str] | None = None) -> Response:
    """The envelope with its status, and ``Retry-After`` where the error says when to come back."""
    status = status_of(error)
    headers = dict(headers or {})
    retry_after = getattr(error, "retry_after_seconds", None)
    if retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(retry_after)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    body = msgspec.json.encode(openai.error_body(error, status))
    return Response(body, status, headers, media_type="application/json")


def as_helexa_error(error: Exception) -> HelexaError:
    """``error`` itself when it is one of ours; else the traceback goes to the log and :class:`InternalError` to the client."""
    if isinstance(error, HelexaError):
        return error
    log.error("internal error", exc_info=error)
    return InternalError("internal error; the server's log has the details")


async def on_helexa_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HelexaError)
    if RECORD not in request.scope:  # else the endpoint writes the line, with what it knows more
        log.info("%s %s rejected: %s: %s", request.method, request.url.path, error.code, error.message)
    return error_response(error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405, raised before a handler runs."""
    assert isinstance(error, HTTPException)
    kind = {404: RouteNotFound, 405: MethodNotAllowed}.get(error.status_code)
    if kind is None:
        return error_response(as_helexa_error(error))
    what = "no such route" if error.status_code == 404 else f"{request.method} is not allowed here"
    return error_response(kind(f"{request.url.path}: {what}"), dict(error.headers or {}))


async def on_exception(request: Request, error: Exception) -> Response:
    """Anything unforeseen. Starlette raises it again after this, so the server logs it once, with the traceback."""
    return error_response(InternalError("internal error; the server's log has the details"))


HANDLERS: dict[Any, Any] = {
    HelexaError: on_helexa_error,
    HTTPException: on_http_exception,
    Exception: on_exception,
}
