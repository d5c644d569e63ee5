"""The one exception family of helexa.

Every error that outside input can cause is a :class:`HelexaError`: it has a stable ``code`` (used verbatim on the wire and
safe to match on), a message that says what was expected, what came and what to do, and ``facts`` (numbers and names that a
program may want without parsing the message). ``assert`` is for our own logic only.
"""

from __future__ import annotations

from typing import Any, ClassVar


class HelexaError(Exception):
    """Base of all errors helexa raises on purpose.

    Attributes:
        code: stable machine-readable word, the same in Python and in HTTP error bodies.
        facts: JSON-serialisable details (byte counts, limits, names).
    """

    code: ClassVar[str] = "helexa_error"

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        self.facts: dict[str, Any] = facts


class InvalidRequest(HelexaError):
    """A parameter or request field has a bad value. ``path`` names the field (``sampling_params.top_p``, ``messages[2].role``)."""

    code = "invalid_request"

    def __init__(self, path: str, reason: str, **facts: Any) -> None:
        super().__init__(f"{path}: {reason}", **facts)
        self.path = path
        self.reason = reason


class ContextLengthExceeded(InvalidRequest):
    """The prompt does not fit the context. Agents look for the words "prompt is too long: N tokens > M maximum"."""

    code = "context_length_exceeded"

    def __init__(self, prompt_len: int, maximum: int, path: str = "prompt") -> None:
        super().__init__(
            path,
            f"prompt is too long: {prompt_len} tokens > {maximum} maximum; shorten it or load the model with a larger max_model_len",
            prompt_len=prompt_len,
            max=maximum,
        )


class VisionUnsupported(InvalidRequest):
    """The request carries a picture, sound or film, and the model reads text only."""

    code = "vision_unsupported"


class TemplateRenderFailed(HelexaError):
    """The model's chat template refused the messages, in its own words."""

    code = "template_render_failed"


class ModelNotFound(HelexaError):
    """No model answers to this name or path."""

    code = "model_not_found"

    def __init__(self, model: str, hint: str) -> None:
        super().__init__(f"model {model!r} not found: {hint}", model=model)
        self.model = model


class DownloadFailed(HelexaError):
    """A model could not be fetched from the hub: network, permission or disk. The message says which, and the way out."""

    code = "download_failed"


class ModelDoesNotFit(HelexaError):
    """Weights, KV pages and workspace together exceed the memory of the device. Raised before anything is loaded."""

    code = "model_does_not_fit"

    def __init__(self, needed_bytes: int, free_bytes: int, device: str, advice: str = "") -> None:
        short = needed_bytes - free_bytes
        message = (
            f"the model needs {needed_bytes / 2**30:.2f} GiB but {device} has {free_bytes / 2**30:.2f} GiB free "
            f"({short / 2**30:.2f} GiB short: {short} bytes)"
        )
        super().__init__(
            f"{message}; {advice}" if advice else message,
            needed_bytes=needed_bytes,
            free_bytes=free_bytes,
            short_bytes=short,
            device=device,
        )
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes
        self.device = device


class DeviceOutOfMemory(HelexaError):
    """A device had no memory left in the middle of its work, though what it was asked for was planned to fit: others use it too.
    The engine goes on; what was computed at that moment ends with this."""

    code = "device_out_of_memory"


class UnsupportedCheckpoint(HelexaError):
    """A model file is malformed or of a kind helexa cannot read. ``where`` names the file and, inside it, the place."""

    code = "unsupported_checkpoint"

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{where}: {what}", where=where)
        self.what = what
        self.where = where


class Overloaded(HelexaError):
    """There is no place, or none came free in time, or a client asks too fast (the fact ``reason`` says which); try again after
    ``retry_after_seconds``."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after_seconds: float, **facts: Any) -> None:
        super().__init__(message, retry_after_seconds=retry_after_seconds, **facts)
        self.retry_after_seconds = retry_after_seconds


class EngineDied(HelexaError):
    """The engine that ran this request stopped on an internal fault; the request is lost, the cause is chained. The fact ``reason``
    is ``device_lost`` where the device failed under it."""

    code = "engine_died"


class BackendUnavailable(HelexaError):
    """A device, instruction set or implementation was asked for by name and this machine or build does not have it."""

    code = "backend_unavailable"
