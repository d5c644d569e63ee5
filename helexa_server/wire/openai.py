"""What the OpenAI wire formats share: sampling fields, usage, timings, log probabilities and the error envelope."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from helexa_engine.errors import HelexaError, InvalidRequest
from helexa_engine.events import Event, Finished, GenerationResult, PromptProcessed, Timings, TokenLogprob
from helexa_engine.sampling_params import MAX_LOGPROBS, SamplingParams, StructuredOutput

#: JSON has no minus infinity; clients expect a number. The value is OpenAI's.
LEAST_LOGPROB = -9999.0


class StreamOptions(msgspec.Struct):
    """Whether a stream ends with a chunk of usage."""

    include_usage: bool | None = None


class StructuredOutputs(msgspec.Struct):
    """vLLM's ``structured_outputs``."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class SamplingFields(msgspec.Struct, kw_only=True):
    """Body fields that chat and completions have in common; the rest of the body is ignored."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    n: int | None = None
    priority: int | None = None
    response_format: dict[str, Any] | None = None
    json_schema: dict[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def sampling_params(
        self,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        thinking_budget: int | None = None,
    ) -> SamplingParams:
        """Checked sampling settings. ``max_tokens`` -1 is llama-server's "no limit". Raises :class:`InvalidRequest`."""
        return SamplingParams(
            max_tokens=None if max_tokens == -1 else max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
            logit_bias=self.logit_bias,  # type: ignore[arg-type]  # JSON keys are text; SamplingParams converts and checks
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            n=1 if self.n is None else self.n,
            structured=self.structured_output(),
            thinking_budget=thinking_budget,
        )

    def structured_output(self) -> StructuredOutput | None:
        """The one constraint that was asked for, if any: ``response_format``, llama-server's ``json_schema`` and ``grammar``,
        ``regex``, or vLLM's ``structured_outputs`` in its new and old spelling."""
        outputs = self.structured_outputs or StructuredOutputs()
        schemas = {
            "json_schema": self.json_schema,
            "guided_json": self.guided_json,
            "structured_outputs.json": outputs.json,
        }
        regexes = {
            "regex": self.regex,
            "guided_regex": self.guided_regex,
            "structured_outputs.regex": outputs.regex,
        }
        grammars = {
            "grammar": self.grammar,
            "guided_grammar": self.guided_grammar,
            "structured_outputs.grammar": outputs.grammar,
        }
        choices = {"guided_choice": self.guided_choice, "structured_outputs.choice": outputs.choice}
        constraints: dict[str, StructuredOutput | None] = {
            "response_format": StructuredOutput.of_response_format(self.response_format)
        }
        for path, schema in schemas.items():
            constraints[path] = None if schema is None else StructuredOutput(json_schema=schema, path=path)
        for path, regex in regexes.items():
            constraints[path] = None if regex is None else StructuredOutput(regex=regex, path=path)
        for path, grammar in grammars.items():
            constraints[path] = None if grammar is None else StructuredOutput(grammar=grammar, path=path)
        for path, words in choices.items():
            constraints[path] = None if words is None else _one_of(words, path)
        if outputs.json_object:
            path = "structured_outputs.json_object"
            constraints[path] = StructuredOutput(json_object=True, path=path)
        given = [name for name, constraint in constraints.items() if constraint is not None]
        if len(given) > 1:
            raise InvalidRequest(given[1], f"expected at most one constraint, got {' and '.join(given)}")
        return constraints[given[0]] if given else None

    @property
    def include_usage(self) -> bool:
        """Whether the client asked for a last chunk with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


def _one_of(words: Sequence[str], path: str) -> StructuredOutput:
    """One of ``words`` and nothing else."""
    if not words or not all(words):
        raise InvalidRequest(path, f"expected words to choose from, got {list(words)!r:.80}")
    return StructuredOutput(grammar="start: " + " | ".join(map(json.dumps, words)), path=path)


#: Most tokens of thinking for an effort; None is no limit. ``none`` turns thinking off.
EFFORTS: dict[str, int | None] = {
    "none": 0,
    "minimal": 512,
    "low": 2048,
    "medium": None,
    "high": None,
    "xhigh": None,
    "max": None,
}


def thinking_options(
    effort: str | None,
    budget: int | None = None,
    enabled: bool | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], int | None]:
    """Template variables and the budget of thinking tokens that the ways to ask for thinking come to.

    An effort is Qwen's ``enable_thinking`` (``none`` turns it off, every other on), a budget, and is shown to templates that have
    a variable of that name. What is said more plainly wins: a budget (-1 is none, as in llama-server) over the effort's,
    ``template_kwargs`` over all. Raises :class:`InvalidRequest`.
    """
    kwargs: dict[str, Any] = {}
    if effort is not None:
        if effort not in EFFORTS:
            raise InvalidRequest("reasoning_effort", f"expected one of {', '.join(EFFORTS)}; got {effort!r:.80}")
        kwargs = {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    if enabled is not None:
        kwargs["enable_thinking"] = enabled
    kwargs |= template_kwargs or {}
    if budget is None and effort not in (None, "none") and kwargs["enable_thinking"]:
        budget = EFFORTS[str(effort)]
    return kwargs, None if budget == -1 else budget


def check_logprobs(path: str, value: int | None) -> int | None:
    """A number of alternatives, in the range the engine offers, under the name this wire format has for it."""
    if value is not None and not 0 <= value <= MAX_LOGPROBS:
        raise InvalidRequest(path, f"expected an integer in [0, {MAX_LOGPROBS}], got {value}")
    return value


@dataclass(slots=True)
class Accounts:
    """Usage and timings of a call, counted from its events: each prompt once, the tokens of all answers."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    timings: list[Timings] = field(default_factory=list)
    rated_tokens: int = 0

    def push(self, event: Event) -> None:
        """Takes in an event of any of the answers."""
        if isinstance(event, PromptProcessed):
            self.prompt_tokens += len(event.prompt_token_ids)
            self.cached_tokens += event.cached_tokens
        elif isinstance(event, Finished):
            self._add(event.usage.completion_tokens, event.usage.reasoning_tokens, event.timings)

    @classmethod
    def of_results(cls, results: Sequence[GenerationResult]) -> Accounts:
        """Of answers that are complete."""
        accounts = cls()
        for result in results:
            accounts.prompt_tokens += len(result.prompt_token_ids)
            accounts.cached_tokens += result.cached_tokens
            for completion in result.completions:
                usage = completion.usage
                accounts._add(usage.completion_tokens, usage.reasoning_tokens, completion.timings)
        return accounts

    def _add(self, completion_tokens: int, reasoning_tokens: int, timings: Timings) -> None:
        self.completion_tokens += completion_tokens
        self.reasoning_tokens += reasoning_tokens
        self.rated_tokens += max(completion_tokens - 1, 0)  # the first token belongs to the prefill
        self.timings.append(timings)

    def usage_body(self) -> dict[str, Any]:
        """OpenAI's ``usage`` of what was taken in."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }

    def timings_body(self) -> dict[str, Any]:
        """llama-server's names: counts, milliseconds and tokens per second of prompt and answer. Answers run side by side."""
        prefill = max((t.prefill_seconds for t in self.timings), default=0.0)
        decode = max((t.decode_seconds for t in self.timings), default=0.0)
        queue = max((t.queue_seconds for t in self.timings), default=0.0)
        computed = self.prompt_tokens - self.cached_tokens
        return {
            "queue_ms": round(queue * 1e3, 3),
            "cache_n": self.cached_tokens,
            "prompt_n": computed,
            "prompt_ms": round(prefill * 1e3, 3),
            "prompt_per_second": round(computed / prefill, 3) if prefill > 0 else 0.0,
            "predicted_n": self.completion_tokens,
            "predicted_ms": round(decode * 1e3, 3),
            "predicted_per_second": round(self.rated_tokens / decode, 3) if decode > 0 else 0.0,
        }


def finite(logprob: float) -> float:
    """``value``, or None where JSON has no word for it."""
    return max(logprob, LEAST_LOGPROB)


def chat_logprobs(logprobs: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """Chat's form: one object a token, with its bytes and the likeliest alternatives."""
    return [{**_token(item), "top_logprobs": [_token(alternative) for alternative in item.top]} for item in logprobs]


def _token(item: TokenLogprob) -> dict[str, Any]:
    return {
        "token": item.token,
        "logprob": None if item.logprob is None else finite(item.logprob),
        "bytes": list(item.token_bytes),
    }


_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(error: HelexaError, status: int) -> dict[str, Any]:
    """``{"error": {message, type, code, param, ...facts}}``."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    own = {
        "message": error.message,
        "type": kind,
        "code": error.code,
        "param": error.path if isinstance(error, InvalidRequest) else None,
    }
    return {"error": {**error.facts, **own}}
