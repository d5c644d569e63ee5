"""What a server's process and a worker process say to each other: small typed messages, MessagePack behind a length.

An error arrives as the very type that was raised, with all its fields; nothing is ever told by its text.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from ..config import EngineConfig
from ..errors import HelexaError
from .exchange import EngineRequest, EngineStats, StepOutput
from .model_info import ModelInfo

_LENGTH = struct.Struct("<I")


class _Message(msgspec.Struct, array_like=True, tag=True):
    pass


# -- To the worker


class Load(_Message):
    """The first message: what to load, how often to show life, what to log, and how many bytes are free at most."""

    model: str
    config: EngineConfig
    heartbeat_seconds: float
    log_level: int
    available_bytes: int | None = None


class Submit(_Message):
    request: EngineRequest


class Abort(_Message):
    """Ends a request, or one of its answers."""

    request_id: str
    index: int | None = None


class StopThinking(_Message):
    request_id: str


class Close(_Message):
    """End after the step under way."""


# -- From the worker


class LoadProgress(_Message):
    stage: str
    fraction: float


class Located(_Message):
    """Where the model is on disk; its weights are not loaded yet."""

    path: Path


class Loaded(_Message):
    info: ModelInfo
    stats: EngineStats


class Step(_Message):
    """All outputs of a step, and the figures after it."""

    outputs: list[StepOutput]
    stats: EngineStats


class Heartbeat(_Message):
    """The worker is alive; ``stats`` once it has loaded."""

    stats: EngineStats | None


class LogLine(_Message):
    logger: str
    level: int
    text: str


class Died(_Message):
    """The last message of a worker that ends by itself: what the load or the engine ended with."""

    error: HelexaError


ToWorker = Load | Submit | Abort | StopThinking | Close
FromWorker = LoadProgress | Located | Loaded | Step | Heartbeat | LogLine | Died


def _plain(value: Any) -> Any:
    """What MessagePack has no form for."""
    if isinstance(value, HelexaError):
        kind = type(value)
        return [kind.__module__, kind.__qualname__, value.code, vars(value)]
    return str(value) if isinstance(value, Path) else repr(value)


def _restore(kind: type, value: Any) -> Any:
    if kind is not HelexaError:
        return kind(value)
    module, name, code, fields = value
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    assert issubclass(found, HelexaError) and found.code == code
    error = found.__new__(found)
    Exception.__init__(error, fields["message"])
    vars(error).update(fields)
    return error


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker, dec_hook=_restore)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker, dec_hook=_restore)


def encode(message: ToWorker | FromWorker) -> bytes:
    """One message as it goes over the socket."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Cuts a stream of bytes into the messages that were encoded."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def push(self, data: bytes) -> Iterator[memoryview]:
        """The bodies of the messages that are complete with ``data``; each is valid until the next is asked for."""
        self._buffer += data
        start = 0
        with memoryview(self._buffer) as view:
            while len(view) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(view, start)
                end = start + _LENGTH.size + length
                if end > len(view):
                    break
                with view[start + _LENGTH.size : end] as body:
                    yield body
                start = end
        del self._buffer[:start]


def to_worker(body: memoryview) -> ToWorker:
    return _to_worker.decode(body)


def from_worker(body: memoryview) -> FromWorker:
    return _from_worker.decode(body)
