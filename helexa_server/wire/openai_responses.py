"""``POST /v1/responses``: OpenAI's Responses wire format, without the server's memory of earlier ones."""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from helexa_engine.errors import HelexaError, InvalidRequest, VisionUnsupported
from helexa_engine.events import (
    ContentDelta,
    Delta,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationResult,
    PromptProcessed,
    ReasoningDelta,
    ToolCallStart,
)
from helexa_engine.generate_request import GenerateRequest
from helexa_engine.sampling_params import SamplingParams, StructuredOutput

from .frame import Call, Frame, decode, deltas, named, typed_frame
from .openai import Accounts, chat_logprobs, check_logprobs, error_body, thinking_options

__all__ = ["Projector", "build_response", "error_body", "parse_request"]

log = logging.getLogger(__name__)

ROLES = ("user", "assistant", "system", "developer")
TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")

#: Our names of sampling settings to the ones of this wire format.
NAMES = {"max_tokens": "max_output_tokens", "logprobs": "top_logprobs", "reasoning_effort": "reasoning.effort"}

#: What may be asked to come along, and does; the rest of ``include`` is about tools that only OpenAI can run.
INCLUDE_LOGPROBS = "message.output_text.logprobs"
INCLUDE_REASONING = "reasoning.encrypted_content"

#: Clients that keep no reasoning text send back what they cannot read. Here it is the text itself in base64: a model may read
#: its own thoughts again, and they are no secret from whoever they were sent to.
SEALED = "helexa1."


class Item(msgspec.Struct):
    """The fields of the items that are read. A bare ``{role, content}`` is a message."""

    type: str | None = None
    role: str | None = None
    content: Any = None
    summary: Any = None
    encrypted_content: str | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | None = None
    output: Any = None


class Reasoning(msgspec.Struct):
    """How hard to think, and whether to tell a summary."""

    effort: str | None = None
    summary: str | None = None


class Text(msgspec.Struct):
    """The format of the answer."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponsesBody(msgspec.Struct, kw_only=True):
    """The body, the rest of which is ignored. Past OpenAI's own fields are the sampling settings its format has no word for."""

    input: str | list[msgspec.Raw]  # items are decoded one by one, so that an error can name the index
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: Text | None = None
    stream: bool | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None
    top_logprobs: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    thinking_budget: int | None = None
    priority: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def parse_request(body: bytes) -> Call:
    """The body as a call. Unknown fields are ignored. Raises :class:`InvalidRequest` with the path of the bad field."""
    ask = decode(body, ResponsesBody)
    _refuse_memory(ask)
    tools, namespaced = _tools(ask.tools)
    parallel = ask.parallel_tool_calls is not False
    with named(NAMES):
        template_kwargs, budget = thinking_options(
            ask.reasoning.effort if ask.reasoning else None, ask.thinking_budget, None, ask.chat_template_kwargs
        )
        params = _sampling_params(ask, budget)
    request = GenerateRequest(
        messages=_messages(ask),
        tools=tools,
        tool_choice=_tool_choice(ask.tool_choice, tools),
        parallel_tool_calls=parallel,
        chat_template_kwargs=template_kwargs,
        sampling_params=params,
        priority=ask.priority or 0,
    )
    return Call(
        model=ask.model,
        requests=(request,),
        stream=bool(ask.stream),
        parallel_tool_calls=parallel,
        summarise_reasoning=ask.reasoning is not None and ask.reasoning.summary is not None,
        namespaced=namespaced,
        seal_reasoning=INCLUDE_REASONING in (ask.include or ()),
        repeated={
            "instructions": ask.instructions,
            "max_output_tokens": ask.max_output_tokens,
            "metadata": ask.metadata or {},
            "parallel_tool_calls": parallel,
            "previous_response_id": None,
            "reasoning": ask.reasoning or Reasoning(),
            "store": False,
            "temperature": ask.temperature,
            "text": {"format": (ask.text and ask.text.format) or {"type": "text"}},
            "tool_choice": ask.tool_choice or "auto",
            "tools": ask.tools or [],
            "top_logprobs": ask.top_logprobs or 0,
            "top_p": ask.top_p,
            "truncation": "disabled",
        },
    )


