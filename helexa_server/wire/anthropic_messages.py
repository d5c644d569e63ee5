"""``POST /v1/messages`` and ``/v1/messages/count_tokens``: Anthropic's wire format."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from helexa_engine.errors import HelexaError, InvalidRequest, VisionUnsupported
from helexa_engine.events import (
    Completion,
    ContentDelta,
    Delta,
    Event,
    Failed,
    Finished,
    GenerationResult,
    PromptProcessed,
    ReasoningDelta,
    ToolCallStart,
)
from helexa_engine.generate_request import GenerateRequest
from helexa_engine.sampling_params import SamplingParams, StructuredOutput
from helexa_engine.text.messages import BILLING_HEADER

from .frame import Call, Frame, decode, deltas, named, typed_frame
from .openai import Accounts, thinking_options

__all__ = ["Projector", "build_response", "error_body", "parse_request"]

log = logging.getLogger(__name__)

ROLES = ("user", "assistant", "system")

#: Clients want a signature on what was thought, and some drop a block whose signature is empty. Nothing here reads it.
SIGNATURE = "aGVsZXhh"

#: Our names of sampling settings to the ones of this wire format.
NAMES = {
    "stop": "stop_sequences",
    "thinking_budget": "thinking.budget_tokens",
    "reasoning_effort": "output_config.effort",
}


class Message(msgspec.Struct):
    """One turn. ``content`` is checked by hand: text or blocks."""

    role: str
    content: Any = None


class Thinking(msgspec.Struct):
    """Whether the model is to think, and for how many tokens at most."""

    type: str
    budget_tokens: int | None = None
    display: str | None = None


class ToolChoice(msgspec.Struct):
    """``auto``, ``any``, ``none`` or ``tool`` with its name."""

    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputConfig(msgspec.Struct):
    """How hard to think, and the format of the answer."""

    effort: str | None = None
    format: dict[str, Any] | None = None


class MessagesBody(msgspec.Struct, kw_only=True):
    """The body, the rest of which is ignored. Past Anthropic's own fields are the sampling settings its format has no word for."""

    messages: list[msgspec.Raw]  # decoded one by one, so that an error can name the index
    model: str | None = None
    max_tokens: int | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def parse_request(body: bytes) -> Call:
    """The body as a call. Unknown fields are ignored. Raises :class:`InvalidRequest` with the path of the bad field."""
    ask = decode(body, MessagesBody)
    messages = _system(ask.system)
    for i, raw in enumerate(ask.messages):
        messages += _turns(decode(raw, Message, f"messages[{i}]"), f"messages[{i}]")
    if messages and messages[-1]["role"] == "assistant":
        raise InvalidRequest(
            f"messages[{len(ask.messages) - 1}].role",
            "this server does not continue an assistant's turn; end with a user message",
        )
    tools = _tools(ask.tools)
    parallel = not (ask.tool_choice and ask.tool_choice.disable_parallel_tool_use)
    with named(NAMES):
        template_kwargs, budget = _thinking(ask)
        params = _sampling_params(ask, budget)
    request = GenerateRequest(
        messages=messages,
        tools=tools,
        tool_choice=_tool_choice(ask.tool_choice, tools),
        parallel_tool_calls=parallel,
        chat_template_kwargs=template_kwargs,
        sampling_params=params,
    )
    return Call(
        model=ask.model,
        requests=(request,),
        stream=bool(ask.stream),
        parallel_tool_calls=parallel,
        hide_reasoning=ask.thinking is not None and ask.thinking.display == "omitted",
    )


def _sampling_params(ask: MessagesBody, thinking_budget: int | None) -> SamplingParams:
    return SamplingParams(
        max_tokens=ask.max_tokens,
        temperature=ask.temperature,
        top_p=ask.top_p,
        top_k=ask.top_k,
        min_p=ask.min_p,
        presence_penalty=ask.presence_penalty,
        frequency_penalty=ask.frequency_penalty,
        repetition_penalty=ask.repetition_penalty,
        seed=ask.seed,
        stop=tuple(ask.stop_sequences or ()),
        structured=_structured(ask.output_config),
        thinking_budget=thinking_budget,
    )


