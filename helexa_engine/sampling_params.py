"""How the next token is chosen and when to stop: :class:`SamplingParams`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .errors import InvalidRequest

MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 4096
MAX_LOGPROBS = 64
MAX_N = 128

#: What an unset field means once neither the call nor the model's generation_config has said anything.
NEUTRAL: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """A constraint on the generated text. Exactly one of the first four fields is set.

    Attributes:
        json_schema: a JSON Schema as a dict, or as JSON text.
        json_object: any JSON object.
        regex: a regular expression in llguidance's (Rust) syntax.
        grammar: a Lark grammar in llguidance's dialect, or one in llama.cpp's GBNF.
        path: where the constraint stood in the request, for an error that it cannot be enforced; by default the field's name here.
    """

    json_schema: Mapping[str, Any] | str | None = None
    json_object: bool = False
    regex: str | None = None
    grammar: str | None = None
    path: str = field(default="structured", compare=False)

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if f.name != "path" and getattr(self, f.name) not in (None, False)]
        if len(given) != 1:
            raise InvalidRequest(
                "structured", f"expected exactly one of json_schema, json_object, regex, grammar; got {given}"
            )

    @classmethod
    def of_response_format(cls, response_format: Mapping[str, Any] | None) -> StructuredOutput | None:
        """OpenAI's ``response_format``, with llama-server's ``schema`` beside ``json_object``; ``text`` is no constraint.

        Raises:
            InvalidRequest: naming the place below ``response_format``.
        """
        if response_format is None:
            return None
        kind = response_format.get("type")
        if kind == "text":
            return None
        if kind == "json_object":
            if response_format.get("schema") is None:
                return cls(json_object=True, path="response_format")
            schema, path = response_format["schema"], "response_format.schema"
        elif kind == "json_schema":
            # OpenAI nests the schema under a name; llama-server also takes it directly.
            wrapper = response_format.get("json_schema")
            if wrapper is None:
                schema, path = response_format.get("schema"), "response_format.json_schema"
            elif isinstance(wrapper, Mapping):
                schema, path = wrapper.get("schema"), "response_format.json_schema.schema"
            else:
                schema, path = wrapper, "response_format.json_schema"
        else:
            raise InvalidRequest("response_format.type", f"expected text, json_object or json_schema, got {kind!r:.80}")
        if not isinstance(schema, Mapping):
            raise InvalidRequest(path, f"expected a JSON Schema object, got {schema!r:.80}")
        return cls(json_schema=schema, path=path)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling settings of one request. Immutable; a bad value raises :class:`InvalidRequest` that names the field.

    A field that is None is unset: it takes the model's ``generation_config`` and then the neutral value (no filter, no
    penalty, temperature 1). Greedy decoding is ``temperature=0`` and applies exactly the penalties that were asked for.

    Attributes:
        max_tokens: most tokens to generate, >= 1; None means the rest of the context.
        temperature: >= 0; 0 is greedy.
        top_p: in (0, 1]; keep the smallest set of tokens whose probability reaches it.
        top_k: >= 0; keep the k likeliest tokens; 0 (or -1) keeps all.
        min_p: in [0, 1]; drop tokens less likely than ``min_p`` times the likeliest.
        presence_penalty, frequency_penalty: in [-2, 2]; subtracted from logits of tokens already *generated* (once, per count).
        repetition_penalty: > 0; logits of tokens in prompt or output are divided (positive) or multiplied (negative) by it.
        seed: same seed, same request, same weights: same tokens, whatever runs beside it. None draws one.
        stop: strings that end the answer; they are not part of it.
        stop_token_ids: token ids that end the answer; they are not part of the text.
        ignore_eos: keep going past end-of-turn tokens.
        min_tokens: end-of-turn and stop token ids are not sampled before this many tokens.
        logit_bias: token id -> value in [-100, 100] added to its logit.
        logprobs: report the log probability of each generated token and of the ``logprobs`` likeliest (0..64); None: none.
        prompt_logprobs: the same for prompt tokens.
        n: number of independent answers, 1..128; answer i draws from its own stream of the seed.
        structured: grammar the answer must follow (after any reasoning).
        thinking_budget: most tokens inside a think block, >= 0; the block is then closed for the model, which goes on with its
            answer. None: no limit. Changes nothing where there is no thinking.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    structured: StructuredOutput | None = None
    thinking_budget: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        elif self.stop is None:
            object.__setattr__(self, "stop", ())
        elif not isinstance(self.stop, tuple):
            object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        self._check_int("max_tokens", 1, None)
        self._check_float("temperature", 0.0, None)
        self._check_float("top_p", 0.0, 1.0, above=True)
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        self._check_int("top_k", 0, None)
        self._check_float("min_p", 0.0, 1.0)
        self._check_float("presence_penalty", -2.0, 2.0)
        self._check_float("frequency_penalty", -2.0, 2.0)
        self._check_float("repetition_penalty", 0.0, None, above=True)
        self._check_int("seed", -(2**63), 2**64 - 1)
        self._check_int("min_tokens", 0, None)
        self._check_int("logprobs", 0, MAX_LOGPROBS)
        self._check_int("prompt_logprobs", 0, MAX_LOGPROBS)
        self._check_int("n", 1, MAX_N)
        self._check_int("thinking_budget", 0, None)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest("stop", f"expected at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}")
        for i, stop in enumerate(self.stop):
            if not isinstance(stop, str) or not stop or len(stop) > MAX_STOP_LENGTH:
                raise InvalidRequest(
                    f"stop[{i}]", f"expected a string of 1 to {MAX_STOP_LENGTH} characters, got {stop!r:.80}"
                )
        for i, token_id in enumerate(self.stop_token_ids):
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                raise InvalidRequest(f"stop_token_ids[{i}]", f"expected a token id >= 0, got {token_id!r:.80}")
        if self.logit_bias is not None:
            bias: dict[int, float] = {}
            for key, value in self.logit_bias.items():
                try:
                    token_id, number = int(key), float(value)
                except (TypeError, ValueError):
                    raise InvalidRequest(
                        f"logit_bias[{key!r:.40}]", f"expected token id -> number, got {value!r:.80}"
                    ) from None
                if token_id < 0 or not -100.0 <= number <= 100.0:
                    raise InvalidRequest(
                        f"logit_bias[{token_id}]", f"expected an id >= 0 and a value in [-100, 100], got {number}"
                    )
                bias[token_id] = number
            object.__setattr__(self, "logit_bias", bias)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                "min_tokens", f"expected at most max_tokens ({self.max_tokens}), got {self.min_tokens}"
            )

    def _check_int(self, name: str, low: int, high: int | None) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            bound = f">= {low}" if high is None else f"in [{low}, {high}]"
            raise InvalidRequest(name, f"expected an integer {bound}, got {value!r:.80}")

    def _check_float(self, name: str, low: float, high: float | None, *, above: bool = False) -> None:
        value = getattr(self, name)
        if value is None:
            return
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        ok = ok and (value > low if above else value >= low) and (high is None or value <= high)
        if not ok:
            left = f"> {low:g}" if above else f">= {low:g}"
            bound = left if high is None else f"{left} and <= {high:g}"
            raise InvalidRequest(name, f"expected a finite number {bound}, got {value!r:.80}")
        object.__setattr__(self, name, float(value))

    def with_defaults(self, generation_config: Mapping[str, Any]) -> SamplingParams:
        """Unset fields filled from ``generation_config`` (HuggingFace names; ``do_sample: false`` is temperature 0), then neutral."""
        config = dict(generation_config)
        if config.get("do_sample") is False:
            config["temperature"] = 0.0
        filled = {}
        for name, neutral in NEUTRAL.items():
            if getattr(self, name) is None:
                value = config.get(name)
                filled[name] = neutral if value is None else value
        return replace(self, **filled)
