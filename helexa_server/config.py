"""How the HTTP server listens and what it lets through: :class:`ServerConfig`."""

from __future__ import annotations

import dataclasses
import ipaddress
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from helexa_engine import env
from helexa_engine.config import byte_size, check_fields, knob
from helexa_engine.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What one key may use. None: no limit.

    Attributes:
        requests_per_minute, tokens_per_minute: how fast it may ask; tokens are those of prompts, cached or not, and of answers.
        token_budget: tokens in all, since the server was started.
        priority: its requests are not more urgent than this (lower is earlier), whatever they ask for.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    token_budget: int | None = None
    priority: int | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Keys:
    """The keys a server takes. Without ``clients`` anyone may ask; without ``admin`` every client may do what an admin may.

    Attributes:
        limits: of the clients' keys that have some.
    """

    clients: tuple[str, ...] = ()
    admin: str | None = None
    limits: Mapping[str, KeyLimits] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.clients) or self.admin is not None


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Settings of ``helexa serve``. Field help is the documentation of each.

    Keys themselves are no fields, so that they never stand on a command line: see :meth:`keys`.
    """

    host: str = knob("127.0.0.1", "address to listen on; anything but loopback needs an API key or --insecure")
    port: int = knob(8080, "port to listen on; 0 takes any free one", low=0, high=65535)
    api_key_file: str | None = knob(
        None,
        "file with the keys clients may send, one a line, with limits behind it where it has some (docs/admission.md), readable by "
        "its owner alone; or set HELEXA_API_KEY",
    )
    admin_key_file: str | None = knob(
        None, "file with the key that /models/load and /models/unload take; or set HELEXA_ADMIN_KEY"
    )
    insecure: bool = knob(False, "listen beyond loopback without an API key")
    allowed_hosts: str | None = knob(
        None,
        "names clients may call this server by, with commas between; * for any; default: localhost when it listens on loopback, else any",
    )
    served_model_name: str | None = knob(None, "name clients use for the model; default: from its file, folder or id")
    max_body_bytes: int = knob(32 * 2**20, "largest request body accepted, in bytes", low=1024)
    max_header_bytes: int = knob(
        32 * 2**10, "largest request line and headers accepted, in bytes", low=1024, flag=False
    )
    load_wait_seconds: float = knob(60.0, "how long a request waits for a model that is loading", low=0)
    max_queued_requests: int = knob(
        512,
        "answers that may wait for each model beside those that run (max_num_seqs), whatever their length",
        low=0,
        flag=False,
    )
    max_queue_seconds: float = knob(
        600.0, "how long a request may wait for its turn before it is refused", low=0.01, flag=False
    )
    memory_budget: str | None = knob(
        None, "bytes that all models together may take, such as 20GiB; default: what is free before the first is loaded"
    )
    keep_alive_seconds: float = knob(
        10.0, "silence in a stream after which a no-op chunk is sent", low=0.01, flag=False
    )
    stall_seconds: float = knob(
        60.0, "how long a client may read nothing of a stream before it counts as gone", low=0.01, flag=False
    )
    watchdog_seconds: float = knob(
        120.0,
        "how long a model's process may take over a step of 64 tokens, or be silent, before it is killed and started again",
        low=0.1,
    )
    recovery_limit: int = knob(5, "times in a row that a model which dies is loaded again", low=0)
    recovery_backoff_seconds: float = knob(
        1.0,
        "pause before the second of them, the first is at once; each next one doubles it; also before a request repeats a load that failed",
        low=0.0,
        flag=False,
    )
    log_format: Literal["text", "json"] = knob("text", "how log lines look on stderr")
    shutdown_seconds: float = knob(10.0, "how long running requests may go on after a signal to stop", low=0)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.memory_budget is not None:
            self.memory_budget_bytes()

    def memory_budget_bytes(self) -> int | None:
        """``memory_budget`` in bytes. Raises :class:`InvalidRequest`."""
        if self.memory_budget is None:
            return None
        try:
            found = byte_size(self.memory_budget)
        except ValueError:
            found = 0
        if found <= 0:
            raise InvalidRequest("memory_budget", f"expected a size such as 20GiB, got {self.memory_budget!r}")
        return found

    def keys(self) -> Keys:
        """The keys to take, from the environment or else from files; none leaves the server open.

        Raises:
            InvalidRequest: a file is missing, empty or readable by others; or there is no key for clients and ``host`` is
                not loopback and ``insecure`` is not set.
        """
        client, admin = env.api_key(), env.admin_key()
        clients: dict[str, KeyLimits] = {} if client is None else {client: KeyLimits()}
        if client is None and self.api_key_file is not None:
            clients = _read_keys("api_key_file", self.api_key_file)
        if admin is None and self.admin_key_file is not None:
            admins = _read_keys("admin_key_file", self.admin_key_file)
            (admin, limits), *more = admins.items()
            if more or limits != KeyLimits():
                raise InvalidRequest(
                    "admin_key_file", f"expected one key in {self.admin_key_file} and no limits, got {1 + len(more)}"
                )
        if not clients and not self.insecure and not _is_loopback(self.host):
            raise InvalidRequest(
                "host",
                f"{self.host} is reachable from other machines and no API key is set; set HELEXA_API_KEY or "
                "--api-key-file, listen on 127.0.0.1, or pass --insecure to serve everybody who can connect",
            )
        return Keys(tuple(clients), admin, {key: limits for key, limits in clients.items() if limits != KeyLimits()})

    def host_names(self) -> frozenset[str] | None:
        """The names in a ``Host`` header that are this server's, in lower case; None where any is. Addresses are always.

        Beyond loopback a browser can do no more than anyone else who reaches the server, so there the default is any.
        """
        own = {"localhost", self.host.lower()}
        if self.allowed_hosts is None:
            return frozenset(own) if _is_loopback(self.host) else None
        given = {name.strip().lower().removesuffix(".") for name in self.allowed_hosts.split(",")}
        return None if "*" in given else frozenset(own | given - {""})


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What a table ``[models.NAME]`` may say beside settings of the engine, which come before those of ``[engine]`` there."""

    model: str | None = knob(
        None, "file, HuggingFace folder, hub id or demo; relative to the configuration file; default: NAME"
    )
    aliases: list[str] | None = knob(None, "further names that clients may use; answers carry NAME")
    pin: bool = knob(False, "never unload it to make room, nor for want of requests")
    ttl_seconds: float | None = knob(
        None, "unload it after so long without a request; default: when its memory is needed", low=0
    )
    load: Literal["at start", "on request"] = knob("on request", "when to load it")

    def __post_init__(self) -> None:
        check_fields(self)
        if not all(isinstance(alias, str) and alias for alias in self.aliases or ()):
            raise InvalidRequest("aliases", f"expected a list of names, got {self.aliases!r}")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name other than localhost may resolve to anything
        return False


