"""The neutral answer: what one request produces, in order, whatever the wire.

A request yields one :class:`PromptProcessed`, then for each of its ``n`` answers any number of deltas and exactly one
:class:`Finished`; or, at any point, one :class:`Failed` and nothing after it. The non-streamed answer is
:func:`collect` of the same events, so the two cannot differ.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from .errors import HelexaError

FinishReason = Literal["stop", "length", "tool_calls", "abort"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability (natural log, of the unmodified model distribution) of one token and of the likeliest alternatives.

    ``token`` is the token's text as far as it decodes alone, ``token_bytes`` the exact bytes. ``top`` is ordered, likeliest first.
    ``logprob`` is None only for the first prompt token, which nothing predicts.
    """

    token_id: int
    token: str
    token_bytes: bytes
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. ``reasoning_tokens`` are among ``completion_tokens``, ``cached_tokens`` among ``prompt_tokens``."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Of prompt and answer."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds spent: waiting in the queue, computing the prompt, generating (first to last token)."""

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float

    def decode_tokens_per_second(self, completion_tokens: int) -> float:
        """Rate of the tokens after the first, which belongs to the prefill; 0 when there is no interval to measure."""
        return (
            (completion_tokens - 1) / self.decode_seconds if completion_tokens > 1 and self.decode_seconds > 0 else 0.0
        )


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call the model made. ``arguments`` is JSON text exactly as streamed."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class PromptProcessed:
    """The prompt is computed. ``prompt_text`` is set when the request asked for ``echo``."""

    prompt_token_ids: tuple[int, ...]
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_text: str | None = None


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """Visible text of answer ``index``. ``token_ids`` are the tokens sampled since the last delta (text may lag behind them)."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """Text from inside the ``<think>`` block of answer ``index``."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """Tool call number ``call_index`` of answer ``index`` begins."""

    index: int
    call_index: int
    id: str
    name: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A fragment of the call's arguments; all fragments joined are JSON."""

    index: int
    call_index: int
    arguments: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """Answer ``index`` is complete. ``stop_reason`` is the stop string or stop token id that ended it, if one did."""

    index: int
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    stop_reason: str | int | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended with an error; no other request is touched."""

    error: HelexaError


Delta = ContentDelta | ReasoningDelta | ToolCallStart | ToolCallDelta
Event = PromptProcessed | Delta | Finished | Failed


@dataclass(slots=True)
class Segment:
    """A run of one kind within an answer: text of reasoning or of content, or tool call number ``call_index``.

    ``logprobs`` are those that came with the text.
    """

    kind: Literal["reasoning", "content", "tool_call"]
    text: str = ""
    call_index: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(slots=True)
class Completion:
    """One finished answer. ``logprobs`` has one entry a generated token when the request asked for it, else None.

    ``segments`` has reasoning, text and calls in the order in which the model wrote them.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: FinishReason = "stop"
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprob] | None = None
    usage: Usage = field(default_factory=lambda: Usage(0, 0))
    timings: Timings = field(default_factory=lambda: Timings(0.0, 0.0, 0.0))
    segments: list[Segment] = field(default_factory=list)

    def add_text(self, delta: ContentDelta | ReasoningDelta) -> None:
        """Appends text, to the last segment if that is of the same kind."""
        if isinstance(delta, ContentDelta):
            self.text += delta.text
            kind: Literal["reasoning", "content"] = "content"
        else:
            self.reasoning += delta.text
            kind = "reasoning"
        if not self.segments or self.segments[-1].kind != kind:
            if not delta.text:
                return
            self.segments.append(Segment(kind))
        self.segments[-1].text += delta.text
        self.segments[-1].logprobs += delta.logprobs


@dataclass(slots=True)
class GenerationResult:
    """What a request produced: ``n`` completions over one prompt. The attributes of the first stand here directly.

    ``usage`` counts the prompt once and the tokens of all completions.
    """

    prompt_token_ids: list[int]
    completions: list[Completion]
    prompt_logprobs: list[TokenLogprob] | None = None
    prompt_text: str | None = None
    cached_tokens: int = 0

    @property
    def text(self) -> str:
        """Of the first answer, as the other properties below."""
        return self.completions[0].text

    @property
    def token_ids(self) -> list[int]:
        """All that were generated, ends of turns included."""
        return self.completions[0].token_ids

    @property
    def reasoning(self) -> str:
        """Text of the think block."""
        return self.completions[0].reasoning

    @property
    def tool_calls(self) -> list[ToolCall]:
        """In the order they were made."""
        return self.completions[0].tool_calls

    @property
    def finish_reason(self) -> FinishReason:
        """Why the answer ended."""
        return self.completions[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """One a token, where they were asked for."""
        return self.completions[0].logprobs

    @property
    def timings(self) -> Timings:
        """Seconds of its phases."""
        return self.completions[0].timings

    @property
    def usage(self) -> Usage:
        """Tokens of prompt and answer."""
        return Usage(
            prompt_tokens=len(self.prompt_token_ids),
            completion_tokens=sum(c.usage.completion_tokens for c in self.completions),
            cached_tokens=self.cached_tokens,
            reasoning_tokens=sum(c.usage.reasoning_tokens for c in self.completions),
        )


class Collector:
    """Folds events into a :class:`GenerationResult`; :meth:`push` raises the error of a :class:`Failed`."""

    def __init__(self, n: int = 1, logprobs: bool = False) -> None:
        self._completions = [Completion(index=i, logprobs=[] if logprobs else None) for i in range(n)]
        self._result = GenerationResult(prompt_token_ids=[], completions=self._completions)

    def push(self, event: Event) -> None:
        """Takes in the next event."""
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, PromptProcessed):
            self._result.prompt_token_ids = list(event.prompt_token_ids)
            self._result.cached_tokens = event.cached_tokens
            self._result.prompt_text = event.prompt_text
            if event.prompt_logprobs is not None:
                self._result.prompt_logprobs = list(event.prompt_logprobs)
            return
        completion = self._completions[event.index]
        completion.token_ids.extend(event.token_ids)
        if completion.logprobs is not None:
            completion.logprobs.extend(event.logprobs)
        if isinstance(event, ContentDelta | ReasoningDelta):
            completion.add_text(event)
        elif isinstance(event, ToolCallStart):
            completion.segments.append(Segment("tool_call", call_index=event.call_index))
            completion.tool_calls.append(ToolCall(event.id, event.name, ""))
        elif isinstance(event, ToolCallDelta):
            call = completion.tool_calls[event.call_index]
            completion.tool_calls[event.call_index] = ToolCall(call.id, call.name, call.arguments + event.arguments)
        else:
            completion.finish_reason = event.finish_reason
            completion.stop_reason = event.stop_reason
            completion.usage = event.usage
            completion.timings = event.timings

    def result(self) -> GenerationResult:
        """What the events came to; to be called after the last."""
        return self._result


def collect(events: Iterable[Event], *, n: int = 1, logprobs: bool = False) -> GenerationResult:
    """All events of one request as its result. Raises the error of a :class:`Failed` event."""
    collector = Collector(n, logprobs)
    for event in events:
        collector.push(event)
    return collector.result()
