"""Drawn answers of an engine, cut anywhere, for the property that a joined stream is the whole answer."""

from __future__ import annotations

import json

from hypothesis import strategies as st

from helexa_engine.events import (
    ContentDelta,
    Delta,
    Event,
    Finished,
    ReasoningDelta,
    Timings,
    ToolCallDelta,
    ToolCallStart,
    Usage,
)

#: What JSON can say, as Python has it.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=6)

Answer = list[Event]


@st.composite
def answers(draw: st.DrawFn) -> Answer:
    """One answer: thoughts, words and calls in any order, texts and arguments cut anywhere."""
    events: Answer = []
    calls = 0
    for kind in draw(st.lists(st.sampled_from(["think", "speak", "call"]), max_size=5)):
        if kind == "call":
            arguments = json.dumps(draw(st.dictionaries(TEXT, TEXT, max_size=2)), ensure_ascii=False)
            cuts = sorted(draw(st.lists(st.integers(0, len(arguments)), max_size=3)))
            events.append(ToolCallStart(0, calls, f"call_{calls}", "f"))
            for start, end in zip([0, *cuts], [*cuts, len(arguments)], strict=True):
                events.append(ToolCallDelta(0, calls, arguments[start:end]))
            calls += 1
        else:
            delta: type[Delta] = ReasoningDelta if kind == "think" else ContentDelta
            events += [delta(0, text) for text in draw(st.lists(TEXT, min_size=1, max_size=3))]
    usage = Usage(3, draw(st.integers(0, 50)), 0, draw(st.integers(0, 5)))
    reason = "tool_calls" if calls else draw(st.sampled_from(["stop", "length"]))
    stop_reason = draw(st.sampled_from([None, "END", 7]))
    return [*events, Finished(0, reason, usage, Timings(0.0, 0.5, 0.25), stop_reason)]