def _sampling_params(ask: ResponsesBody, thinking_budget: int | None) -> SamplingParams:
    return SamplingParams(
        max_tokens=ask.max_output_tokens,
        temperature=ask.temperature,
        top_p=ask.top_p,
        top_k=ask.top_k,
        min_p=ask.min_p,
        presence_penalty=ask.presence_penalty,
        frequency_penalty=ask.frequency_penalty,
        repetition_penalty=ask.repetition_penalty,
        seed=ask.seed,
        stop=(ask.stop,) if isinstance(ask.stop, str) else tuple(ask.stop or ()),
        logprobs=_logprobs(ask),
        structured=_structured(ask.text),
        thinking_budget=thinking_budget,
    )


def _refuse_memory(ask: ResponsesBody) -> None:
    """``store`` may be asked for; what would need it may not."""
    reason = "this server keeps no responses; send the whole conversation as input"
    if ask.previous_response_id is not None:
        raise InvalidRequest("previous_response_id", reason)
    if ask.conversation is not None:
        raise InvalidRequest("conversation", reason)
    if ask.prompt is not None:
        raise InvalidRequest("prompt", "this server keeps no prompts; send instructions and input")
    if ask.background:
        raise InvalidRequest("background", "this server answers while the client waits; leave background out")


def _logprobs(ask: ResponsesBody) -> int | None:
    top = check_logprobs("top_logprobs", ask.top_logprobs)
    return top or 0 if top or INCLUDE_LOGPROBS in (ask.include or ()) else None


def _structured(text: Text | None) -> StructuredOutput | None:
    if text is None or text.format is None or text.format.get("type") == "text":
        return None
    kind = text.format.get("type")
    if kind == "json_object":
        return StructuredOutput(json_object=True, path="text.format")
    if kind != "json_schema":
        raise InvalidRequest("text.format.type", f"expected text, json_object or json_schema, got {kind!r:.80}")
    schema = text.format.get("schema")
    if not isinstance(schema, dict):
        raise InvalidRequest("text.format.schema", f"expected a JSON Schema object, got {schema!r:.80}")
    return StructuredOutput(json_schema=schema, path="text.format.schema")


# -- Items


def _messages(ask: ResponsesBody) -> list[dict[str, Any]]:
    """Items as turns in the shape chat templates iterate: thoughts, words and calls that follow each other are one turn."""
    messages: list[dict[str, Any]] = []
    if ask.instructions:
        messages.append({"role": "system", "content": ask.instructions})
    if isinstance(ask.input, str):
        return [*messages, {"role": "user", "content": ask.input}]
    for i, raw in enumerate(ask.input):
        path = f"input[{i}]"
        item = decode(raw, Item, path)
        kind = item.type or ("message" if item.role is not None else None)
        if kind == "message":
            _add_message(messages, item, path)
        elif kind == "reasoning":
            if reasoning := _reasoning(item, path):
                messages.append({"role": "assistant", "content": "", "reasoning_content": reasoning})
        elif kind == "function_call":
            _add_call(messages, item, path)
        elif kind == "function_call_output":
            output = _content(item.output, f"{path}.output")
            messages.append({"role": "tool", "content": output, "tool_call_id": _given(item, "call_id", path)})
        elif kind == "item_reference":
            raise InvalidRequest(path, "this server keeps no items to refer to; send the item itself")
        elif kind is None:
            raise InvalidRequest(f"{path}.type", "expected an item with a type, or a message with a role")
        else:
            log.warning("skipped %s: unknown item %.80r", path, kind)
    return messages


def _add_message(messages: list[dict[str, Any]], item: Item, path: str) -> None:
    if item.role not in ROLES:
        raise InvalidRequest(f"{path}.role", f"expected one of {', '.join(ROLES)}; got {item.role!r:.80}")
    content = _content(item.content, f"{path}.content")
    last = messages[-1] if messages else None
    if item.role == "assistant" and last and _is_only_reasoning(last):
        last["content"] = content
    else:
        messages.append({"role": item.role, "content": content})


def _add_call(messages: list[dict[str, Any]], item: Item, path: str) -> None:
    name = _given(item, "name", path)
    name = _joined(item.namespace, name) if item.namespace else name
    function = {"name": name, "arguments": item.arguments or "{}"}
    call = {"id": _given(item, "call_id", path), "type": "function", "function": function}
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    turn = messages[-1]
    turn["content"] = turn["content"] or None
    turn.setdefault("tool_calls", []).append(call)


def _is_only_reasoning(turn: dict[str, Any]) -> bool:
    return "reasoning_content" in turn and not turn["content"] and "tool_calls" not in turn


