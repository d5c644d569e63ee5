"""A JSON object read character by character and given out again as valid JSON: :class:`JsonObjectStream`."""

from __future__ import annotations

import json
from typing import Literal

_LITERALS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}
_MAX_DEPTH = 200


class BrokenJson(Exception):
    """The text is not JSON and cannot unambiguously be made into JSON."""


def escape_json(text: str) -> str:
    """``text`` as it stands between the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


class JsonObjectStream:
    """Feeds on the characters of an object from its ``{`` on and gives them out as they become certain.

    What has been given out, followed by :meth:`close`, is valid JSON at any time. Repaired on the way: raw control
    characters and unknown escapes in strings, Python's literals, commas before a closing bracket.

    Attributes:
        done: the object's own closing brace has been read.
    """

    def __init__(self) -> None:
        self.done = False
        self._stack: list[Literal["}", "]"]] = []
        # first: a key or value or the closing bracket; item: a key or value after a comma
        self._state: Literal["start", "first", "item", "string", "colon", "value", "literal", "after"] = "start"
        self._is_key = False
        self._escape = ""
        self._literal = ""
        self._space = ""  # white space after a comma, given out with what follows
        self._comma = False

    def feed(self, char: str) -> str:
        """Text that is certain after ``char``. Raises :class:`BrokenJson`, and is not to be fed again after that."""
        if self._state == "string":
            return self._in_string(char)
        if self._state == "literal":
            if char not in ",]}" and not char.isspace():
                self._literal += char
                if len(self._literal) > 400:
                    raise BrokenJson
                return ""
            return self._end_literal() + self.feed(char)
        if char in " \t\r\n":
            if self._comma:
                self._space += char
                return ""
            return char
        if self._state == "start":
            if char != "{":
                raise BrokenJson
            return self._open("}")
        if self._state in ("first", "item") and char == self._stack[-1]:
            self._comma, self._space = False, ""
            return self._close_bracket()
        if self._state in ("first", "item", "value"):
            before = ("," if self._comma else "") + self._space
            self._comma, self._space = False, ""
            return before + self._begin(char)
        if self._state == "colon":
            if char != ":":
                raise BrokenJson
            self._state = "value"
            return char
        if char == ",":
            self._comma, self._state = True, "item"
            return ""
        if char == self._stack[-1]:
            return self._close_bracket()
        raise BrokenJson

    def close(self) -> str:
        """What completes the text given out so far."""
        out = ""
        if self._state == "string":
            self._escape = ""
            self._state = "colon" if self._is_key else "after"
            out += '"'
        if self._state == "literal":
            try:
                out += self._end_literal()
            except BrokenJson:
                out += "null"
        elif self._state == "colon":
            out += ": null"
        elif self._state == "value":
            out += "null"
        if self._state == "start":
            out += "{}"
        out += "".join(reversed(self._stack))
        self._stack.clear()
        self.done = True
        return out

    def _begin(self, char: str) -> str:
        expects_key = self._state != "value" and self._stack[-1] == "}"
        if char == '"':
            self._is_key, self._state = expects_key, "string"
            return char
        if expects_key:
            raise BrokenJson
        if char == "{":
            return self._open("}")
        if char == "[":
            return self._open("]")
        if char.isalnum() or char == "-":
            self._literal, self._state = char, "literal"
            return ""
        raise BrokenJson

    def _open(self, closing: Literal["}", "]"]) -> str:
        if len(self._stack) >= _MAX_DEPTH:
            raise BrokenJson
        self._stack.append(closing)
        self._state = "first"
        return "{" if closing == "}" else "["

    def _close_bracket(self) -> str:
        char = self._stack.pop()
        self._state = "after"
        self.done = not self._stack
        return char

    def _end_literal(self) -> str:
        word, self._literal = self._literal, ""
        self._state = "after"
        if word in _LITERALS:
            return _LITERALS[word]
        try:
            json.loads(word, parse_constant=_refuse)
        except ValueError:
            raise BrokenJson from None
        return word

    def _in_string(self, char: str) -> str:
        if self._escape:
            return self._in_escape(char)
        if char == "\\":
            self._escape = char
            return ""
        if char == '"':
            self._state = "colon" if self._is_key else "after"
            return char
        return _ESCAPES.get(char) or (char if char >= " " else f"\\u{ord(char):04x}")

    def _in_escape(self, char: str) -> str:
        escape = self._escape + char
        self._escape = ""
        if escape[1] == "u":
            if len(escape) == 2 or char in "0123456789abcdefABCDEF":
                if len(escape) == 6:
                    return escape
                self._escape = escape
                return ""
            # Not an escape after all: its characters stand for themselves.
            return "\\\\" + escape[1:-1] + self._in_string(char)
        if escape[1] in '"\\/bfnrt':
            return escape
        if escape[1] == "'":
            return "'"
        return "\\\\" + self._in_string(char)


def _refuse(name: str) -> float:
    raise ValueError(name)
