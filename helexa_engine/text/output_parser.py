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

import ast
import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .json_repair import BrokenJson, JsonObjectStream, escape_json

OPEN_THINK, CLOSE_THINK = "<think>", "</think>"
OPEN_CALL, CLOSE_CALL = "<tool_call>", "</tool_call>"
OPEN_FUNCTION, CLOSE_FUNCTION = "<function=", "</function>"
OPEN_PARAMETER, CLOSE_PARAMETER = "<parameter=", "</parameter>"

_AFTER_CALL = (
    " \t\r\n}"  # what may stand between a call and its end tag: space, and closing brackets that are one too many
)
_MAX_REFERENCES = 8  # in a row, in a schema
_MAX_NAME = 512  # characters of a function or parameter name; more is no name


_TYPE_NAMES: dict[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
    dict: "object",
    list: "array",
}


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
        self._call: _Call | None = None
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
            self._call = _XmlCall(self._tools)
            self._state = self._xml_call
            self._feed_call(char)
        else:
            self._pass_through()

    def _begin_json(self) -> None:
        self._call = _JsonCall()
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
            self._call = _XmlCall(self._tools)
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


# -- one call ----------------------------------------------------------------------------------------------------------


class _Call:
    """A call in the making. ``take`` gives (name the first time it is known, new text of the arguments)."""

    def __init__(self) -> None:
        self.name_given = False
        self.done = False
        self.unread = ""  # text that a BrokenJson left over
        self._name: str | None = None
        self._out = ""

    def feed(self, char: str) -> None:
        raise NotImplementedError

    def take(self) -> tuple[str | None, str]:
        if self._name is None:
            return None, ""
        name = None if self.name_given else self._name
        self.name_given = True
        out, self._out = self._out, ""
        return name, out

    def close(self) -> tuple[str | None, str]:
        """The text ended, or went wrong, after the name: what completes the arguments to valid JSON."""
        raise NotImplementedError


class _JsonCall(_Call):
    """``{"name": ..., "arguments": {...}}``, its keys in any order. The opening brace has been read."""

    def __init__(self) -> None:
        super().__init__()
        self._state = "key"
        self._text = ""  # of the string or value being read
        self._key = ""
        self._arguments: JsonObjectStream | None = None
        self._arguments_seen = False
        self._skipped: JsonObjectStream | None = None

    def feed(self, char: str) -> None:
        match self._state:
            case "key":
                if char == '"':
                    self._state, self._text = "in_key", ""
                elif char == "}":
                    self._end()
                elif not char.isspace() and char != ",":
                    self._broken(char)
            case "in_key":
                if char == '"':
                    self._key, self._state = self._text, "colon"
                elif len(self._text) > _MAX_NAME or char == "\\":
                    self._broken(char)
                self._text += char
            case "colon":
                if char == ":":
                    self._state, self._text = "value", ""
                elif not char.isspace():
                    self._broken(char)
            case "value":
                if not char.isspace():
                    self._value_begins(char)
            case "in_arguments":
                assert self._arguments is not None
                try:
                    self._out += self._arguments.feed(char)
                except BrokenJson:
                    self._broken(char)
                if self._arguments.done:
                    self._state = "after_value"
            case "in_string":
                self._text += char
                if char == '"' and not _escaped(self._text):
                    self._string_ends()
            case "in_literal":
                if char in ",}" or char.isspace():
                    lost = self._key in ("name", "arguments", "parameters") and self._text not in ("null", "None")
                    known = self._text in ("null", "true", "false", "None") or _is_number(self._text)
                    if lost or not known:
                        self._broken(char)
                    self._state = "after_value"
                    self.feed(char)
                else:
                    self._text += char
                    if len(self._text) > 64:
                        self._broken(char)
            case "in_other":
                assert self._skipped is not None
                try:
                    self._skipped.feed(char)
                except BrokenJson:
                    self._broken(char)
                if self._skipped.done:
                    self._state = "after_value"
            case "after_value":
                if char == ",":
                    self._state = "key"
                elif char == "}":
                    self._end()
                elif char == "<" and self.name_given:  # the end tag comes and the last brace is missing
                    self._end()
                    self._broken(char)
                elif not char.isspace():
                    self._broken(char)

    def _value_begins(self, char: str) -> None:
        if self._key in ("arguments", "parameters") and not self._arguments_seen and char == "{":
            self._arguments_seen = True
            self._arguments = JsonObjectStream()
            self._out += self._arguments.feed(char)
            self._state = "in_arguments"
        elif char == '"':
            self._text, self._state = '"', "in_string"
        elif char == "{" and self._key not in ("name", "arguments", "parameters"):
            self._skipped = JsonObjectStream()
            self._skipped.feed(char)
            self._state = "in_other"
        elif char in "[{":
            self._broken(char)
        else:
            self._text, self._state = char, "in_literal"

    def _string_ends(self) -> None:
        try:
            value = json.loads(self._text, strict=False)
        except ValueError:
            self._broken("")
        if self._key == "name" and self._name is None:
            if not value or len(value) > _MAX_NAME:
                self._broken("")
            self._name = value
        elif self._key in ("arguments", "parameters") and not self._arguments_seen:
            try:
                parsed = json.loads(value or "{}")
            except (ValueError, RecursionError):
                self._broken("")
            if not isinstance(parsed, dict):
                self._broken("")
            self._arguments_seen = True
            self._out += value or "{}"
        self._state = "after_value"

    def _end(self) -> None:
        if self._name is None:
            self._broken("")
        if not self._arguments_seen:
            self._arguments_seen = True
            self._out += "{}"
        self.done = True

    def _broken(self, char: str) -> None:
        self.unread = char
        raise BrokenJson

    def close(self) -> tuple[str | None, str]:
        if self._arguments is not None and not self._arguments.done:
            self._out += self._arguments.close()
        elif not self._arguments_seen:
            self._out += "{}"
        self._arguments_seen = True
        return self.take()