def _structured(config: OutputConfig | None) -> StructuredOutput | None:
    if config is None or config.format is None:
        return None
    if config.format.get("type") != "json_schema":
        raise InvalidRequest(
            "output_config.format.type", f"expected json_schema, got {config.format.get('type')!r:.80}"
        )
    schema = config.format.get("schema")
    if not isinstance(schema, dict):
        raise InvalidRequest("output_config.format.schema", f"expected a JSON Schema object, got {schema!r:.80}")
    return StructuredOutput(json_schema=schema, path="output_config.format.schema")


def _thinking(ask: MessagesBody) -> tuple[dict[str, Any], int | None]:
    """Template variables and the budget. As in Anthropic's API a request that does not ask for thinking gets none."""
    thinking = ask.thinking
    kinds = ("enabled", "adaptive", "between_tools", "disabled")
    if thinking is not None and thinking.type not in kinds:
        raise InvalidRequest("thinking.type", f"expected one of {', '.join(kinds)}; got {thinking.type!r:.80}")
    return thinking_options(
        ask.output_config.effort if ask.output_config else None,
        thinking.budget_tokens if thinking else None,
        thinking is not None and thinking.type != "disabled",
        ask.chat_template_kwargs,
    )


# -- Messages


def _system(system: str | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    if isinstance(system, list):
        blocks = [block for block in system if not str(block.get("text", "")).startswith(BILLING_HEADER)]
        system = "\n\n".join(_texts(blocks, "system"))
    return [{"role": "system", "content": system}] if system else []


def _turns(message: Message, path: str) -> list[dict[str, Any]]:
    """A turn in the shape chat templates iterate: tool results are turns of their own, as they stand among the user's words."""
    if message.role not in ROLES:
        raise InvalidRequest(f"{path}.role", f"expected one of {', '.join(ROLES)}; got {message.role!r:.80}")
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    blocks = _blocks(message.content, f"{path}.content")
    if message.role == "assistant":
        return [_assistant(blocks, f"{path}.content")]
    turns: list[dict[str, Any]] = []
    words: list[str] = []

    def speak() -> None:
        if words:
            turns.append({"role": message.role, "content": "\n".join(words)})
            words.clear()

    for i, block in enumerate(blocks):
        where = f"{path}.content[{i}]"
        if block["type"] == "tool_result":
            speak()
            turns.append(_tool_result(block, where))
        else:
            words += _text(block, where)
    speak()
    return turns or [{"role": message.role, "content": ""}]


def _assistant(blocks: list[dict[str, Any]], path: str) -> dict[str, Any]:
    words: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for i, block in enumerate(blocks):
        where = f"{path}[{i}]"
        if block["type"] == "thinking":
            thoughts.append(_string(block, "thinking", where))
        elif block["type"] == "tool_use":
            arguments = block.get("input")
            if not isinstance(arguments, dict):
                raise InvalidRequest(f"{where}.input", f"expected an object, got {arguments!r:.80}")
            function = {"name": _string(block, "name", where), "arguments": arguments}
            calls.append({"id": _string(block, "id", where), "type": "function", "function": function})
        else:
            words += _text(block, where)
    content = "\n".join(words)
    turn: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else "")}
    if reasoning := "\n".join(filter(None, thoughts)):  # a block with display "omitted" comes back empty
        turn["reasoning_content"] = reasoning
    if calls:
        turn["tool_calls"] = calls
    return turn


def _tool_result(block: dict[str, Any], path: str) -> dict[str, Any]:
    content = block.get("content")
    if isinstance(content, list):
        content = "\n".join(_texts(content, f"{path}.content"))
    elif not isinstance(content, str | None):
        raise InvalidRequest(f"{path}.content", f"expected text, a list of blocks or nothing, got {content!r:.80}")
    if not content and block.get("is_error"):
        content = "error"
    return {"role": "tool", "content": content or "", "tool_call_id": _string(block, "tool_use_id", path)}


def _blocks(content: Any, path: str) -> list[dict[str, Any]]:
    """Blocks that have a type."""
    if not isinstance(content, list):
        raise InvalidRequest(path, f"expected text or a list of blocks, got {content!r:.80}")
    for i, block in enumerate(content):
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise InvalidRequest(f"{path}[{i}]", "expected an object with a type")
    return content


