"""Generated text to reasoning, content and tool calls, while it is generated: :class:`OutputParser`.

Understands ``<think>...</think>`` and both ways in which Qwen models write calls::

    <tool_call>                                     <tool_call>
    {"name": "f", "arguments": {"city": "Paris"}}   <function=f>
    </tool_call>                                    <parameter=city>
                                                    Paris
                                                    </parameter>
                                                    </function>
                                                    </tool_call>

The parser is a machine over characters, so the result cannot depend on how the text was chunked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .json_repair import BrokenJson
from .tool_calls import CLOSE_CALL, OPEN_CALL, OPEN_FUNCTION, JsonCall, ToolCallReader, XmlCall

OPEN_THINK, CLOSE_THINK = "<think>", "</think>"

_AFTER_CALL = (
    " \t\r\n}"  # what may stand between a call and its end tag: space, and closing brackets that are one too many
)


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text from inside the think block."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """Call number ``call_index`` names its function."""

    call_index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A fragment of the call's arguments; all fragments of a call, joined, are the JSON text of an object."""

    call_index: int
    fragment: str


Piece = Reasoning | Content | CallStart | CallArguments


class OutputParser:
    """Splits one answer.

    - Reasoning is what stands in the think block at the beginning, without the newlines at its edges; an answer cut off inside
      it is all reasoning. Newlines between the block and the content belong to neither.
    - Calls are recognised only when ``tools`` are given. What is not a call after all, whatever it looks like, is content,
      to the character. Repaired are: surplus or missing closing brackets, a trailing comma, raw newlines and Python's
      ``True`` inside JSON, arguments given as a string of JSON, ``parameters`` for ``arguments``, missing end tags, and a
      ``<function=...>`` of a known tool without ``<tool_call>``. A call cut off by the end is closed into valid JSON; the
      finish reason says that it was cut.
    - White space between content and a call, and between calls, belongs to neither.

    Attributes:
        calls_started: how many calls were recognised so far.
        in_reasoning: whether the think block is open.
    """

    def __init__(
        self, *, thinking: bool = False, parse_thinking: bool = True, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        """``thinking``: the prompt has opened the think block already. ``parse_thinking=False`` leaves its tags in the text."""
        self.calls_started = 0
        self._tools = {name: parameters for name, parameters in map(_tool_signature, tools or ()) if name}
        self._pieces: list[Piece] = []
        self._buffer = ""  # read and not yet decided
        self._space = ""  # white space that is content only if content follows
        self._call: ToolCallReader | None = None
        self._raw = ""  # text of the call being read, until it is certain to be one
        self._unread: deque[str] = deque()  # characters to read (again)
        self._state: Callable[[str], None] = self._content
        if thinking and parse_thinking:
            self._state = self._reasoning
        elif parse_thinking:
            self._state = self._beginning
        self._reasoning_begun = self._content_begun = False
        self._after_thinking = False

    @property
    def in_reasoning(self) -> bool:
        """Whether the think block is open."""
        return self._state == self._reasoning

    def push(self, text: str) -> list[Piece]:
        """What ``text`` adds that is certain."""
        if self._state == self._content and not self._tools:
            self._emit_content(text)
        else:
            self._unread.extend(text)
            while self._unread:
                self._state(self._unread.popleft())
        return self._take()

    def flush(self) -> list[Piece]:
        """The end: decides everything that was held back."""
        if self._state == self._reasoning:
            self._emit_reasoning(self._buffer)
            self._space = ""
        elif self._state in (self._json_call, self._xml_call, self._call_begins, self._bare_function):
            self._end_of_text_in_call()
        elif self._state == self._after_call:
            rest = self._buffer.lstrip(_AFTER_CALL)
            self._emit_content("" if CLOSE_CALL.startswith(rest) else self._buffer)
        else:
            self._emit_content(self._buffer)
        self._buffer = ""
        if not self.calls_started:
            self._pieces.append(Content(self._space))
        self._space = ""
        return self._take()

    def _take(self) -> list[Piece]:
        """Pieces so far, neighbours of one kind joined."""
        joined: list[Piece] = []
        for piece in self._pieces:
            last = joined[-1] if joined else None
            if isinstance(piece, Reasoning) and isinstance(last, Reasoning):
                joined[-1] = Reasoning(last.text + piece.text)
            elif isinstance(piece, Content) and isinstance(last, Content):
                joined[-1] = Content(last.text + piece.text)
            elif isinstance(piece, CallArguments) and isinstance(last, CallArguments):
                if piece.call_index == last.call_index:
                    joined[-1] = CallArguments(last.call_index, last.fragment + piece.fragment)
                else:
                    joined.append(piece)
            elif isinstance(piece, CallStart) or (piece.fragment if isinstance(piece, CallArguments) else piece.text):
                joined.append(piece)
        self._pieces = []
        return joined

    # -- thinking ------------------------------------------------------------------------------------------------------

    def _beginning(self, char: str) -> None:
        """Before the first word: white space, then perhaps ``<think>``."""
        self._buffer += char
        word = self._buffer.lstrip()
        if word == OPEN_THINK:
            self._buffer = ""
            self._state = self._reasoning
        elif not OPEN_THINK.startswith(word):
            self._replay(self._content)

    def _reasoning(self, char: str) -> None:
        self._buffer += char
        if self._buffer.endswith(CLOSE_THINK):
            self._emit_reasoning(self._buffer.removesuffix(CLOSE_THINK))
            self._buffer = self._space = ""
            self._after_thinking = True
            self._state = self._content
        elif not (held := _overlap(self._buffer, CLOSE_THINK)):
            self._emit_reasoning(self._buffer)
            self._buffer = ""
        elif held < len(self._buffer):
            self._emit_reasoning(self._buffer[:-held])
            self._buffer = self._buffer[-held:]

    def _emit_reasoning(self, text: str) -> None:
        if not self._reasoning_begun:
            text = text.lstrip("\n")
            if not text:
                return
            self._reasoning_begun = True
        text = self._space + text
        visible = text.rstrip("\n")
        self._space = text[len(visible) :]
        self._pieces.append(Reasoning(visible))

    # -- content -------------------------------------------------------------------------------------------------------

    def _content(self, char: str) -> None:
        self._buffer += char
        if self._tools and self._buffer == OPEN_CALL:
            self._buffer, self._raw = "", OPEN_CALL
            self._state = self._call_begins
        elif self._tools and self._buffer == OPEN_FUNCTION:
            self._buffer = ""
            self._raw = OPEN_FUNCTION
            self._state = self._bare_function
        elif self._tools and (OPEN_CALL.startswith(self._buffer) or OPEN_FUNCTION.startswith(self._buffer)):
            return
        elif char == "<" and len(self._buffer) > 1:
            self._emit_content(self._buffer[:-1])
            self._buffer = "<"
        else:
            self._emit_content(self._buffer)
            self._buffer = ""

    def _emit_content(self, text: str) -> None:
        """Gives ``text`` out except white space at its end, which a call may turn out to follow."""
        if self._after_thinking and not self._content_begun:
            text = text.lstrip("\n")
        if not text:
            return
        self._content_begun = True
        text = self._space + text
        visible = text.rstrip() if self._tools else text
        self._space = text[len(visible) :]
        self._pieces.append(Content(visible))

    def _pass_through(self) -> None:
        """What was taken for a call is content."""
        raw, self._raw, self._call = self._raw, "", None
        self._state = self._content
        # Its first character cannot begin a call again; what follows may.
        self._emit_content(raw[:1])
        self._unread.extendleft(reversed(raw[1:]))

    def _replay(self, state: Callable[[str], None]) -> None:
        self._unread.extendleft(reversed(self._buffer))
        self._buffer = ""
        self._state = state

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _call_begins(self, char: str) -> None:
        """After ``<tool_call>``: which syntax?"""
        self._raw += char
        if char.isspace():
            return
        if char == "{":
            self._begin_json()
        elif char == "<":
            self._raw = self._raw[:-1]
            self._call = XmlCall(self._tools)
            self._state = self._xml_call
            self._feed_call(char)
        else:
            self._pass_through()

    def _begin_json(self) -> None:
        self._call = JsonCall()
        self._state = self._json_call

    def _json_call(self, char: str) -> None:
        self._feed_call(char)

    def _xml_call(self, char: str) -> None:
        self._feed_call(char)

    def _bare_function(self, char: str) -> None:
        """After ``<function=`` outside a ``<tool_call>``: a call if a known tool is named."""
        self._raw += char
        name = self._raw.removeprefix(OPEN_FUNCTION)
        if char == ">" and name[:-1] in self._tools:
            self._unread.extendleft(reversed(self._raw))
            self._raw = ""
            self._call = XmlCall(self._tools)
            self._state = self._xml_call
        elif not any(tool.startswith(name) for tool in self._tools):
            self._pass_through()

    def _feed_call(self, char: str) -> None:
        call = self._call
        assert call is not None
        if not call.name_given:
            self._raw += char
        try:
            call.feed(char)
        except BrokenJson:
            if not call.name_given:
                self._pass_through()
                return
            # The name and a part of the arguments are out already: close them, and give the rest as text.
            self._give(call.close())
            rest = call.unread
            self._end_call(self._after_call)
            self._unread.extendleft(reversed(rest))
            return
        self._give(call.take())
        if call.done:
            self._end_call(self._after_call)
            self._unread.extendleft(reversed(call.unread))

    def _give(self, out: tuple[str | None, str]) -> None:
        name, fragment = out
        if name is not None:
            self._space = ""
            self._pieces.append(CallStart(self.calls_started, name))
            self.calls_started += 1
            self._raw = ""
        if fragment:
            self._pieces.append(CallArguments(self.calls_started - 1, fragment))

    def _end_call(self, state: Callable[[str], None]) -> None:
        self._call, self._raw, self._buffer = None, "", ""
        self._content_begun = True
        self._state = state

    def _after_call(self, char: str) -> None:
        """After a call: its end tag, surplus brackets, or one more object in the same tag."""
        self._buffer += char
        rest = self._buffer.lstrip(_AFTER_CALL)
        if not rest or CLOSE_CALL.startswith(rest) and rest != CLOSE_CALL:
            return
        if rest == CLOSE_CALL:
            self._buffer = ""
            self._state = self._content
        elif rest == "{":
            self._buffer = ""
            self._raw = "{"
            self._begin_json()
        else:
            self._buffer = self._buffer[: -len(rest)].replace("}", "") + rest
            self._replay(self._content)

    def _end_of_text_in_call(self) -> None:
        call = self._call
        if call is None or not call.name_given:
            raw, self._raw, self._call = self._raw, "", None
            self._state = self._content
            self._emit_content(raw)
            return
        self._give(call.close())


def _tool_signature(tool: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    function = tool.get("function", tool)
    parameters = function.get("parameters") if isinstance(function, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return (name if isinstance(name, str) else ""), parameters if isinstance(parameters, Mapping) else {}


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of ``text`` that ``tag`` begins with."""
    for length in range(min(len(text), len(tag) - 1), 0, -1):
        if tag.startswith(text[-length:]):
            return length
    return 0
