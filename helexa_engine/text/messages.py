"""Chat messages as clients send them, made into what chat templates expect: :func:`normalise`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InvalidRequest

log = logging.getLogger(__name__)


class VisionUnsupported(InvalidRequest):
    """An image, video or sound was sent to a model that reads text."""

    code = "vision_unsupported"


#: How a system message that is not first is shown to a template that refuses it: in place, so that the cached prefix before
#: it stays valid.
SYSTEM_BLOCK = "<system-reminder>\n{}\n</system-reminder>"


def normalise(
    messages: Sequence[Mapping[str, Any]], *, system: bool = True, late_system: bool = True
) -> list[dict[str, Any]]:
    """Messages with string contents, roles the template knows and tool arguments as objects.

    Args:
        system: whether the template takes a system message at all.
        late_system: whether it takes one that is not first.

    Raises:
        InvalidRequest: naming ``messages[i]...``.
    """
    result: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        turn = _normalise_one(message, f"messages[{i}]")
        if turn["role"] == "system":
            first = all(earlier["role"] == "system" for earlier in result)
            if first and system and result:
                result[0]["content"] += "\n\n" + turn["content"]
                continue
            if not (system if first else late_system):
                turn = {"role": "user", "content": SYSTEM_BLOCK.format(turn["content"])}
        result.append(turn)
    return result


def _normalise_one(message: Mapping[str, Any], path: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(path, f"expected an object, got {message!r:.80}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{path}.role", f"expected a role such as 'user', got {role!r:.80}")
    turn = {key: value for key, value in message.items() if value is not None and key != "reasoning"}
    turn["role"] = "system" if role == "developer" else role
    turn["content"] = _text(message.get("content"), f"{path}.content")
    reasoning = message.get("reasoning_content", message.get("reasoning"))
    if reasoning is not None:
        turn["reasoning_content"] = _text(reasoning, f"{path}.reasoning_content")
    calls = message.get("tool_calls")
    turn.pop("tool_calls", None)
    if calls:
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise InvalidRequest(f"{path}.tool_calls", f"expected a list, got {calls!r:.80}")
        turn["tool_calls"] = [_tool_call(call, f"{path}.tool_calls[{k}]") for k, call in enumerate(calls)]
    return turn


def _text(content: Any, path: str) -> str:
    """A string of a string, of null (an assistant turn with calls only) or of a list of text parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise InvalidRequest(path, f"expected a string or a list of parts, got {content!r:.80}")
    pieces = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            pieces.append(part)
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        elif kind in ("image_url", "image", "input_image", "video", "video_url", "input_audio"):
            raise VisionUnsupported(f"{path}[{i}]", f"this model reads text only, got a part of type {kind!r}")
        else:
            log.info("%s[%d]: skipped a content part of unknown type %r", path, i, kind)
    return "\n".join(pieces)


def _tool_call(call: Any, path: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise InvalidRequest(path, f"expected an object, got {call!r:.80}")
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{path}.function.name", "expected the name of the function that was called")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            raise InvalidRequest(
                f"{path}.function.arguments", f"expected JSON text of an object, got {arguments!r:.80}"
            ) from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise InvalidRequest(f"{path}.function.arguments", f"expected an object, got {arguments!r:.80}")
    return {
        "id": call.get("id") or "",
        "type": "function",
        "function": {"name": function["name"], "arguments": dict(arguments)},
    }
