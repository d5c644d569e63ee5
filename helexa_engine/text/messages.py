"""Chat messages as clients send them, made into what chat templates expect.

Two steps: :func:`read_turns` knows clients and nothing of templates (a wire format calls it, so that a bad message is refused
before a model is asked), :func:`fit` knows what the model's template takes. :func:`normalise` is both.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InvalidRequest, VisionUnsupported
from .json_repair import BrokenJson, JsonObjectStream

log = logging.getLogger(__name__)

#: How a system message that cannot stand where it is, is shown to the model instead.
SYSTEM_BLOCK = "<system-reminder>\n{}\n</system-reminder>"

#: Claude Code opens its system prompt with a line of this kind. It differs from request to request and says nothing to a
#: model; left in, no prompt would share a cached prefix with the one before it.
BILLING_HEADER = "x-anthropic-billing-header:"

TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("thinking", "reasoning", "reasoning_text")
SENSES = ("image", "image_url", "input_image", "audio", "audio_url", "input_audio", "video", "video_url")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def normalise(
    messages: Sequence[Mapping[str, Any]],
    *,
    system: bool = True,
    late_system: bool = True,
    same_role_turns: bool = True,
) -> list[dict[str, Any]]:
    """:func:`read_turns`, then :func:`fit`."""
    return fit(read_turns(messages), system=system, late_system=late_system, same_role_turns=same_role_turns)


def fit(
    turns: Sequence[Mapping[str, Any]], *, system: bool = True, late_system: bool = True, same_role_turns: bool = True
) -> list[dict[str, Any]]:
    """Turns in an order that the template takes. Nothing moves ahead of what stood before it, and what a turn becomes depends on
    the turns before it alone: the rendering of a conversation stays a prefix of the rendering of its continuation.

    Leading system messages merge into one. A system message that the template refuses becomes a marked block on the user's
    side, in its place: at the end of the tool result it follows (a turn of its own would be taken for a new question, and
    a call would be cut off from its results), else as a user turn.

    Args:
        system: whether the template takes a system message at all.
        late_system: whether it takes one that is not first.
        same_role_turns: whether it takes two turns of the user, or of the assistant, in a row; if not they merge.
    """
    result: list[dict[str, Any]] = []
    leading = True
    for turn in map(dict, turns):
        is_system = turn["role"] == "system"
        leading = leading and is_system
        if is_system and leading and result:
            result[0]["content"] += "\n\n" + turn["content"]
            continue
        if is_system and not (leading or late_system):
            block = SYSTEM_BLOCK.format(turn["content"])
            if result[-1]["role"] == "tool":
                result[-1]["content"] += "\n\n" + block
                continue
            turn = {"role": "user", "content": block}
        result.append(turn)
    if result and result[0]["role"] == "system" and not system:
        result[0] = {"role": "user", "content": SYSTEM_BLOCK.format(result[0]["content"])}
    return result if same_role_turns else _merged(result)


def _merged(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbours of the user, and of the assistant, as one turn: texts joined by a blank line, calls one after the other."""
    result: list[dict[str, Any]] = []
    for turn in turns:
        last = result[-1] if result else None
        if last is None or turn["role"] != last["role"] or turn["role"] not in ("user", "assistant"):
            result.append(turn)
            continue
        for key in ("content", "reasoning_content"):
            texts = [text for text in (last.get(key), turn.get(key)) if text]
            if texts or key in last:
                last[key] = "\n\n".join(texts)
        if turn.get("tool_calls"):
            last["tool_calls"] = [*last.get("tool_calls", ()), *turn["tool_calls"]]
    return result