class _XmlCall(_Call):
    """``<function=f>`` with ``<parameter=key>`` elements. Values become JSON of the type the tool's schema says.

    A value that is a string is given out as it comes; any other when it is complete. A value whose own end tag is missing
    ends with its call if the call is the last thing said, or if another one follows; otherwise such tags are text.
    """

    def __init__(self, tools: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        self._tools = tools
        self._state = "function"
        self._text = ""  # read and not given out
        self._searched = 0  # before this place in it no end tag begins
        self._first = True
        self._key = ""
        self._string: bool | None = False  # whether the value is a string; None: its first words will tell
        self._string_begun = False

    def feed(self, char: str) -> None:
        self._text += char
        match self._state:
            case "function":
                name = self._text.removeprefix(OPEN_FUNCTION)
                if not (OPEN_FUNCTION.startswith(self._text) or self._text.startswith(OPEN_FUNCTION)):
                    self._broken()
                elif len(name) > _MAX_NAME or "\n" in name:
                    self._broken()
                elif name.endswith(">") and self._text.startswith(OPEN_FUNCTION):
                    self._name = name[:-1].strip()
                    if not self._name:
                        self._broken()
                    self._out += "{"
                    self._state, self._text = "between", ""
            case "between":
                tag = self._text.lstrip()
                if not tag:
                    return
                if tag in (CLOSE_FUNCTION, CLOSE_CALL):
                    self._end()
                elif tag.startswith(OPEN_PARAMETER):
                    if tag.endswith(">"):
                        self._parameter_begins(tag.removeprefix(OPEN_PARAMETER)[:-1].strip())
                    elif len(tag) > _MAX_NAME:
                        self._broken()
                elif not any(known.startswith(tag) for known in (CLOSE_FUNCTION, CLOSE_CALL, OPEN_PARAMETER)):
                    self._broken()
            case "value":
                self._value()

    def _parameter_begins(self, key: str) -> None:
        self._key = key
        self._out += ("" if self._first else ", ") + json.dumps(key, ensure_ascii=False) + ": "
        self._first = False
        types = types_of(self._value_schema(), self._schema())
        self._string = True if types == {"string"} else None if types <= {"string", "null"} else False
        self._text, self._state = "", "value"
        self._searched = 0
        self._string_begun = False

    def _schema(self) -> Mapping[str, Any]:
        return self._tools.get(self._name or "", {})

    def _value_schema(self) -> Any:
        properties = self._schema().get("properties")
        return properties.get(self._key) if isinstance(properties, Mapping) else None

    def _value(self) -> None:
        held = self._tag_begins()
        tail = self._text[held:]
        if tail == CLOSE_PARAMETER:
            self._value_ends(self._text[:held])
        elif _follows_a_call(tail):
            self._value_ends(self._text[:held])
            self.unread = tail.removeprefix(CLOSE_FUNCTION)
            self._end()
        else:
            # One newline before the end tag belongs to the tag.
            certain = held - (held > 0 and self._text[held - 1] == "\n")
            if self._string is None:
                self._string = self._is_string(self._text[:certain])
            if self._string and certain > 0:
                self._give_string(self._text[:certain])
                self._text = self._text[certain:]
                self._searched -= certain

    def _tag_begins(self) -> int:
        """Where in the unread text an end tag stands, or may come to stand."""
        while (place := self._text.find("<", self._searched)) >= 0:
            tail = self._text[place:]
            if CLOSE_PARAMETER.startswith(tail) or _may_follow_a_call(tail):
                self._searched = place
                return place
            self._searched = place + 1  # what is no beginning of a tag does not become one
        self._searched = len(self._text)
        return self._searched

    def _is_string(self, text: str) -> bool | None:
        """What the beginning of a value says where the schema leaves it open: a string, or else null, or else JSON's brackets."""
        word = text.strip().lower()
        if types_of(self._value_schema(), self._schema()):
            return None if "null".startswith(word) or "none".startswith(word) else True
        return None if not word else word[0] not in "{["

    def _give_string(self, text: str) -> None:
        if not self._string_begun:
            self._string_begun = True
            self._out += '"'
            text = text.removeprefix("\n")
        self._out += escape_json(text)

    def _value_ends(self, text: str) -> None:
        if self._string:
            # When the value is the single newline after the tag, it is that newline and not the one before the end tag.
            if not self._string_begun:
                text = text.removeprefix("\n")
                self._out += '"'
                self._string_begun = True
            self._out += escape_json(text.removesuffix("\n")) + '"'
        else:
            value = text.removeprefix("\n").removesuffix("\n")
            self._out += coerce(value, self._value_schema(), self._schema())
        self._text, self._state = "", "between"

    def _end(self) -> None:
        self._out += "}"
        self.done = True
        self._state = "done"

    def _broken(self) -> None:
        self.unread = self._text
        raise BrokenJson

    def close(self) -> tuple[str | None, str]:
        if self._state == "value":
            self._value_ends(self._text[: self._tag_begins()])
        if self._state == "between":
            self._end()
        return self.take()


#: What stands between two calls, each tag after white space, of which the first may be left out.
_BETWEEN_CALLS = (CLOSE_FUNCTION, CLOSE_CALL, OPEN_CALL, OPEN_FUNCTION)


def _may_follow_a_call(text: str) -> bool:
    """Whether ``text`` begins as the tags that end a call and begin the next do."""
    tags = _BETWEEN_CALLS if CLOSE_FUNCTION.startswith(text[: len(CLOSE_FUNCTION)]) else _BETWEEN_CALLS[1:]
    for tag in tags:
        if tag.startswith(text):
            return True
        if not text.startswith(tag):
            return False
        text = text[len(tag) :].lstrip()
    return False


def _follows_a_call(text: str) -> bool:
    """Whether ``text`` is all of the tags that end a call and begin the next."""
    return text.endswith(OPEN_FUNCTION) and _may_follow_a_call(text)


def coerce(text: str, schema: Any, root: Mapping[str, Any] | None = None) -> str:
    """JSON text of a parameter value as ``schema`` wants it; a value that fits no type of the schema stays a string.

    ``root`` is the schema that references in ``schema`` point into.
    """
    types = types_of(schema, root)
    word = text.strip()
    if word.lower() in ("null", "none") and "null" in types:
        return "null"
    if "boolean" in types and word.lower() in ("true", "false"):
        return word.lower()
    if types & {"integer", "number"} and len(word) < 400 and _is_number(word):
        if word.lstrip("+-").isdigit():
            return str(int(word))
        if "number" in types:
            return json.dumps(float(word))
        if float(word).is_integer():
            return str(int(float(word)))
    if types & {"object", "array"} or (not types and word[:1] in ("{", "[")):
        for read in (json.loads, ast.literal_eval):
            try:
                value = read(word)
                if isinstance(value, (dict, list)):
                    return json.dumps(value, ensure_ascii=False, allow_nan=False)
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                continue
    return '"' + escape_json(text) + '"'


def types_of(schema: Any, root: Mapping[str, Any] | None = None, depth: int = 0) -> set[str]:
    """JSON types a schema allows; empty when it does not say. ``root`` is the schema that its references point into."""
    schema = resolved(schema, root or {})
    if depth > _MAX_REFERENCES:
        return set()
    kind = schema.get("type")
    if isinstance(kind, str):
        return {kind}
    if isinstance(kind, Sequence):
        return {item for item in kind if isinstance(item, str)}
    found: set[str] = set()
    for key in ("anyOf", "oneOf", "allOf"):
        branches = schema.get(key)
        for branch in branches if isinstance(branches, Sequence) else ():
            found |= types_of(branch, root, depth + 1)
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    found |= {_TYPE_NAMES[type(value)] for value in values if type(value) in _TYPE_NAMES}
    if not found and "properties" in schema:
        return {"object"}
    return found or ({"array"} if "items" in schema else set())


def resolved(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """``schema``, or what it refers to inside ``root``; empty for what is no schema or refers to nothing."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(schema, Mapping):
            return {}
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return schema
        schema = root if reference.startswith("#") else None
        for name in reference.removeprefix("#").split("/")[1:]:
            name = name.replace("~1", "/").replace("~0", "~")
            schema = schema.get(name) if isinstance(schema, Mapping) else None
    return {}


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


def _escaped(text: str) -> bool:
    """Whether the last character of ``text`` is escaped by an odd number of backslashes."""
    body = text[:-1]
    return (len(body) - len(body.rstrip("\\"))) % 2 == 1


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and "_" not in text
    except ValueError:
        return False