def _reasoning(item: Item, path: str) -> str:
    """What was thought: the text, or what was sealed for a client that keeps none, or the summary."""
    if item.content:
        return _content(item.content, f"{path}.content")
    sealed = item.encrypted_content or ""
    if sealed.startswith(SEALED):
        try:
            return base64.b64decode(sealed.removeprefix(SEALED), validate=True).decode()
        except (binascii.Error, ValueError):
            raise InvalidRequest(f"{path}.encrypted_content", "is not what this server sent") from None
    return _content(item.summary or "", f"{path}.summary")


def _given(item: Item, name: str, path: str) -> str:
    value: str | None = getattr(item, name)
    if not value:
        raise InvalidRequest(f"{path}.{name}", "expected a string, got none")
    return value


def _content(content: Any, path: str) -> str:
    """Text as it is; text parts joined by newlines; unknown parts skipped with one log line."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(path, f"expected text or a list of parts, got {content!r:.80}")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise InvalidRequest(f"{path}[{i}]", "expected an object with a type")
        if kind in ("input_image", "input_file", "input_audio"):
            raise VisionUnsupported(f"{path}[{i}]", f"this model reads text only; remove the {kind}")
        text = part.get("refusal" if kind == "refusal" else "text")
        if kind not in (*TEXT_PARTS, "refusal"):
            log.warning("skipped %s[%d]: unknown content part %.80r", path, i, kind)
        elif isinstance(text, str):
            texts.append(text)
        else:
            raise InvalidRequest(f"{path}[{i}].text", f"expected a string, got {text!r:.80}")
    return "\n".join(texts)


# -- Tools


def _tools(
    tools: list[dict[str, Any]] | None,
) -> tuple[list[dict[str, Any]] | None, dict[str, tuple[str, str]]]:
    """Function tools in chat's shape, and :attr:`Call.namespaced` of those in a namespace, as Codex groups what runs elsewhere.

    Hosted tools, which only their vendor can run, are skipped with one log line.
    """
    functions: list[dict[str, Any]] = []
    namespaced: dict[str, tuple[str, str]] = {}
    for i, tool in enumerate(tools or ()):
        path = f"tools[{i}]"
        if tool.get("type") != "namespace":
            functions += _function(tool, path)
            continue
        namespace, inner = _name(tool, path), tool.get("tools")
        if not isinstance(inner, list) or not all(isinstance(item, dict) for item in inner):
            raise InvalidRequest(f"{path}.tools", f"expected a list of tools, got {inner!r:.80}")
        for k, item in enumerate(inner):
            for function in _function(item, f"{path}.tools[{k}]"):
                name = function["function"]["name"]
                function["function"]["name"] = _joined(namespace, name)
                namespaced[_joined(namespace, name)] = (namespace, name)
                functions.append(function)
    return functions or None, namespaced


def _function(tool: dict[str, Any], path: str) -> list[dict[str, Any]]:
    """The function, or nothing of a tool of another kind."""
    if tool.get("type") != "function":
        log.warning("skipped %s: unknown tool type %.80r", path, tool.get("type"))
        return []
    name, parameters = _name(tool, path), tool.get("parameters")
    if not isinstance(parameters, dict | None):
        raise InvalidRequest(f"{path}.parameters", f"expected a JSON Schema object, got {parameters!r:.80}")
    function = {key: tool[key] for key in ("description", "parameters") if tool.get(key) is not None}
    return [{"type": "function", "function": {"name": name, **function}}]


def _name(tool: dict[str, Any], path: str) -> str:
    name = tool.get("name")
    if not isinstance(name, str) or not name:
        raise InvalidRequest(f"{path}.name", f"expected a name, got {name!r:.80}")
    return name


def _joined(namespace: str, name: str) -> str:
    """What the model calls a function of a namespace."""
    return f"{namespace.removesuffix('__')}__{name}"


def _tool_choice(choice: str | dict[str, Any] | None, tools: list[dict[str, Any]] | None) -> str | dict[str, Any]:
    if choice is None:
        return "auto"
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            raise InvalidRequest("tool_choice", f"expected none, auto, required or a function, got {choice!r:.80}")
        if choice == "required" and not tools:
            raise InvalidRequest("tool_choice", "required needs at least one function in tools")
        return choice
    if choice.get("type") != "function":
        raise InvalidRequest("tool_choice.type", f"expected function, got {choice.get('type')!r:.80}")
    if choice.get("name") not in [tool["function"]["name"] for tool in tools or ()]:
        raise InvalidRequest("tool_choice.name", f"{choice.get('name')!r:.80} is not among tools")
    return {"name": choice["name"]}


# -- Answers


#: The list of an item that its text goes to, and the names that its part, the part's place and its text have in events.
_PARTS = {
    "output_text": ("content", "content_part", "content_index", "output_text"),
    "reasoning_text": ("content", "content_part", "content_index", "reasoning_text"),
    "summary_text": ("summary", "reasoning_summary_part", "summary_index", "reasoning_summary_text"),
}


class _Items:
    """Cuts deltas into output items: events without their numbers. One item is open at a time.

    Who asks for a summary of reasoning gets the reasoning as its own summary: nothing here writes a shorter one, and clients
    that ask show nothing else.

    Attributes:
        items: those that are done.
    """

    def __init__(self, call: Call) -> None:
        self.items: list[dict[str, Any]] = []
        self._call = call
        self._id = call.requests[0].request_id
        self._wants_logprobs = call.requests[0].sampling_params.logprobs is not None
        self._open: dict[str, Any] | None = None
        self._part_type = ""  # of the open item; a call has none
        self._text = ""
        self._logprobs: list[dict[str, Any]] = []

    def push(self, delta: Delta) -> Iterator[dict[str, Any]]:
        if not self._call.keeps(delta):
            return
        if isinstance(delta, ContentDelta):
            if not self._is_open("message"):
                if not delta.text:
                    return
                item = {"type": "message", "role": "assistant", "content": []}
                yield from self._start(item, "msg", "output_text")
            logprobs = chat_logprobs(delta.logprobs) if self._wants_logprobs else []
            self._logprobs += logprobs
            yield self._text_event("delta", delta=self._add(delta.text), logprobs=logprobs)
        elif isinstance(delta, ReasoningDelta):
            if not self._is_open("reasoning"):
                if not delta.text:
                    return
                part_type = "summary_text" if self._call.summarise_reasoning else "reasoning_text"
                yield from self._start({"type": "reasoning", "summary": [], "content": []}, "rs", part_type)
            yield self._text_event("delta", delta=self._add(delta.text))
        elif isinstance(delta, ToolCallStart):
            item = {"type": "function_call", "call_id": delta.id, "name": delta.name, "arguments": ""}
            if delta.name in self._call.namespaced:
                item["namespace"], item["name"] = self._call.namespaced[delta.name]
            yield from self._start(item, "fc", "")
        elif delta.arguments:
            yield self._event("function_call_arguments.delta", delta=self._add(delta.arguments))

    def _add(self, text: str) -> str:
        self._text += text
        return text

    def _is_open(self, kind: str) -> bool:
        return self._open is not None and self._open["type"] == kind

    def _start(self, item: dict[str, Any], prefix: str, part_type: str) -> Iterator[dict[str, Any]]:
        yield from self.stop()
        number = len(self.items)
        self._open = {"id": f"{prefix}_{self._id}_{number}", "status": "in_progress", **item}
        self._part_type, self._text, self._logprobs = part_type, "", []
        yield {"type": "response.output_item.added", "output_index": number, "item": self._open}
        if part_type:
            yield self._part_event("added", part=self._part())

    def _part(self) -> dict[str, Any]:
        """The one part of the open item, as far as it has come."""
        part: dict[str, Any] = {"type": self._part_type, "text": self._text}
        return part | {"annotations": [], "logprobs": self._logprobs} if self._is_open("message") else part

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        assert self._open is not None
        return {"type": f"response.{kind}", "item_id": self._open["id"], "output_index": len(self.items), **fields}

    def _part_event(self, stage: str, **fields: Any) -> dict[str, Any]:
        _, name, index, _ = _PARTS[self._part_type]
        return self._event(f"{name}.{stage}", **{index: 0}, **fields)

    def _text_event(self, stage: str, **fields: Any) -> dict[str, Any]:
        _, _, index, name = _PARTS[self._part_type]
        return self._event(f"{name}.{stage}", **{index: 0}, **fields)

    def stop(self, status: str = "completed") -> Iterator[dict[str, Any]]:
        """Ends the item that is open."""
        if self._open is None:
            return
        done = {**self._open, "status": status}
        if done["type"] == "function_call":
            done["arguments"] = self._text or "{}"
            yield self._event("function_call_arguments.done", arguments=done["arguments"], name=done["name"])
        else:
            part = self._part()
            done[_PARTS[self._part_type][0]] = [part]
            scored = {"logprobs": self._logprobs} if done["type"] == "message" else {}
            yield self._text_event("done", text=self._text, **scored)
            yield self._part_event("done", part=part)
            if done["type"] == "reasoning" and self._call.seal_reasoning:
                done["encrypted_content"] = SEALED + base64.b64encode(self._text.encode()).decode()
        yield {"type": "response.output_item.done", "output_index": len(self.items), "item": done}
        self._open = None
        self.items.append(done)


class Projector:
    """Events as Responses' stream: created, in progress, items that are added, grow and are done, and the whole at the end."""

    def __init__(self, call: Call, model: str, created: int) -> None:
        self._call = call
        self._response = _response(call, model, created)
        self._items = _Items(call)
        self._accounts = Accounts()
        self._reason: FinishReason = "stop"
        self._sequence_number = 0
        self._created = False

    def push(self, event: Event, prompt_index: int = 0) -> list[Frame]:
        self._accounts.push(event)
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, PromptProcessed):
            return self._begin()
        if isinstance(event, Finished):
            self._reason = event.finish_reason
            return self._frames(self._items.stop(_status(event.finish_reason)))
        return self._frames(self._items.push(event))

    def _begin(self) -> list[Frame]:
        """Created and in progress, once."""
        if self._created:
            return []
        self._created = True
        kinds = ("response.created", "response.in_progress")
        return self._frames({"type": kind, "response": self._response} for kind in kinds)

    def keep_alive(self) -> list[Frame]:
        """In progress once more: an event that every client knows and that changes nothing."""
        return self._begin() or self._frames([{"type": "response.in_progress", "response": self._response}])

    def finish(self) -> list[Frame]:
        response = _finished(self._response, self._items.items, self._reason, self._accounts)
        return self._frames([{"type": f"response.{response['status']}", "response": response}])

    def fail(self, error: HelexaError, status: int) -> list[Frame]:
        """The error, and the response that failed of it: clients look for the one or the other."""
        envelope = error_body(error, status)["error"]
        cause = {"code": envelope["code"], "message": envelope["message"]}
        response = {**self._response, "status": "failed", "error": cause, "output": self._items.items}
        return [
            *self._begin(),
            *self._frames(
                [
                    {"type": "error", **cause, "param": envelope["param"]},
                    {"type": "response.failed", "response": response},
                ]
            ),
        ]

    def _frames(self, payloads: Iterator[dict[str, Any]] | Sequence[dict[str, Any]]) -> list[Frame]:
        frames = []
        for payload in payloads:
            frames.append(typed_frame({**payload, "sequence_number": self._sequence_number}))
            self._sequence_number += 1
        return frames