def read_turns(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Turns with ``role`` (``developer`` is ``system``, ``function`` is ``tool``), ``content`` as text, and where there are any
    ``reasoning_content``, ``tool_calls`` with arguments as objects, ``tool_call_id`` and ``name``. Reading turns once more
    changes nothing. What is not known is skipped with one log line for the whole request.

    Raises:
        InvalidRequest: naming ``messages[i]...``.
        VisionUnsupported: a picture, sound or film.
    """
    skipped: Counter[str] = Counter()
    turns = []
    for i, message in enumerate(messages):
        turn = _read_turn(message, f"messages[{i}]", skipped)
        if turn is not None:
            turns.append(turn)
    if skipped:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in skipped.items())
        log.warning("skipped content parts of unknown type: %.400s", kinds)
    return turns


def _read_turn(message: Mapping[str, Any], path: str, skipped: Counter[str]) -> dict[str, Any] | None:
    if not isinstance(message, Mapping):
        raise InvalidRequest(path, f"expected an object, got {message!r:.80}")
    role = message.get("role")
    if role not in ROLES:
        raise InvalidRequest(f"{path}.role", f"expected one of {', '.join(ROLES)}; got {role!r:.80}")
    content, thoughts = _text(message.get("content"), f"{path}.content", skipped)
    turn = {key: value for key, value in message.items() if value is not None and key not in _READ}
    for key in ("name", "tool_call_id"):
        if not isinstance(turn.get(key, ""), str):
            raise InvalidRequest(f"{path}.{key}", f"expected a string, got {turn[key]!r:.80}")
    turn["role"] = {"developer": "system", "function": "tool"}.get(role, role)
    turn["content"] = content or ""
    if content is None and turn["role"] in ("system", "user"):
        raise InvalidRequest(f"{path}.content", f"expected text or parts in a {role} message, got null")
    if turn["role"] == "system":
        return _without_billing_header(turn)
    if role == "assistant":
        reasoning = _reasoning(message, path) or thoughts
        if reasoning:
            turn["reasoning_content"] = reasoning
        calls = _tool_calls(message, path)
        if calls:
            turn["tool_calls"] = calls
    return turn


#: Fields that are read here, in every spelling; the template sees what was read.
_READ = (
    "content",
    "reasoning",
    "reasoning_content",
    "reasoning_details",
    "thinking_blocks",
    "tool_calls",
    "function_call",
)


def _without_billing_header(turn: dict[str, Any]) -> dict[str, Any] | None:
    """The header is a block of its own, or the first line of a text; a message that was nothing else is dropped."""
    content: str = turn["content"]
    if not content.startswith(BILLING_HEADER):
        return turn
    turn["content"] = content.partition("\n")[2].lstrip("\n")
    return turn if turn["content"] else None


def _text(content: Any, path: str, skipped: Counter[str]) -> tuple[str | None, str]:
    """The text of a string or of parts, joined by newlines as vLLM and llama-server do, and the text of thinking parts."""
    if content is None or isinstance(content, str):
        return content, ""
    if not isinstance(content, Sequence):
        raise InvalidRequest(path, f"expected text, a list of parts or null, got {type(content).__name__}")
    texts, thoughts = [], []
    for i, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or not isinstance(kind, str):
            raise InvalidRequest(f"{path}[{i}]", "expected an object with a type")
        if kind in SENSES:
            raise VisionUnsupported(
                f"{path}[{i}]", f"this model reads text only, got a part of type {kind!r}; remove it"
            )
        if kind in TEXT_PARTS or kind == "refusal":
            text = part.get("refusal" if kind == "refusal" else "text")
            if not isinstance(text, str):
                raise InvalidRequest(f"{path}[{i}].text", f"expected a string, got {text!r:.80}")
            texts.append(text)
        elif kind in REASONING_PARTS:
            thoughts.append(_thought(part))
        else:
            skipped[kind[:80]] += 1
    return "\n".join(texts), "\n".join(filter(None, thoughts))


def _thought(part: Any) -> str:
    """The words of a thinking part, whichever of its spellings it has; a redacted one has none."""
    if not isinstance(part, Mapping):
        return ""
    for key in ("thinking", "text", "reasoning", "summary"):
        words = part.get(key)
        if isinstance(words, str):
            return words
        if isinstance(words, Sequence):  # Mistral nests text parts
            return "\n".join(filter(None, map(_thought, words)))
    return ""


def _reasoning(message: Mapping[str, Any], path: str) -> str:
    """From the field of vLLM and llama-server, of OpenRouter, or of litellm; the first that says something."""
    for key in ("reasoning_content", "reasoning"):
        value = message.get(key)
        if isinstance(value, str):
            if value:
                return value
        elif value is not None:
            raise InvalidRequest(f"{path}.{key}", f"expected a string, got {value!r:.80}")
    for key in ("thinking_blocks", "reasoning_details"):
        blocks = message.get(key)
        words = "\n".join(filter(None, map(_thought, blocks))) if isinstance(blocks, list) else ""
        if words:
            return words
    return ""


def _tool_calls(message: Mapping[str, Any], path: str) -> list[dict[str, Any]]:
    calls = message.get("tool_calls")
    if calls is None:
        # The form before tools: one call, without an id.
        call = message.get("function_call")
        return [] if call is None else [_tool_call({"function": call}, f"{path}.function_call", "")]
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise InvalidRequest(f"{path}.tool_calls", f"expected a list, got {calls!r:.80}")
    return [_tool_call(call, f"{path}.tool_calls[{k}]", ".function") for k, call in enumerate(calls)]


def _tool_call(call: Any, path: str, at: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise InvalidRequest(path, f"expected an object, got {call!r:.80}")
    function = call.get("function")
    if not isinstance(function, Mapping):
        raise InvalidRequest(f"{path}{at}", f"expected an object, got {function!r:.80}")
    if not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{path}{at}.name", "expected the name of the function that was called")
    read = {"type": "function", "function": {"name": function["name"], "arguments": _arguments(function, path + at)}}
    call_id = call.get("id")
    return {"id": call_id, **read} if isinstance(call_id, str) else read


def _arguments(function: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Arguments as an object: templates iterate them. JSON text is read, also where it was cut off or written twice over:
    agents send a call again with every request, and one slip of a model must not end the conversation."""
    arguments = function.get("arguments")
    for _ in range(2):
        if not isinstance(arguments, str):
            break
        arguments = _read_json(arguments) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise InvalidRequest(
            f"{path}.arguments", f"expected an object or its JSON text, got {function['arguments']!r:.80}"
        )
    return dict(arguments)


def _read_json(text: str) -> Any:
    """The value; of an object that is cut off, or broken at some place, what stands before; False if there is nothing to save."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        stream, repaired = JsonObjectStream(), ""
        try:
            for char in text.strip():
                if stream.done:
                    break
                repaired += stream.feed(char)
            return json.loads(repaired + ("" if stream.done else stream.close()))
        except (BrokenJson, ValueError, RecursionError):
            return False
