"""Folding events into a result."""

from __future__ import annotations

import pytest

from helexa_engine.errors import EngineDied
from helexa_engine.events import (
    ContentDelta,
    Failed,
    Finished,
    PromptProcessed,
    ReasoningDelta,
    Timings,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
    Usage,
    collect,
)

TIMINGS = Timings(0.0, 0.1, 2.0)


def test_answers_are_folded_by_index_with_every_kind_of_delta() -> None:
    score = TokenLogprob(5, "x", b"x", -0.5)
    events = [
        PromptProcessed((1, 2, 3), cached_tokens=2, prompt_text="abc"),
        ReasoningDelta(0, "hm ", (10,), (score,)),
        ContentDelta(1, "other", (20,)),
        ContentDelta(0, "hello", (11, 12)),
        ToolCallStart(0, 0, "call_1", "f", (13,)),
        ToolCallDelta(0, 0, '{"a":', (14,)),
        ToolCallDelta(0, 0, "1}", (15,)),
        Finished(1, "length", Usage(3, 1), TIMINGS),
        Finished(0, "tool_calls", Usage(3, 7, reasoning_tokens=1), TIMINGS, token_ids=(16,)),
    ]
    result = collect(events, n=2, logprobs=True)
    assert (result.text, result.reasoning, result.finish_reason) == ("hello", "hm ", "tool_calls")
    assert result.token_ids == [10, 11, 12, 13, 14, 15, 16]
    assert result.tool_calls[0].arguments == '{"a":1}' and result.tool_calls[0].name == "f"
    assert result.logprobs == [score]
    assert (result.completions[1].text, result.completions[1].finish_reason) == ("other", "length")
    assert result.usage == Usage(3, 8, cached_tokens=2, reasoning_tokens=1) and result.usage.total_tokens == 11
    assert result.prompt_text == "abc" and result.prompt_token_ids == [1, 2, 3]


def test_a_failure_is_raised() -> None:
    with pytest.raises(EngineDied, match="gone"):
        collect([PromptProcessed((1,)), ContentDelta(0, "a"), Failed(EngineDied("gone"))])


def test_decode_rate_counts_the_tokens_after_the_first() -> None:
    assert TIMINGS.decode_tokens_per_second(11) == 5.0
    assert TIMINGS.decode_tokens_per_second(1) == 0.0
    assert Timings(0.0, 0.0, 0.0).decode_tokens_per_second(5) == 0.0


def test_logprobs_are_none_unless_asked_for() -> None:
    assert collect([Finished(0, "stop", Usage(1, 0), TIMINGS)]).logprobs is None