def build_response(call: Call, results: Sequence[GenerationResult], model: str, created: int) -> dict[str, Any]:
    """The whole answer at once: the items that its stream would have made."""
    completion = results[0].completions[0]
    items = _Items(call)
    for delta in deltas(completion):
        for _ in items.push(delta):
            pass
    for _ in items.stop(_status(completion.finish_reason)):
        pass
    accounts = Accounts.of_results(results)
    return _finished(_response(call, model, created), items.items, completion.finish_reason, accounts)


def _response(call: Call, model: str, created: int) -> dict[str, Any]:
    return {
        "id": f"resp_{call.requests[0].request_id}",
        "object": "response",
        "created_at": created,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": model,
        "output": [],
        "usage": None,
        **call.repeated,
    }


def _status(reason: FinishReason) -> str:
    return "incomplete" if reason in ("length", "abort") else "completed"


def _finished(
    response: dict[str, Any], items: list[dict[str, Any]], reason: FinishReason, accounts: Accounts
) -> dict[str, Any]:
    return {
        **response,
        "status": _status(reason),
        "incomplete_details": {"reason": "max_output_tokens"} if reason == "length" else None,
        "output": items,
        "usage": {
            "input_tokens": accounts.prompt_tokens,
            "input_tokens_details": {"cached_tokens": accounts.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": accounts.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": accounts.reasoning_tokens},
            "total_tokens": accounts.prompt_tokens + accounts.completion_tokens,
        },
        "timings": accounts.timings_body(),
    }
