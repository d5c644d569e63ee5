"""The optional API key: ``Authorization: Bearer KEY`` or ``x-api-key: KEY``."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import InvalidApiKey, error_response

#: Probes of supervisors and load balancers, which hold no key, and learn nothing here but up or down.
OPEN_PATHS = frozenset({"/health", "/ready"})


class RequireApiKey:
    """ASGI middleware that answers 401 to every request without the key, also where no route matches."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self.app = app
        self.api_key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            return await self.app(scope, receive, send)
        sent = sent_key(Headers(scope=scope))
        if sent is None:
            reason = "no API key; send it as Authorization: Bearer KEY or as x-api-key: KEY"
        elif hmac.compare_digest(sent.encode(), self.api_key):
            return await self.app(scope, receive, send)
        else:
            reason = "wrong API key"
        await error_response(InvalidApiKey(reason))(scope, receive, send)


def sent_key(headers: Headers) -> str | None:
    """The key a client sent, bearer before ``x-api-key``; None when there is none."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return credentials.strip()
    return headers.get("x-api-key") or None
