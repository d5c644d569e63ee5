"""The text side of one request: :class:`RequestProcessor` makes a question into token ids, :class:`OutputProcessor` makes
token ids into events. Offline and served generation go through these two and nothing else.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..errors import InvalidRequest, TemplateRenderFailed
from ..events import (
    ContentDelta,
    Event,
    Finished,
    FinishReason,
    ReasoningDelta,
    Timings,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
    Usage,
)
from ..generate_request import GenerateRequest
from ..sampling_params import SamplingParams
from .chat_template import ChatTemplate
from .detokenizer import Detokenizer
from .output_parser import (
    CLOSE_THINK,
    OPEN_THINK,
    CallArguments,
    CallStart,
    Content,
    OutputParser,
    Piece,
    Reasoning,
)
from .stop_checker import StopChecker
from .structured import Constraint, FreeCalls, Rules, call_rules, format_rules
from .thinking import Thinking
from .tokenizer import Tokenizer
from .tool_calls import OPEN_CALL

#: Around what stands before and after a hole, in this order: Qwen's tokens for filling in the middle.
FILL_IN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")

#: What a model writes behind a middle where it has learned from whole files.
ENDS_OF_FILE = ("<|fim_pad|>", "<|file_sep|>", "<|repo_name|>")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request in the engine's terms.

    Attributes:
        prompt_token_ids: the rendered and encoded prompt.
        params: with the model's defaults filled in.
        eos_token_ids: end-of-turn tokens of the model.
        constraint: what holds its answers, the end of their thinking included; None when nothing does.
        make_output: gives answer ``index`` its own :class:`OutputProcessor`.
        prompt_text: the prompt's text, when the request asked for ``echo``.
        last_message_start: where in the prompt of a conversation the last message begins, as far as the template shows it.
    """

    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    eos_token_ids: frozenset[int]
    constraint: Constraint | None
    make_output: Callable[[int], OutputProcessor]
    prompt_text: str | None = None
    last_message_start: int | None = None


