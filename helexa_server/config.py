"""How the HTTP server listens and what it lets through: :class:`ServerConfig`."""

from __future__ import annotations

import ipaddress
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from helexa_engine import env
from helexa_engine.config import check_fields, knob
from helexa_engine.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Settings of ``helexa serve``. Field help is the documentation of each.

    The API key itself is no field, so that it never stands on a command line: see :meth:`api_key`.
    """

    host: str = knob("127.0.0.1", "address to listen on; anything but loopback needs an API key or --insecure")
    port: int = knob(8080, "port to listen on; 0 takes any free one", low=0, high=65535)
    api_key_file: str | None = knob(
        None, "file with the key clients must send, readable by its owner alone; or set HELEXA_API_KEY"
    )
    insecure: bool = knob(False, "listen beyond loopback without an API key")
    served_model_name: str | None = knob(None, "name clients use for the model; default: from its file, folder or id")
    max_body_bytes: int = knob(32 * 2**20, "largest request body accepted, in bytes", low=1024)
    load_wait_seconds: float = knob(60.0, "how long a request waits for a model that is loading", low=0)
    keep_alive_seconds: float = knob(10.0, "silence in a stream after which a no-op chunk is sent", low=0.01)
    log_format: Literal["text", "json"] = knob("text", "how log lines look on stderr")
    shutdown_seconds: float = knob(10.0, "how long running requests may go on after a signal to stop", low=0)

    def __post_init__(self) -> None:
        check_fields(self)

    def api_key(self) -> str | None:
        """The key clients must send, from ``HELEXA_API_KEY`` or ``api_key_file``; None leaves the server open.

        Raises:
            InvalidRequest: the file is missing, empty or readable by others; or there is no key and ``host`` is not
                loopback and ``insecure`` is not set.
        """
        key = env.api_key()
        if key is None and self.api_key_file is not None:
            key = _read_key(Path(self.api_key_file))
        if key is None and not self.insecure and not _is_loopback(self.host):
            raise InvalidRequest(
                "host",
                f"{self.host} is reachable from other machines and no API key is set; set HELEXA_API_KEY or "
                "--api-key-file, listen on 127.0.0.1, or pass --insecure to serve everybody who can connect",
            )
        return key


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name other than localhost may resolve to anything
        return False


def _read_key(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest("api_key_file", f"cannot read {path}: {error}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise InvalidRequest("api_key_file", f"{path} is open to other users; run: chmod 600 {path}")
    if not key or not key.isprintable() or not key.isascii() or " " in key:
        raise InvalidRequest("api_key_file", f"expected {path} to hold one line of printable ASCII without spaces")
    return key