def _texts(content: Any, path: str) -> list[str]:
    return [text for i, block in enumerate(_blocks(content, path)) for text in _text(block, f"{path}[{i}]")]


def _text(block: dict[str, Any], path: str) -> list[str]:
    """The words in a block, none for one whose type is unknown."""
    kind = block["type"]
    if kind == "text":
        return [_string(block, "text", path)]
    if kind == "search_result":
        return _texts(block.get("content"), f"{path}.content")
    if kind == "document":
        return _document(block.get("source"), f"{path}.source")
    if kind == "image":
        raise VisionUnsupported(path, "this model reads text only; remove the image")
    if kind == "redacted_thinking":  # for its vendor alone to read
        return []
    log.warning("skipped %s: unknown content block %.80r", path, kind)
    return []


def _document(source: Any, path: str) -> list[str]:
    kind = source.get("type") if isinstance(source, dict) else None
    if kind == "text":
        return [_string(source, "data", path)]
    if kind == "content":
        content = source.get("content")
        return [content] if isinstance(content, str) else _texts(content, f"{path}.content")
    raise VisionUnsupported(path, f"this model reads text only, got a document of type {kind!r:.80}")


def _string(block: dict[str, Any], name: str, path: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"{path}.{name}", f"expected a string, got {value!r:.80}")
    return value


# -- Tools


def _tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """The client's own tools as functions; those that only their vendor can run are skipped with one log line."""
    functions = []
    for i, tool in enumerate(tools or ()):
        if tool.get("type") not in (None, "custom"):
            log.warning("skipped tools[%d]: unknown tool type %.80r", i, tool["type"])
            continue
        name, schema, description = tool.get("name"), tool.get("input_schema"), tool.get("description")
        if not isinstance(name, str) or not name:
            raise InvalidRequest(f"tools[{i}].name", f"expected a name, got {name!r:.80}")
        if not isinstance(schema, dict):
            raise InvalidRequest(f"tools[{i}].input_schema", f"expected a JSON Schema object, got {schema!r:.80}")
        function = {"name": name, "parameters": schema}
        if isinstance(description, str):
            function = {"name": name, "description": description, "parameters": schema}
        functions.append({"type": "function", "function": function})
    return functions or None


def _tool_choice(choice: ToolChoice | None, tools: list[dict[str, Any]] | None) -> str | dict[str, Any]:
    if choice is None:
        return "auto"
    if choice.type == "tool":
        if choice.name not in [tool["function"]["name"] for tool in tools or ()]:
            raise InvalidRequest("tool_choice.name", f"{choice.name!r:.80} is not among tools")
        return {"name": choice.name}
    words = {"auto": "auto", "any": "required", "none": "none"}
    if choice.type not in words:
        raise InvalidRequest("tool_choice.type", f"expected auto, any, tool or none, got {choice.type!r:.80}")
    if choice.type == "any" and not tools:
        raise InvalidRequest("tool_choice", "any needs at least one tool")
    return words[choice.type]


# -- Answers


