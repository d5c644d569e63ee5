"""``POST /v1/chat/completions``: OpenAI's chat wire format, with the extensions vLLM and llama-server users expect."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from helexa_engine.errors import HelexaError, InvalidRequest
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
    ToolCall,
    ToolCallDelta,
    ToolCallStart,
)
from helexa_engine.generate_request import GenerateRequest
from helexa_engine.text.messages import read_turns

from .frame import Call, Frame, decode, json_frame
from .openai import Accounts, SamplingFields, chat_logprobs, check_logprobs, error_body, thinking_options

__all__ = ["Projector", "build_response", "error_body", "parse_request"]

log = logging.getLogger(__name__)

#: What is read of a message; other fields, of which clients send back many from an answer, are left alone.
MESSAGE_FIELDS = (
    "role",
    "content",
    "reasoning_content",
    "reasoning",
    "reasoning_details",
    "thinking_blocks",
    "tool_calls",
    "function_call",
    "tool_call_id",
    "name",
)


class ChatBody(SamplingFields, kw_only=True):
    """What is read of a chat body; everything else is ignored."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    thinking_budget: int | None = None
    thinking_token_budget: int | None = None
    thinking_budget_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None

    @property
    def budget(self) -> int | None:
        """Under the name that Qwen's API has for it, that vLLM has, or that llama-server has."""
        given = (self.thinking_budget, self.thinking_token_budget, self.thinking_budget_tokens)
        return next((budget for budget in given if budget is not None), None)


def parse_request(body: bytes) -> Call:
    """The body as a call. Unknown fields are ignored. Raises :class:`InvalidRequest` with the path of the bad field."""
    chat = decode(body, ChatBody)
    max_tokens = chat.max_tokens if chat.max_completion_tokens is None else chat.max_completion_tokens
    tools = _tools(chat.tools)
    template_kwargs, thinking_budget = thinking_options(
        chat.reasoning_effort, chat.budget, chat.enable_thinking, chat.chat_template_kwargs
    )
    request = GenerateRequest(
        messages=read_turns(
            [{key: message[key] for key in MESSAGE_FIELDS if key in message} for message in chat.messages]
        ),
        tools=tools,
        tool_choice=_tool_choice(chat.tool_choice, tools),
        parallel_tool_calls=chat.parallel_tool_calls is not False,
        chat_template_kwargs=template_kwargs,
        add_generation_prompt=chat.add_generation_prompt is not False,
        sampling_params=chat.sampling_params(
            max_tokens=max_tokens, logprobs=_logprobs(chat), thinking_budget=thinking_budget
        ),
        priority=chat.priority or 0,
    )
    return Call(
        model=chat.model,
        requests=(request,),
        stream=bool(chat.stream),
        include_usage=chat.include_usage,
        parallel_tool_calls=chat.parallel_tool_calls is not False,
    )


