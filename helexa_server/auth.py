"""Optional API keys: ``Authorization: Bearer KEY`` or ``x-api-key: KEY``."""

from __future__ import annotations

import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from helexa_engine.errors import HelexaError

from .config import Keys
from .errors import InvalidApiKey, PermissionDenied, error_response

#: Probes of supervisors and load balancers, which hold no key, and learn nothing here but up or down.
OPEN_PATHS = frozenset({"/health", "/ready"})

#: The page for people. Without a key it says nothing but that it wants one.
PAGE = "/"

#: What changes the server for everybody: loading, unloading and watching models.
ADMIN_PREFIX = "/models/"

#: Keys in the ASGI scope: who asks, as a fingerprint of the key; whether that is the admin key; whether a key is missing.
OWNER, IS_ADMIN, IS_LOCKED = "helexa.owner", "helexa.is_admin", "helexa.is_locked"


class RequireApiKey:
    """ASGI middleware that answers 401 to a request without a key, also where no route matches, and 403 without the admin's."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            return await self.app(scope, receive, send)
        sent = sent_key(Headers(scope=scope))
        refusal = self._refusal(sent, scope["path"])
        scope[IS_LOCKED] = refusal is not None
        if refusal is not None and (sent is not None or scope["path"] != PAGE):
            return await error_response(refusal, scope)(scope, receive, send)
        scope[OWNER] = None if sent is None else fingerprint(sent)
        scope[IS_ADMIN] = self._is_admin(sent)
        await self.app(scope, receive, send)

    def _refusal(self, sent: str | None, path: str) -> HelexaError | None:
        admin, client = self._is_admin(sent), _is_one_of(sent, self.keys.clients)
        needs_admin = self.keys.admin is not None and path.startswith(ADMIN_PREFIX)
        if admin or (client or not self.keys.clients) and not needs_admin:
            return None
        if sent is None:
            return InvalidApiKey("no API key; send it as Authorization: Bearer KEY or as x-api-key: KEY")
        return PermissionDenied("this needs the admin key") if client else InvalidApiKey("wrong API key")

    def _is_admin(self, sent: str | None) -> bool:
        return self.keys.admin is not None and _is_one_of(sent, (self.keys.admin,))


def _is_one_of(sent: str | None, keys: tuple[str, ...]) -> bool:
    """Whether ``sent`` is among ``keys``, in a time that tells nothing of them."""
    return sum(hmac.compare_digest((sent or "").encode(), key.encode()) for key in keys) > 0


def fingerprint(key: str) -> str:
    """What stands for a key wherever it need not be known."""
    return hashlib.sha256(key.encode()).hexdigest()


def sent_key(headers: Headers) -> str | None:
    """The key a client sent, bearer before ``x-api-key``; None when there is none."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return credentials.strip()
    return headers.get("x-api-key") or None
