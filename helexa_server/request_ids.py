"""The name of each request: the client's own, echoed, or one that is given; and the log line of those that generate nothing."""

from __future__ import annotations

import logging
import re
import time

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from helexa_engine.generate_request import new_request_id

from .errors import ERROR, RECORD
from .logs import log_fields
from .metrics import rejection

log = logging.getLogger("helexa_server.requests")

#: Keys in the ASGI scope: the name the client gave its request, if it did; the name the answer carries.
CLIENT_ID, REQUEST_ID = "helexa.client_id", "helexa.request_id"

#: Polled by supervisors, scrapers and the status page all day.
QUIET_PATHS = frozenset({"/", "/health", "/ready", "/metrics"})

_ACCEPTABLE = re.compile(r"[!-~]{1,128}")


class RequestIds:
    """ASGI middleware around everything else, so that every answer carries ``x-request-id``, whoever gives it.

    What a client calls its request stands in ``x-request-id`` too; words that do not fit a log line are not taken up.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        sent = Headers(scope=scope).get("x-request-id", "")
        scope[CLIENT_ID] = sent if _ACCEPTABLE.fullmatch(sent) else None
        scope[REQUEST_ID] = scope[CLIENT_ID] or new_request_id()
        started = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                name = scope[REQUEST_ID].encode()
                # Anthropic's clients look for their own header.
                ids = [(b"x-request-id", name), (b"request-id", name)]
                message = {**message, "headers": [*message.get("headers", ()), *ids]}
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            if RECORD not in scope and scope["path"] not in QUIET_PATHS:
                error = scope.get(ERROR)
                fields = {"id": scope[REQUEST_ID], "status": status, "seconds": time.monotonic() - started}
                if error is not None:
                    scope["app"].state.rejected[rejection(error)] += 1
                    fields["error"] = f"{error.code}: {error.message}"
                log_fields(log, f"{scope['method']} {Request(scope).url.path}", fields)
