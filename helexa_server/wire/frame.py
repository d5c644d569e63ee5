"""What every wire format has in common: frames, the parsed call, and the interface the endpoints drive."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec

from helexa_engine.errors import HelexaError, InvalidRequest
from helexa_engine.events import (
    Completion,
    ContentDelta,
    Delta,
    Event,
    GenerationResult,
    ReasoningDelta,
    ToolCallDelta,
    ToolCallStart,
)
from helexa_engine.generate_request import GenerateRequest

Body = TypeVar("Body")


class Frame(NamedTuple):
    """One event of a stream: its payload on one line, and its name where the wire format names events."""

    data: bytes
    event: str = ""


def json_frame(payload: Any) -> Frame:
    """A frame of ``payload`` as JSON."""
    return Frame(msgspec.json.encode(payload))


def typed_frame(payload: dict[str, Any]) -> Frame:
    """An event that goes by the name its payload has as ``type``, as the Responses and Messages formats write them."""
    return Frame(msgspec.json.encode(payload), payload["type"])


@dataclass(frozen=True, slots=True)
class Call:
    """A parsed request body: what the engine shall do, and how the answer shall look.

    Attributes:
        model: name the client asked for; None or "" means the only model there is.
        requests: one a prompt; more than one only where the wire format takes a list of prompts.
        stream: answer in frames.
        include_usage: end a stream with a usage frame.
        parallel_tool_calls: False keeps only the first call of each answer.
        hide_reasoning: the client wants to know that there was reasoning, not what it was.
        summarise_reasoning: the client shows summaries of reasoning only.
        seal_reasoning: the client keeps no text of reasoning and wants it in a form to send back.
        namespaced: the model's name of a function to the client's namespace and name of it, where the client groups functions.
        repeated: what this wire format says again in its answer, such as the tools.
    """

    model: str | None
    requests: tuple[GenerateRequest, ...]
    stream: bool = False
    include_usage: bool = False
    parallel_tool_calls: bool = True
    hide_reasoning: bool = False
    summarise_reasoning: bool = False
    seal_reasoning: bool = False
    namespaced: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    repeated: Mapping[str, Any] = field(default_factory=dict)

    def keeps(self, event: Delta) -> bool:
        """Whether the client is to see ``event``: not a call beyond the one it allows."""
        return self.parallel_tool_calls or not (
            isinstance(event, ToolCallStart | ToolCallDelta) and event.call_index > 0
        )


class Projection(Protocol):
    """Turns the events of one streamed call into frames."""

    def push(self, event: Event, prompt_index: int = 0) -> list[Frame]:
        """Frames that say what ``event`` adds, none if nothing yet."""

    def keep_alive(self) -> list[Frame]:
        """Frames that change nothing, sent after a silence."""
        ...

    def finish(self) -> list[Frame]:
        """The frames after the last event."""
        ...

    def fail(self, error: HelexaError, status: int) -> list[Frame]:
        """The frames that end a stream which cannot go on. ``status`` is what the error would have been without a stream."""
        ...


class Wire(Protocol):
    """A module of this package, as the endpoints see it."""

    def parse_request(self, body: bytes) -> Call:
        """The body as neutral requests. Raises :class:`InvalidRequest` with the path."""

    def Projector(self, call: Call, model: str, created: int) -> Projection:  # noqa: N802 (a class in the modules)
        """What makes frames of the events of a streamed call."""

    def build_response(self, call: Call, results: Sequence[GenerationResult], model: str, created: int) -> Any:
        """The whole answer, of one result a request."""

    def error_body(self, error: HelexaError, status: int) -> dict[str, Any]:
        """The wire format's own envelope."""


_PLACE = re.compile(r" - at (?:key in )?`\$\.?(?P<path>.*)`$")
_MISSING = re.compile(r"missing required field `(?P<name>\w+)`")


def decode(body: bytes | msgspec.Raw, kind: type[Body], at: str = "") -> Body:
    """JSON text as ``kind``; ``at`` is the path of this text in the whole body. Raises :class:`InvalidRequest` with the path."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        message = str(error)
        place = _PLACE.search(message)
        path = place["path"] if place else ""
        if missing := _MISSING.search(message):
            path = f"{path}.{missing['name']}" if path else missing["name"]
        reason = message[: place.start()] if place else message
        full = f"{at}.{path}" if at and path and not path.startswith("[") else at + path
        raise InvalidRequest(full or "body", reason[0].lower() + reason[1:]) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest("body", f"expected JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest("body", "nested too deeply") from None


def deltas(completion: Completion) -> Iterator[Delta]:
    """The deltas of a whole answer, one a segment: what a stream of it would have said, in fewer words."""
    for segment in completion.segments:
        if segment.kind == "reasoning":
            yield ReasoningDelta(completion.index, segment.text)
        elif segment.kind == "content":
            yield ContentDelta(completion.index, segment.text, logprobs=tuple(segment.logprobs))
        else:
            call = completion.tool_calls[segment.call_index]
            yield ToolCallStart(completion.index, segment.call_index, call.id, call.name)
            yield ToolCallDelta(completion.index, segment.call_index, call.arguments)


@contextlib.contextmanager
def named(names: Mapping[str, str]) -> Iterator[None]:
    """Errors of a block name fields as the client does: ``names`` has the client's name for each of ours."""
    try:
        yield
    except InvalidRequest as error:
        stem = re.match(r"\w+", error.path)
        if stem is None or stem[0] not in names:
            raise
        raise InvalidRequest(names[stem[0]] + error.path[stem.end() :], error.reason) from None