def _read_keys(field: str, name: str) -> dict[str, KeyLimits]:
    """The keys in the lines of the file but empty ones and ``#`` comments, and their limits; at least one."""
    path = Path(name)
    try:
        mode = path.stat().st_mode
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(field, f"cannot read {path}: {error}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise InvalidRequest(field, f"{path} is open to other users; run: chmod 600 {path}")
    keys: dict[str, KeyLimits] = {}
    for number, line in enumerate(lines, 1):
        key, *limits = line.split() or ["#"]
        if key.startswith("#"):
            continue
        if not key.isprintable() or not key.isascii():
            raise InvalidRequest(field, f"{path}:{number}: expected a key of printable ASCII, one a line")
        keys[key] = _read_limits(field, f"{path}:{number}", limits)
    if not keys:
        raise InvalidRequest(field, f"expected {path} to hold keys, one a line; it has none")
    return keys


def _read_limits(field: str, place: str, words: list[str]) -> KeyLimits:
    """Limits as they stand behind a key: ``name=number``, each once."""
    names = [f.name for f in dataclasses.fields(KeyLimits)]
    limits: dict[str, int] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in names or name in limits:  # the word itself may be a part of the key, so it is not repeated
            raise InvalidRequest(
                field, f"{place}: expected one key a line, and behind it at most {'=N '.join(names)}=N, each once"
            )
        try:
            limits[name] = int(text)
        except ValueError:
            raise InvalidRequest(field, f"{place}: expected a whole number behind {name}=") from None
        if name != "priority" and limits[name] < 1:
            raise InvalidRequest(field, f"{place}: expected {name} of at least 1, got {limits[name]}")
    return KeyLimits(**limits)
