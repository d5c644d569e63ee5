"""The server that runs, as the commands that talk to one find it, ask it and say what it answers. Quick to import."""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from typing import IO, Any, cast

from helexa_server.config import ServerConfig

from .. import env
from ..config import add_flags
from ..errors import HelexaError
from .options import UsageError, add_config_flag, resolve_config


class ServerAnswers(HelexaError):
    """No server answers, or not as one of ours does, or it refuses."""

    code = "server_error"


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="of the server, where it is not the one that the settings of this machine say")
    parser.add_argument("--json", action="store_true", help="for programs: what the server answers, as it is")
    add_config_flag(parser)
    add_flags(parser, ServerConfig, only=("host", "port"))


def url_of(server: ServerConfig) -> str:
    """Where a client on this machine reaches a server with these settings."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(server.host, server.host)
    return f"http://[{host}]:{server.port}" if ":" in host else f"http://{host}:{server.port}"


class RunningServer:
    """Asks the server at ``url``; ``key`` is sent where there is one."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url.rstrip("/")
        self._key = key
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> RunningServer:
        """The one that :func:`add_server_flags`, the environment and the configuration file say, with its admin's key, else a client's.

        Keys of files go to the server of the same configuration alone.

        Raises:
            UsageError, InvalidRequest.
        """
        given: str | None = arguments.url
        if given is not None:
            if not given.startswith(("http://", "https://")):
                raise UsageError(f"--url: expected http://HOST:PORT, got {given!r}")
            return cls(given, env.admin_key() or env.api_key())
        server = resolve_config(arguments, "server", ServerConfig)
        if server.port == 0:
            raise UsageError("port: expected the port of a server, got 0")
        keys = replace(server, insecure=True).keys()  # where it listens is its own affair
        return cls(url_of(server), keys.admin or next(iter(keys.clients), None))

    def get(self, path: str) -> Any:
        """The JSON at ``path``. Raises :class:`ServerAnswers`."""
        return self._json(path, None, 10.0)

    def post(self, path: str, body: Any) -> Any:
        """What it answers to ``body``, however long that takes. Raises :class:`ServerAnswers`."""
        return self._json(path, body, None)

    def events(self, path: str) -> Iterator[tuple[str, Any]]:
        """(name, data) of server-sent events, as they come, until the server ends them. Raises :class:`ServerAnswers`."""
        with self._open(path, None, None) as response:
            name = ""
            for line in response:
                field, _, value = line.decode().strip().partition(": ")
                if field == "event":
                    name = value
                elif field == "data":
                    yield name, json.loads(value)

    def _json(self, path: str, body: Any, timeout: float | None) -> Any:
        with self._open(path, body, timeout) as response:
            try:
                return json.load(response)
            except ValueError:
                raise self._not_ours() from None

    def _open(self, path: str, body: Any, timeout: float | None) -> IO[bytes]:
        headers = {"authorization": f"Bearer {self._key}"} if self._key else {}
        data = None if body is None else json.dumps(body).encode()
        if data is not None:
            headers["content-type"] = "application/json"
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            return cast(IO[bytes], self._opener.open(request, timeout=timeout))
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except OSError as error:
            why = getattr(error, "reason", error)
            raise ServerAnswers(
                f"no server answers on {self.url} ({why}); start one with `helexa serve`, or say where it is: --url, --port"
            ) from None
        except ValueError as error:
            raise ServerAnswers(f"{self.url}: {error}") from None

    def _refusal(self, error: urllib.error.HTTPError) -> ServerAnswers:
        try:
            said = json.load(error)["error"]
            message, code = str(said["message"]), str(said["code"])
        except (ValueError, KeyError, TypeError):
            return self._not_ours()
        hint = {
            "invalid_api_key": "; set HELEXA_API_KEY, or HELEXA_ADMIN_KEY",
            "permission_denied": "; set HELEXA_ADMIN_KEY",
        }
        return ServerAnswers(f"the server on {self.url} answers: {message}{hint.get(code, '')}")

    def _not_ours(self) -> ServerAnswers:
        return ServerAnswers(f"what answers on {self.url} is not helexa; is another program on that port? See --port")


def table(rows: list[tuple[str, ...]]) -> str:
    """Columns as wide as what stands in them; the first row is their titles. Numbers stand to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def aligned(text: str, width: int) -> str:
        return text.rjust(width) if text[:1].isdigit() or text == "-" else text.ljust(width)

    return "\n".join("  ".join(map(aligned, row, widths)).rstrip() for row in rows)


def seconds(value: float | None) -> str:
    """A time that has passed, as people say it: ``12 s``, ``3 min``, ``5 h``, ``2 d``."""
    if value is None:
        return "-"
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if value >= length:
            return f"{value / length:.0f} {unit}"
    return f"{value:.0f} s"


def size(count: float) -> str:
    """Bytes in the unit that suits."""
    if not count:
        return "-"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
