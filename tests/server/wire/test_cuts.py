"""From the bytes of an answer to what the client puts together, however they were cut into tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helexa_engine.events import Collector, Event, PromptProcessed
from helexa_engine.sampling_params import SamplingParams
from helexa_engine.text.output_parser import OutputParser
from helexa_engine.text.request_processor import OutputProcessor
from helexa_server.wire import openai_chat

from .test_openai_chat import join, parse

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "write",
            "parameters": {
                "type": "object",
                "properties": {
                    "text": {"type": "string"},
                    "count": {"type": "integer"},
                    "note": {"type": ["string", "null"]},
                },
            },
        },
    }
]
JSON_CALL = '<tool_call>\n{"name": "write", "arguments": {"text": "é🦙 </tool_call>", "count": 3}}\n</tool_call>'
XML_CALL = (
    "<tool_call>\n<function=write>\n<parameter=text>\n🦙 </b>\n\n</parameter>\n<parameter=count>\n3\n</parameter>\n"
    "<parameter=note>\nnull and é\n</parameter>\n</function>\n</tool_call>"
)
STOP = "sto🦙p"
SNIPPETS = [
    *(JSON_CALL, XML_CALL, JSON_CALL[:40], XML_CALL[:70], JSON_CALL + "}}", XML_CALL.replace("</parameter>", "", 1)),
    *(
        "<think>",
        "</think>",
        "\n",
        "\n\n",
        "words ",
        "é",
        "世界",
        "👩‍👩‍👧",
        "<",
        "{",
        "}",
        "sto",
        STOP[:4],
        "<tool_call>",
        "</tool_call>",
    ),
    *("<function=write>", "<parameter=text>", "</parameter>", "</function>"),
]
ANSWERS = st.lists(
    st.sampled_from([snippet.encode() for snippet in SNIPPETS]) | st.sampled_from([b"\xf0\x9f", b"\xff"]), max_size=7
)


@dataclass
class Cut:
    """A tokenizer whose token i is the i-th piece of an answer."""

    pieces: list[bytes]

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]

    def is_special(self, token_id: int) -> bool:
        return False


def events_of(pieces: list[bytes], *, thinking: bool, end: str) -> list[Event]:
    params = SamplingParams(stop=STOP).with_defaults({})
    parser = OutputParser(thinking=thinking, tools=TOOLS)
    output = OutputProcessor(0, Cut([*pieces, b"<end>"]), params, parser, 3)  # type: ignore[arg-type]
    events: list[Event] = [PromptProcessed((1, 2, 3))]
    for token_id in range(len(pieces)):
        cut_off = end == "length" and token_id == len(pieces) - 1
        events += output.push([token_id], finish_reason="length" if cut_off else None)
        if output.stop_hit:
            return events
    if end == "stop" or not pieces:
        events += output.push([len(pieces)], finish_reason="stop")
    return events


def answer(pieces: list[bytes], *, thinking: bool, end: str) -> tuple[Any, Any]:
    """The choice that a client joins from the stream, and that of the whole answer; ids of calls by their order."""
    events = events_of(pieces, thinking=thinking, end=end)
    call = parse()
    projector = openai_chat.Projector(call, "m", 1)
    frames = [frame for event in events for frame in projector.push(event)] + projector.finish()
    chunks = [msgspec.json.decode(frame.data) for frame in frames if frame.data != b"[DONE]"]
    collector = Collector()
    for event in events:
        collector.push(event)
    whole = openai_chat.build_response(call, [collector.result()], "m", 1)["choices"]
    joined = join(chunks, 1)
    for choices in (joined, whole):
        for i, tool_call in enumerate(choices[0]["message"].get("tool_calls", ())):
            msgspec.json.decode(tool_call["function"]["arguments"], type=dict)
            tool_call["id"] = str(i)
    return joined, whole


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    answer_parts=ANSWERS,
    cuts=st.sets(st.integers(1, 400), max_size=12),
    thinking=st.booleans(),
    end=st.sampled_from(["stop", "length"]),
)
@example([XML_CALL.encode()], set(range(1, 400)), False, "stop")
@example([JSON_CALL.encode()], set(range(1, 400)), False, "length")
@example([b"why</think>", "🦙".encode(), JSON_CALL.encode(), XML_CALL.encode()], set(range(1, 600)), True, "stop")
@example([b"a st", STOP.encode(), b"b"], set(range(1, 20)), False, "stop")
def test_the_joined_stream_is_the_whole_answer_wherever_tokens_end(
    answer_parts: list[bytes], cuts: set[int], thinking: bool, end: str
) -> None:
    data = b"".join(answer_parts)
    places = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    pieces = [data[a:b] for a, b in zip(places, places[1:], strict=False)]
    joined, whole = answer(pieces, thinking=thinking, end=end)
    uncut = answer([data], thinking=thinking, end=end)
    assert joined == whole == uncut[0] == uncut[1]
