"""What a tool's JSON schema says of a value: its types, through references, and the value as one of them."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .json_repair import escape_json

_MAX_REFERENCES = 8  # in a row, in a schema

_TYPE_NAMES: dict[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
    dict: "object",
    list: "array",
}


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
    if types & {"integer", "number"} and len(word) < 400 and is_number(word):
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


def is_number(text: str) -> bool:
    """Whether ``text`` is a finite number as JSON, or nearly as JSON, writes it."""
    try:
        return math.isfinite(float(text)) and "_" not in text
    except ValueError:
        return False
