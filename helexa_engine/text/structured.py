"""Structured output: what may come next under a JSON Schema, regular expression, grammar or tool list.

A request's constraint is first words: :class:`Rules` in a :class:`Constraint`, plain data that may cross to another process. Where
the tokens are sampled it is compiled: the grammars run in ``llguidance``, :class:`GrammarCompiler` holds what is shared by a model,
:class:`GrammarState` is the constraint of one answer.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import HelexaError, InvalidRequest
from ..sampling_params import StructuredOutput
from .output_parser import CLOSE_THINK, OPEN_THINK
from .thinking import Thinking, ThinkingControl
from .tokenizer import Tokenizer
from .tool_calls import CLOSE_CALL, CLOSE_FUNCTION, CLOSE_PARAMETER, OPEN_CALL, OPEN_PARAMETER
from .tool_schema import resolved, types_of

log = logging.getLogger(__name__)

_CACHED_GRAMMARS = 64
_LARGE_VOCABULARY = 32_768  # below, a mask costs less than handing its computation to another thread


#: How JSON is laid out: a space between tokens, or a new line with its indentation. A small model can otherwise fill its whole
#: context with white space.
_JSON: Any = {"whitespace_pattern": r"([ ]|\n[ ]{0,32})?"}
_LENIENT: Any = _JSON | {"lenient": True}


class GrammarFailed(HelexaError):
    """The grammar ran out of its bounds on work or states while an answer was generated."""

    code = "grammar_failed"


@dataclass(frozen=True, slots=True)
class Rules:
    """What an answer must look like, in words.

    Attributes:
        kind: what ``text`` is written in: JSON Schema, llguidance's regular expressions or Lark, llama.cpp's GBNF.
        path: where it stood in the request, for an error that it cannot be enforced.
        part: what stands inside ``text`` and is to be enforced whole; compiled by itself first, for an error that names it.
    """

    kind: Literal["json_schema", "regex", "lark", "gbnf"]
    text: str
    path: str
    part: Rules | None = None


@dataclass(frozen=True, slots=True)
class FreeCalls:
    """The tools that an answer may call of its own accord, as JSON text, and the template's ``syntax`` of calls."""

    tools: str
    syntax: str


@dataclass(frozen=True, slots=True)
class Constraint:
    """All that holds an answer: ``rules`` after its thinking, if any, or else the calls in it; and the end of its thinking."""

    rules: Rules | None
    thinking: Thinking = "no"
    thinking_budget: int | None = None
    calls: FreeCalls | None = None


