"""One call as a model writes it, read character by character, in both of Qwen's syntaxes: see :mod:`.output_parser`."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from .json_repair import BrokenJson, JsonObjectStream, escape_json
from .tool_schema import coerce, is_number, types_of

OPEN_CALL, CLOSE_CALL = "<tool_call>", "</tool_call>"
OPEN_FUNCTION, CLOSE_FUNCTION = "<function=", "</function>"
OPEN_PARAMETER, CLOSE_PARAMETER = "<parameter=", "</parameter>"

_MAX_NAME = 512  # characters of a function or parameter name; more is no name


class ToolCallReader(ABC):
    """A call in the making. ``take`` gives (name the first time it is known, new text of the arguments)."""

    def __init__(self) -> None:
        self.name_given = False
        self.done = False
        self.unread = ""  # text that a BrokenJson left over
        self._name: str | None = None
        self._out = ""

    @abstractmethod
    def feed(self, char: str) -> None:
        """The next character. Raises :class:`BrokenJson` where the arguments can be no JSON."""

    def take(self) -> tuple[str | None, str]:
        """(the name, the first time it is known; the arguments' text since the last call)."""
        if self._name is None:
            return None, ""
        name = None if self.name_given else self._name
        self.name_given = True
        out, self._out = self._out, ""
        return name, out

    @abstractmethod
    def close(self) -> tuple[str | None, str]:
        """The text ended, or went wrong, after the name: what completes the arguments to valid JSON."""


class JsonCall(ToolCallReader):
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
                    known = self._text in ("null", "true", "false", "None") or is_number(self._text)
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


class XmlCall(ToolCallReader):
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


def _escaped(text: str) -> bool:
    """Whether the last character of ``text`` is escaped by an odd number of backslashes."""
    body = text[:-1]
    return (len(body) - len(body.rstrip("\\"))) % 2 == 1
