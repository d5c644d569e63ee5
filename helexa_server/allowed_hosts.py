"""Under which names the server answers: a guard against DNS rebinding.

A page of another site can have its own name resolve to 127.0.0.1, and the browser then takes this server for a part of that site: no
CORS rule stands in between. What gives such a page away is the name in ``Host``. Addresses are let through: a browser sends one only
for a page that came from that address.
"""

from __future__ import annotations

import ipaddress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .config import ServerConfig
from .errors import HostNotAllowed, error_response


class AllowedHosts:
    """ASGI middleware that answers 403 where ``Host`` has a name that is not this server's."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self.app = app
        self.names = config.host_names()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.names is not None:
            sent = Headers(scope=scope).get("host", "")
            name = host_name(sent)
            if not (is_address(name) or name.endswith(".localhost") or name in self.names):
                error = HostNotAllowed(
                    f"this server does not answer as {name!r:.80}; behind a proxy, or under a name of your own, "
                    f"name it with --allowed-hosts"
                )
                return await error_response(error, scope)(scope, receive, send)
        await self.app(scope, receive, send)


def host_name(host: str) -> str:
    """The name or address in a ``Host`` header: without port, brackets and final dot, in lower case."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().removesuffix(".")


def is_address(name: str) -> bool:
    """Whether ``name`` is an IP address, or empty: HTTP/1.0 without a ``Host``, which no browser speaks."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return not name
    return True
