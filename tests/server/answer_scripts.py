"""Scripts for FakeEngine: answers as lists of events."""

from __future__ import annotations

import math
from typing import Any

from helexa_engine.events import (
    ContentDelta,
    Event,
    Finished,
    FinishReason,
    PromptProcessed,
    ReasoningDelta,
    Timings,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
    Usage,
)

TIMINGS = Timings(queue_seconds=0.001, prefill_seconds=0.01, decode_seconds=0.02)
PROMPT = PromptProcessed((1, 2, 3, 4, 5), cached_tokens=2)


def token(text: str, logprob: float | None = -0.5, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
    return TokenLogprob(len(text), text, text.encode(), logprob, top)


def words(text: str, index: int = 0, logprobs: bool = False) -> list[Event]:
    """A content delta a word; with ``logprobs`` the second alternative has probability zero."""
    deltas: list[Event] = []
    for i, word in enumerate(text.split(" ")):
        piece = word if i == 0 else " " + word
        top = (token(piece), token("never", -math.inf))
        deltas.append(ContentDelta(index, piece, (i,), (token(piece, top=top),) if logprobs else ()))
    return deltas


def finished(index: int = 0, tokens: int = 3, reason: FinishReason = "stop", **fields: Any) -> Finished:
    return Finished(index, reason, Usage(5, tokens, 2, fields.pop("reasoning_tokens", 0)), TIMINGS, **fields)


def answer(text: str = "Hello there friend", **fields: Any) -> list[Event]:
    return [PROMPT, *words(text, logprobs=fields.pop("logprobs", False)), finished(**fields)]


def tool_answer() -> list[Event]:
    """A thought and two calls whose arguments come in fragments."""
    return [
        PROMPT,
        ReasoningDelta(0, "I need ", (1,)),
        ReasoningDelta(0, "the weather.", (2,)),
        ToolCallStart(0, 0, "call_a", "weather", (3,)),
        ToolCallDelta(0, 0, '{"city": ', (4,)),
        ToolCallDelta(0, 0, '"Oslo"}', (5,)),
        ToolCallStart(0, 1, "call_b", "clock", (6,)),
        ToolCallDelta(0, 1, "{}", (7,)),
        finished(tokens=8, reason="tool_calls", reasoning_tokens=2),
    ]