def _tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Function tools, checked; hosted tools, which only their vendor can run, are skipped with one log line."""
    functions = []
    for i, tool in enumerate(tools or ()):
        if tool.get("type", "function") != "function":
            log.warning("skipped tools[%d]: unknown tool type %.80r", i, tool.get("type"))
            continue
        function = tool.get("function")
        if not isinstance(function, dict):
            raise InvalidRequest(f"tools[{i}].function", f"expected an object, got {function!r:.80}")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise InvalidRequest(f"tools[{i}].function.name", f"expected a name, got {function.get('name')!r:.80}")
        if not isinstance(function.get("parameters"), dict | None):
            raise InvalidRequest(f"tools[{i}].function.parameters", "expected a JSON Schema object")
        functions.append({"type": "function", "function": function})
    return functions or None


def _tool_choice(choice: str | dict[str, Any] | None, tools: list[dict[str, Any]] | None) -> str | dict[str, Any]:
    if choice is None:
        return "auto"
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            raise InvalidRequest("tool_choice", f"expected none, auto, required or a function, got {choice!r:.80}")
        if choice == "required" and not tools:
            raise InvalidRequest("tool_choice", "required needs at least one function in tools")
        return choice
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise InvalidRequest("tool_choice", 'expected {"type": "function", "function": {"name": ...}}')
    if name not in [tool["function"]["name"] for tool in tools or ()]:
        raise InvalidRequest("tool_choice.function.name", f"{name!r:.80} is not among tools")
    return {"name": name}


def _logprobs(chat: ChatBody) -> int | None:
    top = check_logprobs("top_logprobs", chat.top_logprobs)
    if chat.logprobs:
        return top or 0
    if top:
        raise InvalidRequest("top_logprobs", "needs logprobs: true")
    return None


class Projector:
    """Events as ``chat.completion.chunk`` frames. All chunks share id, created and model; the role comes with the first token."""

    def __init__(self, call: Call, model: str, created: int) -> None:
        self._call = call
        self._head = _head(call, "chat.completion.chunk", model, created)
        self._wants_logprobs = call.requests[0].sampling_params.logprobs is not None
        self._accounts = Accounts()
        self._role_sent: set[int] = set()
        self._unfinished = call.requests[0].sampling_params.n

    def push(self, event: Event, prompt_index: int = 0) -> list[Frame]:
        self._accounts.push(event)
        if isinstance(event, PromptProcessed):
            return []
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished):
            return [self._last_chunk(event)]
        delta = self._delta(event)
        if not delta and not (self._wants_logprobs and event.logprobs):
            return []  # tokens whose text is still held back, or a call that was not asked for
        return [self._chunk(self._choice(event, delta))]

    def _delta(self, event: Delta) -> dict[str, Any]:
        if isinstance(event, ContentDelta):
            return {"content": event.text} if event.text else {}
        if isinstance(event, ReasoningDelta):
            return {"reasoning_content": event.text} if event.text else {}
        return {"tool_calls": [_tool_call_fragment(event)]} if self._call.keeps(event) else {}

    def _last_chunk(self, event: Finished) -> Frame:
        self._unfinished -= 1
        delta: dict[str, Any] = {} if event.index in self._role_sent else {"content": ""}
        choice = self._choice(event, delta)
        choice["finish_reason"] = event.finish_reason
        choice["stop_reason"] = event.stop_reason
        if self._unfinished or self._call.include_usage:
            return self._chunk(choice)
        return json_frame({**self._head, "choices": [choice], "timings": self._accounts.timings_body()})

    def _choice(self, event: Delta | Finished, delta: dict[str, Any]) -> dict[str, Any]:
        if event.index not in self._role_sent:
            self._role_sent.add(event.index)
            delta = {"role": "assistant", **delta}
        choice: dict[str, Any] = {"index": event.index, "delta": delta, "finish_reason": None}
        if self._wants_logprobs:
            choice["logprobs"] = {"content": chat_logprobs(event.logprobs), "refusal": None}
        return choice

    def _chunk(self, choice: dict[str, Any]) -> Frame:
        return json_frame({**self._head, "choices": [choice]})

    def keep_alive(self) -> list[Frame]:
        return [self._chunk({"index": 0, "delta": {}, "finish_reason": None})]

    def fail(self, error: HelexaError, status: int) -> list[Frame]:
        return [json_frame(error_body(error, status))]

    def finish(self) -> list[Frame]:
        done = Frame(b"[DONE]")
        if not self._call.include_usage:
            return [done]
        accounts = {"usage": self._accounts.usage_body(), "timings": self._accounts.timings_body()}
        return [json_frame({**self._head, "choices": [], **accounts}), done]


def _tool_call_fragment(event: ToolCallStart | ToolCallDelta) -> dict[str, Any]:
    if isinstance(event, ToolCallDelta):
        return {"index": event.call_index, "function": {"arguments": event.arguments}}
    return {
        "index": event.call_index,
        "id": event.id,
        "type": "function",
        "function": {"name": event.name, "arguments": ""},
    }


def build_response(call: Call, results: Sequence[GenerationResult], model: str, created: int) -> dict[str, Any]:
    """The whole answer at once; its parts equal the joined parts of the stream."""
    accounts = Accounts.of_results(results)
    return {
        **_head(call, "chat.completion", model, created),
        "choices": [_whole_choice(call, completion) for completion in results[0].completions],
        "usage": accounts.usage_body(),
        "timings": accounts.timings_body(),
    }


def _whole_choice(call: Call, completion: Completion) -> dict[str, Any]:
    calls = completion.tool_calls if call.parallel_tool_calls else completion.tool_calls[:1]
    message: dict[str, Any] = {"role": "assistant", "content": completion.text, "refusal": None}
    if completion.reasoning:
        message["reasoning_content"] = completion.reasoning
    if calls:
        message["content"] = completion.text or None
        message["tool_calls"] = [_whole_tool_call(tool_call) for tool_call in calls]
    logprobs = None
    if completion.logprobs is not None:
        logprobs = {"content": chat_logprobs(completion.logprobs), "refusal": None}
    return {
        "index": completion.index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }


def _whole_tool_call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _head(call: Call, kind: str, model: str, created: int) -> dict[str, Any]:
    return {"id": f"chatcmpl-{call.requests[0].request_id}", "object": kind, "created": created, "model": model}