class _Blocks:
    """Cuts deltas into content blocks: events without their frames. One block is open at a time."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._index = -1
        self._open: str | None = None

    def push(self, delta: Delta) -> Iterator[dict[str, Any]]:
        if not self._call.keeps(delta):
            return
        if isinstance(delta, ContentDelta):
            if delta.text:
                if self._open != "text":
                    yield from self._start("text", {"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": delta.text})
        elif isinstance(delta, ReasoningDelta):
            if delta.text:
                if self._open != "thinking":
                    yield from self._start("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                if not self._call.hide_reasoning:
                    yield self._delta({"type": "thinking_delta", "thinking": delta.text})
        elif isinstance(delta, ToolCallStart):
            block = {"type": "tool_use", "id": delta.id, "name": delta.name, "input": {}}
            yield from self._start("tool_use", block)
        elif delta.arguments:
            yield self._delta({"type": "input_json_delta", "partial_json": delta.arguments})

    def _start(self, kind: str, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self.stop()
        self._open = kind
        self._index += 1
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def stop(self) -> Iterator[dict[str, Any]]:
        """Closes the block that is open."""
        if self._open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": SIGNATURE})
        if self._open is not None:
            self._open = None
            yield {"type": "content_block_stop", "index": self._index}


class Projector:
    """Events as Anthropic's stream: a message starts, blocks start, grow and stop, the message ends."""

    def __init__(self, call: Call, model: str, created: int) -> None:
        self._blocks = _Blocks(call)
        self._message = _message(call, model)
        self._accounts = Accounts()

    def push(self, event: Event, prompt_index: int = 0) -> list[Frame]:
        self._accounts.push(event)
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, PromptProcessed):
            message = {**self._message, "content": [], "usage": _usage(self._accounts)}
            return [typed_frame({"type": "message_start", "message": message})]
        if isinstance(event, Finished):
            end = {"type": "message_delta", "delta": _stop(event), **_reckoning(self._accounts)}
            return [*map(typed_frame, self._blocks.stop()), typed_frame(end)]
        return [typed_frame(payload) for payload in self._blocks.push(event)]

    def keep_alive(self) -> list[Frame]:
        return [typed_frame({"type": "ping"})]

    def finish(self) -> list[Frame]:
        return [typed_frame({"type": "message_stop"})]

    def fail(self, error: HelexaError, status: int) -> list[Frame]:
        return [typed_frame(error_body(error, status))]


def build_response(call: Call, results: Sequence[GenerationResult], model: str, created: int) -> dict[str, Any]:
    """The whole answer at once: the blocks that its stream would have made."""
    completion = results[0].completions[0]
    return {
        **_message(call, model),
        "content": _content(call, completion),
        **_stop(completion),
        **_reckoning(Accounts.of_results(results)),
    }


def _content(call: Call, completion: Completion) -> list[dict[str, Any]]:
    blocks = _Blocks(call)
    content: list[dict[str, Any]] = []
    events = [event for delta in deltas(completion) for event in blocks.push(delta)]
    for event in [*events, *blocks.stop()]:
        if event["type"] == "content_block_start":
            content.append(event["content_block"])
        elif event["type"] == "content_block_delta":
            delta, block = event["delta"], content[-1]
            if delta["type"] == "input_json_delta":
                block["input"] = msgspec.Raw(delta["partial_json"].encode())  # JSON of an object already
            else:
                for name in ("text", "thinking", "signature"):
                    if name in delta:
                        block[name] += delta[name]
    return content


def _message(call: Call, model: str) -> dict[str, Any]:
    return {
        "id": f"msg_{call.requests[0].request_id}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "stop_reason": None,
        "stop_sequence": None,
    }


def _stop(end: Finished | Completion) -> dict[str, Any]:
    if isinstance(end.stop_reason, str) and end.finish_reason != "tool_calls":
        return {"stop_reason": "stop_sequence", "stop_sequence": end.stop_reason}
    reason = {"tool_calls": "tool_use", "length": "max_tokens"}.get(end.finish_reason, "end_turn")
    return {"stop_reason": reason, "stop_sequence": None}


def _reckoning(accounts: Accounts) -> dict[str, Any]:
    """Usage, and beside it the timings that the other wire formats give too."""
    return {"usage": _usage(accounts), "timings": accounts.timings_body()}


def _usage(accounts: Accounts) -> dict[str, Any]:
    """Anthropic counts what came from the cache beside the other input tokens, not among them."""
    return {
        "input_tokens": accounts.prompt_tokens - accounts.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": accounts.cached_tokens,
        "output_tokens": accounts.completion_tokens,
        "output_tokens_details": {"thinking_tokens": accounts.reasoning_tokens},
    }


#: Anthropic's words by HTTP status.
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


def error_body(error: HelexaError, status: int) -> dict[str, Any]:
    """``{"type": "error", "error": {type, message, code, param, ...facts}}``; the last three are ours."""
    own = {
        "type": _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error"),
        "message": error.message,
        "code": error.code,
        "param": error.path if isinstance(error, InvalidRequest) else None,
    }
    return {"type": "error", "error": {**error.facts, **own}}