class RequestProcessor:
    """Tokenizer, chat template and sampling defaults of one model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None = None,
        generation_config: Mapping[str, Any] | None = None,
    ) -> None:
        """``generation_config`` has HuggingFace's names."""
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.generation_config = dict(generation_config or {})
        if chat_template is not None:
            log.info("chat template: %s", chat_template.capabilities)
        self._message_opening = None if chat_template is None else _message_opening(chat_template, tokenizer)

    def capabilities(self) -> dict[str, bool]:
        """What may be asked of the model."""
        seen = None if self.chat_template is None else self.chat_template.capabilities
        return {
            "completion": True,
            "fill_in_the_middle": all(self.tokenizer.token_id(name) is not None for name in FILL_IN),
            "structured_output": True,
            "vision": False,
            "embeddings": False,
            "chat": seen is not None,
            "tools": seen is not None and seen.tools,
            "parallel_tool_calls": seen is not None and seen.parallel_tool_calls,
            "thinking": seen is not None and seen.thinking,
        }

    def prepare(self, request: GenerateRequest) -> PreparedRequest:
        """Raises :class:`InvalidRequest` and :class:`TemplateRenderFailed`; the length of the prompt is the engine's to judge."""
        chat = request.messages is not None
        shown = self._tools(request) if chat else None
        tools = None if request.tool_choice == "none" else shown
        prompt_text = None
        if chat:
            prompt_token_ids = self.encode_chat(request)
        elif isinstance(request.prompt, str):
            encode = self._encode_prompt if request.suffix is None else partial(self._encode_around, request.suffix)
            prompt_token_ids, prompt_text = encode(request.prompt), request.prompt
        else:
            prompt_token_ids = list(request.prompt or ())
            self._check_ids(prompt_token_ids)
        if not prompt_token_ids:
            raise InvalidRequest("prompt", "expected at least one token, got an empty prompt")
        if request.echo and prompt_text is None:
            prompt_text = self.tokenizer.decode(prompt_token_ids)
        thinking = self.thinking(prompt_token_ids) if chat else "no"
        params = request.sampling_params.with_defaults(self.generation_config)
        if shown and not tools and (opening := self.tokenizer.token_id(OPEN_CALL)) is not None:
            params = replace(params, logit_bias={**(params.logit_bias or {}), opening: -100.0})

        def make_output(index: int) -> OutputProcessor:
            parser = OutputParser(thinking=thinking == "open", parse_thinking=chat, tools=tools)
            return OutputProcessor(index, self.tokenizer, params, parser, len(prompt_token_ids))

        return PreparedRequest(
            prompt_token_ids=tuple(prompt_token_ids),
            params=params,
            eos_token_ids=frozenset(self.tokenizer.eos_token_ids).union(
                self._ends_of_middle() if request.suffix is not None else ()
            ),
            constraint=self._constraint(request, params, tools, thinking),
            make_output=make_output,
            prompt_text=prompt_text if request.echo else None,
            last_message_start=self._last_message_start(prompt_token_ids, request) if chat else None,
        )

    # -- prompt --------------------------------------------------------------------------------------------------------

    def encode_chat(self, request: GenerateRequest) -> list[int]:
        """Token ids of the rendered messages."""
        template = self._template()
        kwargs = dict(request.chat_template_kwargs)
        for name in ("messages", "tools", "add_generation_prompt"):
            if name in kwargs:
                raise InvalidRequest(f"chat_template_kwargs.{name}", "is set by the request itself")
        assert request.messages is not None
        return template.encode(
            self.tokenizer,
            request.messages,
            tools=self._tools(request),
            add_generation_prompt=request.add_generation_prompt,
            **kwargs,
        )

    def _last_message_start(self, prompt_token_ids: Sequence[int], request: GenerateRequest) -> int | None:
        """Position of the token that opens the last message; the opening of the answer itself is no message."""
        if self._message_opening is None:
            return None
        openings_to_find = 2 if request.add_generation_prompt else 1
        for position in range(len(prompt_token_ids) - 1, -1, -1):
            if prompt_token_ids[position] == self._message_opening:
                openings_to_find -= 1
                if not openings_to_find:
                    return position
        return None

    def render_chat(self, request: GenerateRequest) -> str:
        """The rendered messages as text (for people to look at; :meth:`encode_chat` is what the model gets)."""
        return self.tokenizer.decode(self.encode_chat(request))

    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise InvalidRequest(
                "messages", "this model has no chat template, so it cannot chat; send a prompt to completions instead"
            )
        return self.chat_template

    def _tools(self, request: GenerateRequest) -> list[Mapping[str, Any]] | None:
        """Tools to show; checks them and ``tool_choice``.

        With ``none`` they are shown all the same, so that the prompt keeps the prefix of the turns before, and calls are kept from
        the model by their opening tag.
        """
        choice = request.tool_choice
        tools = list(request.tools or ())
        names = []
        for i, tool in enumerate(tools):
            function = tool.get("function") if isinstance(tool, Mapping) else None
            name = function.get("name") if isinstance(function, Mapping) else None
            if not isinstance(name, str) or not name:
                raise InvalidRequest(f"tools[{i}].function.name", f"expected a function's name, got {name!r:.80}")
            names.append(name)
        if isinstance(choice, Mapping):
            named = choice.get("name") or (choice.get("function") or {}).get("name")
            if named not in names:
                raise InvalidRequest("tool_choice", f"names {named!r}, which is not among the tools {names}")
        elif choice not in ("none", "auto", "required"):
            raise InvalidRequest(
                "tool_choice", f"expected none, auto, required or a function's name, got {choice!r:.80}"
            )
        elif choice == "required" and not tools:
            raise InvalidRequest("tool_choice", "is 'required', but there are no tools")
        if not tools:
            return None
        if not self._template().capabilities.tools:
            if choice == "none":
                return None
            raise InvalidRequest("tools", "this model's chat template has no place for tools")
        return tools

    def _encode_prompt(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        if self.tokenizer.add_bos and self.tokenizer.bos_token_id is not None:
            ids.insert(0, self.tokenizer.bos_token_id)
        return ids

    def _encode_around(self, suffix: str, prefix: str) -> list[int]:
        """The prompt in answer to which the model writes what stands between the two. Source: Qwen2.5-Coder's report."""
        prefix_id, suffix_id, middle_id = (self.tokenizer.token_id(name) for name in FILL_IN)
        if prefix_id is None or suffix_id is None or middle_id is None:
            raise InvalidRequest(
                "suffix",
                f"this model does not fill in the middle: its vocabulary lacks {', '.join(FILL_IN)}; leave it out",
            )
        encode = self.tokenizer.encode
        return [prefix_id, *encode(prefix), suffix_id, *encode(suffix), middle_id]

    def _ends_of_middle(self) -> list[int]:
        """What ends the middle beside the end of a turn."""
        ids = (self.tokenizer.token_id(name) for name in (*FILL_IN, *ENDS_OF_FILE))
        return [token_id for token_id in ids if token_id is not None]

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        for i, token_id in enumerate(token_ids):
            if token_id >= self.tokenizer.vocab_size:
                raise InvalidRequest(
                    f"prompt[{i}]", f"expected a token id below {self.tokenizer.vocab_size}, got {token_id}"
                )

    def thinking(self, prompt_token_ids: Sequence[int]) -> Thinking:
        """Whether the prompt ends inside a think block, or leaves it to the model to open one.

        Judged by ids, from the end to the start of the last message: text that only spells ``<think>`` does not count.
        """
        tokenizer = self.tokenizer
        opening, closing = tokenizer.token_id(OPEN_THINK), tokenizer.token_id(CLOSE_THINK)
        for token_id in reversed(prompt_token_ids):
            if token_id in (opening, closing):
                return "open" if token_id == opening else "no"
            if tokenizer.is_special(token_id):
                break
        thinks = self.chat_template is not None and self.chat_template.capabilities.thinking
        return "may_open" if thinks else "no"

    # -- answer --------------------------------------------------------------------------------------------------------

    def _constraint(
        self,
        request: GenerateRequest,
        params: SamplingParams,
        tools: Sequence[Mapping[str, Any]] | None,
        thinking: Thinking,
    ) -> Constraint | None:
        rules, calls = self._rules(request, params, tools), None
        if rules is None and tools and self.tokenizer.token_id(OPEN_CALL) is not None:
            calls = FreeCalls(json.dumps(tools), self._tool_syntax())
        if rules is None and calls is None and (thinking == "no" or self.tokenizer.token_id(CLOSE_THINK) is None):
            return None
        return Constraint(rules, thinking, params.thinking_budget, calls)

    def _tool_syntax(self) -> str:
        return self._template().capabilities.tool_syntax or "json"

    def _rules(
        self, request: GenerateRequest, params: SamplingParams, tools: Sequence[Mapping[str, Any]] | None
    ) -> Rules | None:
        """What the answer must look like after any thinking."""
        choice, spec = request.tool_choice, params.structured
        if not tools:
            return None if spec is None else format_rules(spec)
        several, answer = request.parallel_tool_calls, None
        if choice == "auto":
            if spec is None:
                return None
            if spec.json_schema is None and not spec.json_object:  # cannot stand beside calls in one grammar
                return format_rules(spec)
            answer = spec
        # A forced call leaves no text for a format to hold.
        if isinstance(choice, Mapping):
            named = choice.get("name") or choice["function"]["name"]
            tools, several = [tool for tool in tools if tool["function"]["name"] == named], False
        return call_rules(self.tokenizer, tools, syntax=self._tool_syntax(), several=several, answer=answer)

    def token_logprob(
        self, token_id: int, logprob: float | None, top: Sequence[tuple[int, float]] = ()
    ) -> TokenLogprob:
        """With the token's text and bytes, from the engine's bare ids."""
        data = self.tokenizer.token_bytes(token_id)
        alternatives = tuple(self.token_logprob(other, value) for other, value in top)
        return TokenLogprob(token_id, data.decode("utf-8", "replace"), data, logprob, alternatives)


def _message_opening(template: ChatTemplate, tokenizer: Tokenizer) -> int | None:
    """The special token that opens a message (``<|im_start|>``), seen where the template opens the answer; None where it opens it
    without one."""
    user = [{"role": "user", "content": "probe"}]
    try:
        closed, opened = (template.encode(tokenizer, user, add_generation_prompt=opens) for opens in (False, True))
    except TemplateRenderFailed:
        return None
    added = opened[len(closed) :] if opened[: len(closed)] == closed else []
    return next(filter(tokenizer.is_special, added), None)


class OutputProcessor:
    """One answer: detokenizer > stop strings > reasoning and tool calls > events.

    Attributes:
        stop_hit: a stop string was found: the answer is finished, :class:`Finished` has been given, and the engine has
            to be told to end the sequence. Further tokens are ignored.
    """

    def __init__(
        self, index: int, tokenizer: Tokenizer, params: SamplingParams, parser: OutputParser, prompt_tokens: int
    ) -> None:
        self._index = index
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopChecker(params.stop)
        self._parser = parser
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = self._reasoning_tokens = 0
        self._token_ids: list[int] = []  # given out with the next event
        self._logprobs: list[TokenLogprob] = []
        self._finished = False

    @property
    def stop_hit(self) -> bool:
        """Whether a stop string was found."""
        return self._stops.hit is not None

    def push(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprob] = (),
        finish_reason: FinishReason | None = None,
        *,
        stop_token_id: int | None = None,
        cached_tokens: int = 0,
        timings: Timings | None = None,
    ) -> list[Event]:
        """Events of newly sampled tokens.

        Args:
            logprobs: one a token, or none.
            finish_reason: the engine's reason when these are the last tokens. With ``stop`` the last of them is the end
                token, which counts but is no text.
            stop_token_id: the request's own stop token that ended the answer.
            cached_tokens, timings: for the :class:`Finished` event.
        """
        events: list[Event] = []
        for i, token_id in enumerate(token_ids):
            if self._finished:
                return events
            self._completion_tokens += 1
            self._token_ids.append(token_id)
            self._logprobs.extend(logprobs[i : i + 1])
            reasoning = self._parser.in_reasoning
            ends = finish_reason == "stop" and i == len(token_ids) - 1
            text = "" if ends else self._stops.push(self._detokenizer.push(token_id))
            pieces = self._parser.push(text) if text else []
            self._reasoning_tokens += reasoning or self._parser.in_reasoning
            events += self._events(pieces)
            if self.stop_hit:
                events += self._finish("stop", self._stops.hit, cached_tokens, timings)
        if finish_reason is not None and not self._finished:
            events += self._finish(finish_reason, stop_token_id, cached_tokens, timings)
        return events

    def _finish(
        self, reason: FinishReason, stop_reason: str | int | None, cached_tokens: int, timings: Timings | None
    ) -> list[Event]:
        self._finished = True
        if not self.stop_hit:
            rest = self._stops.push(self._detokenizer.flush()) + self._stops.flush()
            pieces = self._parser.push(rest) + self._parser.flush()
        else:
            pieces = self._parser.flush()
        events = self._events(pieces)
        if reason == "stop" and self._parser.calls_started:
            reason = "tool_calls"
        usage = Usage(self._prompt_tokens, self._completion_tokens, cached_tokens, self._reasoning_tokens)
        token_ids, logprobs = self._take_tokens()
        timings = timings or Timings(0.0, 0.0, 0.0)
        return [*events, Finished(self._index, reason, usage, timings, stop_reason, token_ids, logprobs)]

    def _events(self, pieces: Sequence[Piece]) -> list[Event]:
        """Each token goes with the first event after it."""
        events: list[Event] = []
        for piece in pieces:
            tokens = self._take_tokens()
            match piece:
                case Reasoning(text):
                    events.append(ReasoningDelta(self._index, text, *tokens))
                case Content(text):
                    events.append(ContentDelta(self._index, text, *tokens))
                case CallStart(call_index, name):
                    call_id = f"call_{uuid.uuid4().hex[:24]}"
                    events.append(ToolCallStart(self._index, call_index, call_id, name, *tokens))
                case CallArguments(call_index, fragment):
                    events.append(ToolCallDelta(self._index, call_index, fragment, *tokens))
        return events

    def _take_tokens(self) -> tuple[tuple[int, ...], tuple[TokenLogprob, ...]]:
        taken = tuple(self._token_ids), tuple(self._logprobs)
        self._token_ids, self._logprobs = [], []
        return taken