class GrammarState:
    """The constraint on one answer: masks tokens, then is told which one was sampled.

    It begins after the reasoning: while a think block is open everything is allowed but the end of the turn, which would leave
    the constraint unmet; the model may open one as its first token if ``thinking`` is ``may_open``; and one blank line may
    stand between ``</think>`` and the constrained text, as Qwen's models write it.

    With a large vocabulary the next mask is computed on a thread of its own while the model computes the logits it is for: the
    sequences beside this one do not wait for it.
    """

    def __init__(self, matcher: Any, compiler: GrammarCompiler, thinking: Thinking) -> None:
        self._matcher = matcher
        self._thinking: Thinking = thinking
        self._ahead: Future[npt.NDArray[np.int32]] | None = None  # the matcher is the other thread's until this is done
        self._finished = False
        self._compiler = compiler
        self._phase: Literal["first", "thinking", "gap", "grammar", "ended"] = "grammar"
        if compiler.close_think is not None:
            if thinking == "open":
                self._phase = "thinking"
            elif thinking == "may_open" and compiler.open_think is not None:
                self._phase = "first"

    def copy(self) -> GrammarState:
        """The same constraint for another answer. Only of a state that has not advanced yet."""
        state = GrammarState(self._matcher.deep_copy(), self._compiler, self._thinking)
        state._begin_mask()
        return state

    def forced_token(self) -> None:
        """None: a grammar's only token must have a logit to be taken."""

    def fill_mask(self, mask: npt.NDArray[np.int32]) -> bool:
        """Writes the allowed tokens into ``mask``, int32 [(width of the logits + 31) // 32], bit i % 32 of word i // 32. What lies behind
        the tokenizer's vocabulary is allowed in thinking alone. Returns True."""
        if self._phase == "thinking":
            mask[:] = -1
            for token_id in self._compiler.eos_token_ids:
                _set_bit(mask, token_id, False)
            return True
        found, size = self._mask(), self._compiler.vocab_size
        both = min(len(mask), len(found))
        mask[:both] = found[:both]
        mask[both:] = 0
        for token_id in range(size, -(-size // 32) * 32):
            _set_bit(mask, token_id, False)
        extra = {"first": self._compiler.open_think, "gap": self._compiler.blank_line}.get(self._phase)
        if extra is not None:
            _set_bit(mask, extra, True)
        return True

    def apply(self, logits: npt.NDArray[np.float32]) -> None:
        """Sets the logits [vocab_size] of tokens that may not come next to -inf, in place."""
        if self._phase == "thinking":
            logits[list(self._compiler.eos_token_ids)] = -np.inf
            return
        mask = self._compiler.new_mask()
        self.fill_mask(mask)
        allowed = np.unpackbits(mask.view(np.uint8), count=self._compiler.vocab_size, bitorder="little").view(bool)
        logits[: len(allowed)][~allowed[: len(logits)]] = -np.inf
        logits[len(allowed) :] = -np.inf

    def accept(self, token_id: int) -> None:
        """Advances by the sampled token."""
        if self._phase == "thinking":
            if token_id == self._compiler.close_think:
                self._phase = "gap"
        elif self._phase == "first" and token_id == self._compiler.open_think:
            self._phase = "thinking"
        elif self._phase == "gap" and token_id == self._compiler.blank_line:
            self._phase = "grammar"
        elif self._phase != "ended":
            self._phase = "ended" if token_id in self._compiler.eos_token_ids else "grammar"
            if self._ahead is not None:
                self._ahead.result()
                self._ahead = None
            if not self._matcher.consume_token(token_id):
                self._check()
            self._finished = self._phase == "ended" or bool(self._matcher.is_stopped())
            self._begin_mask()

    def is_finished(self) -> bool:
        """Whether the constrained text is complete and can only be ended."""
        return self._finished

    def _begin_mask(self) -> None:
        if self._compiler.vocab_size >= _LARGE_VOCABULARY:
            self._ahead = self._compiler.mask_thread.submit(self._compute_mask)

    def _mask(self) -> npt.NDArray[np.int32]:
        return self._compute_mask() if self._ahead is None else self._ahead.result()

    def _compute_mask(self) -> npt.NDArray[np.int32]:
        mask = self._compiler.new_mask()
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._check()
        return mask

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarFailed(f"the structured output cannot go on: {_first_line(self._matcher.get_error())}")


class CallGuard:
    """Holds the calls that an answer makes of its own accord to the schemas of the tools.

    Until the model opens a call, by the token ``<tool_call>`` outside its thinking, nothing is held and nothing computed but the
    comparison of that token; from there to the end tag only a call of one of the tools can follow; then the answer is free again.
    """

    def __init__(self, grammar: Future[GrammarState], compiler: GrammarCompiler, thinking: Thinking) -> None:
        """``grammar`` is of one call with its tags."""
        self._grammar = grammar
        self._compiler = compiler
        self._thinking: Thinking = thinking
        self._call: GrammarState | None = None

    def copy(self) -> CallGuard:
        """The same for another answer. Only of one that has not advanced yet."""
        return CallGuard(self._grammar, self._compiler, self._thinking)

    def apply(self, logits: npt.NDArray[np.float32]) -> None:
        """Inside a call: as :meth:`GrammarState.apply`. Elsewhere nothing."""
        if self._call is not None:
            self._call.apply(logits)

    def forced_token(self) -> None:
        """None, as of :class:`GrammarState`."""

    def fill_mask(self, mask: npt.NDArray[np.int32]) -> bool:
        """Inside a call: as :meth:`GrammarState.fill_mask`. Elsewhere False."""
        return self._call is not None and self._call.fill_mask(mask)

    def accept(self, token_id: int) -> None:
        """Advances by the sampled token."""
        if self._call is not None:
            self._call.accept(token_id)
            if self._call.is_finished():
                self._call = None
        elif self._thinking == "open":
            if token_id == self._compiler.close_think:
                self._thinking = "no"
        elif self._thinking == "may_open":
            self._thinking = "open" if token_id == self._compiler.open_think else "no"
        if self._call is None and self._thinking == "no" and token_id == self._compiler.open_call:
            self._call = self._grammar.result().copy()
            self._call.accept(token_id)

    def is_finished(self) -> bool:
        """Never: what follows a call is free."""
        return False


class GrammarCompiler:
    """Compiles constraints for one tokenizer. The token trie is built at the first use, or by :meth:`warm`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self.vocab_size = tokenizer.vocab_size
        self.eos_token_ids = frozenset(tokenizer.eos_token_ids)
        self.open_think = tokenizer.token_id(OPEN_THINK)
        self.close_think = tokenizer.token_id(CLOSE_THINK)
        self.open_call = tokenizer.token_id(OPEN_CALL)
        self._matcher = lru_cache(maxsize=_CACHED_GRAMMARS)(self._build)

    def warm(self) -> None:
        """Builds the token trie (half a second for 150 k tokens, in which Python runs nothing else)."""
        with self._lock:
            self._ll_tokenizer  # noqa: B018

    @cached_property
    def mask_thread(self) -> ThreadPoolExecutor:
        """Computes masks ahead. The library lets other threads run meanwhile."""
        return ThreadPoolExecutor(1, "helexa-grammar")

    @cached_property
    def blank_line(self) -> int | None:
        """The token that stands for two newlines, if there is one."""
        ids = self._tokenizer.encode("\n\n")
        return ids[0] if len(ids) == 1 else None

    @cached_property
    def _compile_thread(self) -> ThreadPoolExecutor:
        """Compiles what may never be needed."""
        return ThreadPoolExecutor(1, "helexa-grammar-compile")

    def thinking_control(
        self, thinking: Thinking, budget: int | None, constraint: GrammarState | CallGuard | None
    ) -> ThinkingControl | None:
        """Ends the thinking of one answer and then leaves it to ``constraint``; None where there is no thinking."""
        if thinking == "no" or self.close_think is None:
            return None
        blank_line = [] if self.blank_line is None else [self.blank_line]
        return ThinkingControl(
            thinking=thinking,
            open_think=self.open_think,
            close_think=self.close_think,
            closing=[*self._tokenizer.encode("\n"), self.close_think, *blank_line],
            budget=budget,
            constraint=constraint,
        )

    def new_mask(self) -> npt.NDArray[np.int32]:
        """int32 [(vocab_size + 31) // 32] of nothing allowed, for :meth:`GrammarState.fill_mask`."""
        return np.zeros((self.vocab_size + 31) // 32, np.int32)

    def compile(self, rules: Rules, thinking: Thinking = "no") -> GrammarState:
        """The constraint of ``rules``, at its beginning. Raises :class:`InvalidRequest` naming what is not supported."""
        if rules.part is not None:
            self.compile(rules.part)
        text = _lark(rules.text, rules.path) if rules.kind == "gbnf" else rules.text
        with self._lock:
            error, matcher = self._matcher("lark" if rules.kind == "gbnf" else rules.kind, text)
        if error:
            raise InvalidRequest(rules.path, f"not supported as a constraint: {error}")
        return GrammarState(matcher.deep_copy(), self, thinking)

    def guard(self, calls: FreeCalls, thinking: Thinking = "no") -> CallGuard:
        """What holds calls that the model is free to make. ``<tool_call>`` must be a token.

        Compiled beside, since most answers call nothing. A tool whose schema is beyond the compiler may be called with any
        arguments, which the log says; unless it is ``strict``: then every keyword must be one that can be enforced.

        Raises:
            InvalidRequest: the schema of a strict tool cannot be enforced.
        """
        tools: list[dict[str, Any]] = json.loads(calls.tools)
        for i, tool in enumerate(tools):
            function = tool.get("function", tool)
            if function.get("strict") is True:
                schema = json.dumps(closed(function.get("parameters") or {"type": "object"}))
                self.compile(Rules("json_schema", schema, f"tools[{i}].function.parameters"))
        return CallGuard(self._compile_thread.submit(self._compile_one_call, tools, calls.syntax), self, thinking)

    def _compile_one_call(self, tools: Sequence[Mapping[str, Any]], syntax: str) -> GrammarState:
        """One call of one of ``tools``; of those that cannot be compiled, with any arguments."""

        def one_call(among: Sequence[Mapping[str, Any]]) -> GrammarState:
            return self.compile(call_rules(self._tokenizer, among, syntax=syntax, several=False))

        try:
            return one_call(tools)
        except InvalidRequest:
            pass
        held: list[Mapping[str, Any]] = []
        for tool in tools:
            try:
                one_call([tool])
                held.append(tool)
            except InvalidRequest as error:
                function = tool.get("function", tool)
                log.warning("calls of %.80r are not held to its schema: %s", function["name"], error.reason)
                held.append({"function": {"name": function["name"], "parameters": {"type": "object"}}})
        return one_call(held)

    def maker(self, constraint: Constraint) -> Callable[[], GrammarState | CallGuard | ThinkingControl]:
        """Compiles ``constraint``; the result gives each answer a state of its own. Raises as :meth:`compile`."""
        first: GrammarState | CallGuard | None = None
        if constraint.rules is not None:
            first = self.compile(constraint.rules, constraint.thinking)
        elif constraint.calls is not None:
            first = self.guard(constraint.calls, constraint.thinking)

        def make() -> GrammarState | CallGuard | ThinkingControl:
            held = None if first is None else first.copy()
            made = self.thinking_control(constraint.thinking, constraint.thinking_budget, held) or held
            assert made is not None, "a constraint that constrains nothing"
            return made

        return make

    def _build(self, kind: str, text: str) -> tuple[str, Any]:
        from llguidance import LLMatcher

        grammars: dict[str, Any] = {
            "json_schema": lambda schema: LLMatcher.grammar_from_json_schema(schema, overrides=_JSON),
            "regex": LLMatcher.grammar_from_regex,
            "lark": LLMatcher.grammar_from_lark,
        }
        try:
            matcher = LLMatcher(self._ll_tokenizer, grammars[kind](text), log_level=0)
        except ValueError as error:
            return _first_line(str(error)), None
        return (_first_line(matcher.get_error()) if matcher.is_error() else ""), matcher

    @cached_property
    def _ll_tokenizer(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        tokenizer = self._tokenizer

        class Adapter:
            """The attributes that llguidance reads."""

            eos_token_id = tokenizer.eos_token_ids[0] if tokenizer.eos_token_ids else tokenizer.vocab_size - 1
            bos_token_id = None
            tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
            # Added tokens are no spelling of their text: a string of the answer must not contain them as tokens.
            special_token_ids = list(tokenizer.added_tokens)

            def __call__(self, text: str | bytes) -> list[int]:
                return tokenizer.encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)

        ends = list(tokenizer.eos_token_ids) or None
        return LLTokenizer(TokenizerWrapper(Adapter()), eos_token=ends)


def _set_bit(mask: npt.NDArray[np.int32], token_id: int, allowed: bool) -> None:
    """Logits may be narrower than the tokenizer's vocabulary: nothing then says anything of the tokens behind."""
    if token_id // 32 < len(mask):
        bit = np.uint32(1 << token_id % 32)
        mask.view(np.uint32)[token_id // 32 : token_id // 32 + 1] &= ~bit
        if allowed:
            mask.view(np.uint32)[token_id // 32] |= bit


def format_rules(spec: StructuredOutput) -> Rules:
    """Raises :class:`InvalidRequest` for a schema that is none."""
    path = _path(spec)
    if spec.json_object or spec.json_schema is not None:
        return Rules("json_schema", json.dumps(_json_schema(spec)), path)
    if spec.regex is not None:
        return Rules("regex", spec.regex, path)
    assert spec.grammar is not None
    return Rules("gbnf" if "::=" in spec.grammar else "lark", spec.grammar, path)  # which is no Lark


def call_rules(
    tokenizer: Tokenizer,
    tools: Sequence[Mapping[str, Any]],
    *,
    syntax: str = "json",
    several: bool = True,
    answer: StructuredOutput | None = None,
) -> Rules:
    """Calls of ``tools`` and nothing else, in the template's ``syntax`` (``json`` or ``xml``).

    Schema keywords of a tool that cannot be enforced are left to the model: the caller forced a call, not a validation.

    Args:
        several: whether more than one call may be made.
        answer: JSON that may be given instead of a call; its schema is enforced whole.

    Raises:
        InvalidRequest: the schema of ``answer`` is none.
    """
    known = {tag for tag in (OPEN_CALL, CLOSE_CALL) if tokenizer.token_id(tag) is not None}
    rules = (_xml_calls if syntax == "xml" else _json_calls)(tools, known)
    calls = 'calls: call ("\\n" call)*' if several else "calls: call"
    if answer is None:
        return Rules("lark", f"start: calls\n{calls}\n{rules}", "tools")
    text = json.dumps(_json_schema(answer) | {"x-guidance": _JSON})
    lark = f"start: calls | answer\nanswer: %json {text}\n{calls}\n{rules}"
    return Rules("lark", lark, _path(answer), part=format_rules(answer))


def _lark(grammar: str, path: str) -> str:
    """llama.cpp's GBNF as Lark. Raises :class:`InvalidRequest`."""
    from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

    try:
        return gbnf_to_lark(grammar)
    except (GbnfToLarkError, RecursionError) as error:
        raise InvalidRequest(path, f"expected a grammar in GBNF or Lark: {error}") from None


def _path(spec: StructuredOutput) -> str:
    """Where the request has the constraint."""
    if spec.path != "structured":
        return spec.path
    names = ("json_schema", "json_object", "regex", "grammar")
    return "structured." + next(name for name in names if getattr(spec, name) not in (None, False))


def _json_schema(spec: StructuredOutput) -> dict[str, Any]:
    """The schema of a constraint to JSON, of JSON values. Raises :class:`InvalidRequest`."""
    schema, path = spec.json_schema, _path(spec)
    if spec.json_object:
        return {"type": "object"}
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(path, f"expected a JSON Schema, got invalid JSON: {error}") from None
    if not isinstance(schema, Mapping):
        raise InvalidRequest(path, f"expected a JSON Schema object, got {schema!r:.80}")
    try:
        json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(path, f"expected a JSON Schema of JSON values: {error}") from None
    return closed(schema)


_SCHEMA_MAPS = ("properties", "$defs", "definitions")
_SCHEMA_LISTS = ("anyOf", "oneOf", "prefixItems")
_APPLICATORS = ("anyOf", "oneOf", "$ref")


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """``schema`` with objects that list their properties and do not speak of others held to those listed.

    JSON Schema allows any others; who writes a schema for a model rarely means that, and a small model loses itself in
    properties of its own. vLLM and llama-server read it the same way. A schema that puts an object together from several parts is
    left as it is: no part alone knows all properties.
    """
    parts = False

    def visit(value: Any) -> Any:
        nonlocal parts
        if not isinstance(value, Mapping):
            return value
        parts = parts or "allOf" in value or ("properties" in value and any(key in value for key in _APPLICATORS))
        result = dict(value)
        for key in _SCHEMA_MAPS:
            if isinstance(value.get(key), Mapping):
                result[key] = {name: visit(each) for name, each in value[key].items()}
        for key in _SCHEMA_LISTS:
            if isinstance(value.get(key), list):
                result[key] = [visit(each) for each in value[key]]
        for key in ("items", "additionalProperties"):
            if isinstance(value.get(key), Mapping):
                result[key] = visit(value[key])
        if "properties" in value and "patternProperties" not in value:
            result.setdefault("additionalProperties", False)
        return result

    result: dict[str, Any] = visit(schema)
    return dict(schema) if parts else result


def _json_calls(tools: Sequence[Mapping[str, Any]], special: set[str]) -> str:
    """Rules ``call`` and below. One JSON Schema for all tools: the library then decides by the name which arguments follow."""
    branches: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for i, tool in enumerate(tools):
        function = tool.get("function", tool)
        parameters, own = _hoisted(closed(function.get("parameters") or {"type": "object"}), f"tool{i}_")
        definitions |= own
        branches.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "arguments": parameters},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema = {"anyOf": branches, "$defs": definitions, "x-guidance": _LENIENT}
    begin, end = _tag(OPEN_CALL, special), _tag(CLOSE_CALL, special)
    return f'call: {begin} "\\n" object "\\n" {end}\nobject: %json {json.dumps(schema)}\n'


def _xml_calls(tools: Sequence[Mapping[str, Any]], special: set[str]) -> str:
    """Rules ``call`` and below: parameters in the order of the schema, or any where it lists none. Values that can be strings stand
    bare and are free text (or one of the words the schema lists); all others are JSON."""
    rules = []
    free = False
    for i, tool in enumerate(tools):
        function = tool.get("function", tool)
        parameters, definitions = _hoisted(closed(function.get("parameters") or {}), "")
        required = set(parameters.get("required") or ())
        parts = [json.dumps(f"<function={function['name']}>\n")]
        for k, (key, schema) in enumerate((parameters.get("properties") or {}).items()):
            rule = f"value_{i}_{k}"
            head, tail = json.dumps(f"<parameter={key}>\n"), json.dumps(f"\n{CLOSE_PARAMETER}\n")
            words = _words(schema, definitions)
            kinds = types_of(schema, {"$defs": definitions})
            if kinds == {"boolean"}:
                words = ["true", "false", "True", "False"]  # templates show them as Python writes them
            if words:
                rules.append(f"{rule}: ({' | '.join(map(json.dumps, words))}) {tail}")
            elif "string" in kinds or not kinds:
                rules.append(f"{rule}[suffix={tail}]: /(?s:.*)/")
            else:
                value = dict(schema) | {"$defs": definitions, "x-guidance": _LENIENT}
                rules.append(f"{rule}: %json {json.dumps(value)} {tail}")
            parts.append(f"({head} {rule})" + ("" if key in required else "?"))
        if "properties" not in parameters and parameters.get("additionalProperties") is not False:
            free = True
            parts.append("any_parameter*")
        parts.append(json.dumps(CLOSE_FUNCTION))
        rules.append(f"function_{i}: " + " ".join(parts))
    if free:
        rules.append(rf'any_parameter: "{OPEN_PARAMETER}" /[^<>\s]+/ ">\n" any_value')
        rules.append(rf'any_value[suffix="\n{CLOSE_PARAMETER}\n"]: /(?s:.*)/')
    begin, end = _tag(OPEN_CALL, special), _tag(CLOSE_CALL, special)
    choice = " | ".join(f"function_{i}" for i in range(len(tools)))
    return f'call: {begin} "\\n" ({choice}) "\\n" {end}\n' + "\n".join(rules) + "\n"


def _words(schema: Any, definitions: Mapping[str, Any]) -> list[str]:
    """The strings that a schema lists as all there is; none if it does not."""
    schema = resolved(schema, {"$defs": definitions})
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list) and values and all(isinstance(value, str) and value for value in values):
        return values
    return []


def _tag(tag: str, special: set[str]) -> str:
    """In llguidance's Lark a bare ``<name>`` is the special token, a quoted one its characters."""
    return tag if tag in special else json.dumps(tag)


def _hoisted(schema: Mapping[str, Any], prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """``schema`` with its definitions taken out and renamed with ``prefix``, for use inside another schema."""
    definitions: dict[str, Any] = {}

    def visit(value: Any, root: bool = False) -> Any:
        if isinstance(value, list):
            return [visit(item) for item in value]
        if not isinstance(value, Mapping):
            return value
        result = {}
        for key, item in value.items():
            if root and key in ("$defs", "definitions") and isinstance(item, Mapping):
                definitions.update({f"{prefix}{name}": visit(each) for name, each in item.items()})
            elif key == "$ref" and isinstance(item, str):
                result[key] = re.sub(r"^#/(\$defs|definitions)/", lambda _: f"#/$defs/{prefix}", item)
            elif key != "$schema":
                result[key] = visit(item)
        return result

    return visit(schema, root=True), definitions


def _first_line(error: str) -> str:
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    # A regex error says what is wrong in its last "error:" line, everything else in its first.
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error:")]
    return (f"{lines[0]} {said[-1]}" if said else lines[0] if lines else "unknown error")[:500]
