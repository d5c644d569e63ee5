"""``POST /v1/completions``: OpenAI's text completion wire format. The prompt goes to the model as it is, without a template."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from helexa_engine.errors import HelexaError, InvalidRequest
from helexa_engine.events import (
    ContentDelta,
    Event,
    Failed,
    Finished,
    GenerationResult,
    PromptProcessed,
    ReasoningDelta,
    TokenLogprob,
)
from helexa_engine.generate_request import GenerateRequest

from .frame import Call, Frame, decode, json_frame
from .openai import Accounts, SamplingFields, check_logprobs, error_body, finite

__all__ = ["Projector", "build_response", "error_body", "parse_request"]

MAX_PROMPTS = 256


class CompletionBody(SamplingFields, kw_only=True):
    """What is read of a completions body; everything else is ignored."""

    prompt: str | list[str | int | list[int]]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None


def parse_request(body: bytes) -> Call:
    """The body as a call, one request a prompt. Raises :class:`InvalidRequest` with the path of the bad field."""
    completion = decode(body, CompletionBody)
    if completion.best_of is not None and completion.best_of != (1 if completion.n is None else completion.n):
        raise InvalidRequest("best_of", f"expected n or nothing, got {completion.best_of}; ask for n answers instead")
    logprobs = check_logprobs("logprobs", completion.logprobs)
    params = completion.sampling_params(
        max_tokens=completion.max_tokens,
        logprobs=logprobs,
        prompt_logprobs=logprobs if completion.echo else None,
    )
    return Call(
        model=completion.model,
        requests=tuple(
            GenerateRequest(
                prompt=prompt,
                echo=bool(completion.echo),
                suffix=completion.suffix or None,
                sampling_params=params,
                priority=completion.priority or 0,
            )
            for prompt in _prompts(completion.prompt)
        ),
        stream=bool(completion.stream),
        include_usage=completion.include_usage,
    )


def _prompts(prompt: Any) -> list[str | list[int]]:
    """Text, a list of texts, token ids, or a list of lists of them."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequest("prompt", "expected text, token ids or a list of either; got an empty list")
    if isinstance(prompt[0], int):
        prompt = [prompt]
    kind = type(prompt[0])
    for i, item in enumerate(prompt):
        if not isinstance(item, kind) or not all(isinstance(token_id, int) for token_id in item if kind is list):
            raise InvalidRequest(f"prompt[{i}]", f"expected {'token ids' if kind is list else 'text'} throughout")
    if len(prompt) > MAX_PROMPTS:
        raise InvalidRequest("prompt", f"expected at most {MAX_PROMPTS} prompts, got {len(prompt)}")
    return list(prompt)


class Projector:
    """Events as ``text_completion`` chunks. Answer ``i`` of prompt ``p`` is choice ``p * n + i``."""

    def __init__(self, call: Call, model: str, created: int) -> None:
        params = call.requests[0].sampling_params
        self._call = call
        self._head = _head(call, model, created)
        self._n = params.n
        self._unfinished = len(call.requests) * params.n
        self._accounts = Accounts()
        self._logprobs = [_LegacyLogprobs() for _ in range(self._unfinished)] if params.logprobs is not None else None

    def push(self, event: Event, prompt_index: int = 0) -> list[Frame]:
        self._accounts.push(event)
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, PromptProcessed):
            if event.prompt_text is None:
                return []
            first = prompt_index * self._n
            tokens = event.prompt_logprobs or ()
            return [self._chunk(self._choice(first + i, event.prompt_text, tokens)) for i in range(self._n)]
        text = event.text if isinstance(event, ContentDelta | ReasoningDelta) else ""
        choice = self._choice(prompt_index * self._n + event.index, text, event.logprobs)
        if not isinstance(event, Finished):
            return [self._chunk(choice)] if text or (self._logprobs is not None and event.logprobs) else []
        self._unfinished -= 1
        choice["finish_reason"] = event.finish_reason
        choice["stop_reason"] = event.stop_reason
        if self._unfinished or self._call.include_usage:
            return [self._chunk(choice)]
        return [json_frame({**self._head, "choices": [choice], "timings": self._accounts.timings_body()})]

    def _choice(self, index: int, text: str, tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
        logprobs = None if self._logprobs is None else self._logprobs[index].push(tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def _chunk(self, choice: dict[str, Any]) -> Frame:
        return json_frame({**self._head, "choices": [choice]})

    def keep_alive(self) -> list[Frame]:
        return [self._chunk({"index": 0, "text": "", "logprobs": None, "finish_reason": None})]

    def fail(self, error: HelexaError, status: int) -> list[Frame]:
        return [json_frame(error_body(error, status))]

    def finish(self) -> list[Frame]:
        done = Frame(b"[DONE]")
        if not self._call.include_usage:
            return [done]
        accounts = {"usage": self._accounts.usage_body(), "timings": self._accounts.timings_body()}
        return [json_frame({**self._head, "choices": [], **accounts}), done]


class _LegacyLogprobs:
    """The four parallel lists of this wire format. Offsets count characters of the text, which whole bytes make up."""

    def __init__(self) -> None:
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
        lists: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for item in tokens:
            lists["tokens"].append(item.token)
            lists["token_logprobs"].append(None if item.logprob is None else finite(item.logprob))
            top = {other.token: finite(other.logprob) for other in item.top if other.logprob is not None}
            lists["top_logprobs"].append(top or None)
            lists["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(item.token_bytes))
        return lists


def build_response(call: Call, results: Sequence[GenerationResult], model: str, created: int) -> dict[str, Any]:
    """The whole answer at once; its parts equal the joined parts of the stream."""
    accounts = Accounts.of_results(results)
    choices: list[dict[str, Any]] = []
    for result in results:
        for completion in result.completions:
            logprobs = None
            if completion.logprobs is not None:
                logprobs = _LegacyLogprobs().push([*(result.prompt_logprobs or ()), *completion.logprobs])
            choices.append(
                {
                    "index": len(choices),
                    "text": (result.prompt_text or "") + completion.reasoning + completion.text,
                    "logprobs": logprobs,
                    "finish_reason": completion.finish_reason,
                    "stop_reason": completion.stop_reason,
                }
            )
    return {
        **_head(call, model, created),
        "choices": choices,
        "usage": accounts.usage_body(),
        "timings": accounts.timings_body(),
    }


def _head(call: Call, model: str, created: int) -> dict[str, Any]:
    return {
        "id": f"cmpl-{call.requests[0].request_id}",
        "object": "text_completion",
        "created": created,
        "model": model,
    }
