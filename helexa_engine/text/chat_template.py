"""The model's own Jinja chat template, run as what it is: a program from a stranger. :class:`ChatTemplate`."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HelexaError, InvalidRequest, TemplateRenderFailed
from .messages import normalise
from .tokenizer import TextMarks, Tokenizer, read_json

if TYPE_CHECKING:
    import jinja2

MAX_CHARACTERS = 32 * 2**20  #: longest string a template may build, output included
MAX_ITEMS = 2**20  #: longest list a template may build
MAX_STEPS = 500_000  #: loop rounds and calls of one rendering
MAX_PROBE_STEPS = 10_000  #: the same, for the tiny conversations of a probe
MAX_SECONDS = 20.0  #: wall clock of one rendering


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered prompt and the places in it that are text even if they spell a special token."""

    text: str
    marks: TextMarks | None = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a template was seen to do when it was probed.

    ``system``: takes a system message; ``late_system``: one that is not first; ``same_role_turns``: two turns of the user, or
    of the assistant, in a row. ``thinking``: reacts to ``enable_thinking``, or opens a think block. ``tool_syntax``: how it
    shows calls, ``json`` (``{"name": ..., "arguments": ...}``) or ``xml`` (``<function=name>``); None when it does not show them.
    """

    system: bool
    late_system: bool
    same_role_turns: bool
    tools: bool
    tool_syntax: str | None
    parallel_tool_calls: bool
    thinking: bool


class ChatTemplate:
    """Renders messages into a prompt. Compiling is lazy; a template that does not compile fails at its first use.

    The template runs in Jinja's immutable sandbox with the names HuggingFace gives it (``raise_exception``,
    ``strftime_now``, ``tojson`` without HTML escapes, loop controls, the ``generation`` tag), and within bounds on steps,
    time and memory. Whatever goes wrong in it is a :class:`TemplateRenderFailed` with its words.

    Special tokens: a template writes ``<|im_end|>`` and means the token; a user writes it and means the characters. To tell
    them apart in the rendered string, each occurrence of an added token inside a string that came from outside is wrapped in
    two private-use characters that occur in none of the strings and not in the template; they are taken out after
    rendering and their offsets kept (:class:`TextMarks`). A string that ends with the beginning of an added token, or begins
    with the end of one, is marked at that edge, so that two strings side by side cannot form one. Wrapping leaves the text
    itself whole, so templates that look for ``</think>`` or ``<tool_response>`` in a message still find it. The content of
    assistant turns is the model's own earlier output: in it only control tokens are marked, and ``<think>`` stays a token, so
    that a replayed answer gives the ids it was generated with.
    """

    def __init__(
        self,
        source: str,
        *,
        added_tokens: Mapping[str, bool] | None = None,
        variables: Mapping[str, Any] | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """``added_tokens`` maps each added token's text to whether it is a control token; ``variables`` are given to every
        rendering (``bos_token`` ...)."""
        self.source = source
        self._added_tokens = dict(added_tokens or {})
        self._variables = dict(variables or {})
        self._now = now

    @classmethod
    def for_tokenizer(cls, source: str, tokenizer: Tokenizer) -> ChatTemplate:
        """With the special tokens of ``tokenizer``."""
        variables: dict[str, Any] = {"bos_token": "", "eos_token": ""}
        if tokenizer.bos_token_id is not None:
            variables["bos_token"] = tokenizer.decode([tokenizer.bos_token_id])
        if tokenizer.eos_token_ids:
            variables["eos_token"] = tokenizer.decode(tokenizer.eos_token_ids[:1])
        if tokenizer.pad_token_id is not None:
            variables["pad_token"] = tokenizer.decode([tokenizer.pad_token_id])
        added = {token.content: token.special for token in tokenizer.added_tokens.values()}
        return cls(source, added_tokens=added, variables=variables)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate | None:
        """From ``tokenizer.chat_template``; None when the file has none."""
        source = metadata.get("tokenizer.chat_template")
        return cls.for_tokenizer(source, tokenizer) if isinstance(source, str) and source else None

    @classmethod
    def from_folder(cls, folder: str | Path, tokenizer: Tokenizer) -> ChatTemplate | None:
        """From ``chat_template.jinja``, ``chat_template.json`` or ``tokenizer_config.json``; None when there is none."""
        folder = Path(folder)
        try:
            return cls.for_tokenizer((folder / "chat_template.jinja").read_text(encoding="utf-8"), tokenizer)
        except FileNotFoundError:
            pass
        for file in ("chat_template.json", "tokenizer_config.json"):
            source = (read_json(folder / file) or {}).get("chat_template")
            if isinstance(source, list):  # several, by name
                named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
                source = named.get("default")
            if isinstance(source, str) and source:
                return cls.for_tokenizer(source, tokenizer)
        return None

    # -- rendering -----------------------------------------------------------------------------------------------------

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> Rendered:
        """The prompt for ``messages`` (as clients send them; see :mod:`.messages`).

        Raises:
            InvalidRequest: a message is malformed.
            TemplateRenderFailed: the template refused, failed or ran out of bounds.
        """
        abilities = self.capabilities
        turns = normalise(
            messages,
            system=abilities.system,
            late_system=abilities.late_system,
            same_role_turns=abilities.same_role_turns,
        )
        return self._render(turns, tools, add_generation_prompt, kwargs)

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        """Token ids of :meth:`render`: special tokens of the template are specials, those inside messages are text."""
        rendered = self.render(messages, **kwargs)
        return tokenizer.encode(rendered.text, allow_special=True, marks=rendered.marks)

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        kwargs: Mapping[str, Any],
        max_steps: int = MAX_STEPS,
    ) -> Rendered:
        marker = _Marker(self._added_tokens, self.source, [messages, tools, kwargs])
        assistant = ("content", "reasoning_content")
        turns = [
            {
                marker.mark(key): marker.mark(
                    value, control_only=message.get("role") == "assistant" and key in assistant
                )
                for key, value in message.items()
            }
            for message in messages
        ]
        variables = {
            **self._variables,
            **marker.mark(dict(kwargs)),
            "messages": turns,
            "tools": marker.mark(list(tools)) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return marker.take_out(self._run(variables, marker, max_steps))

    def _run(self, variables: Mapping[str, Any], marker: _Marker, max_steps: int) -> str:
        import jinja2

        try:
            template = self._template
            budget: _Budget = template.environment.helexa_budget  # type: ignore[attr-defined]
            budget.open(max_steps)
            pieces, length = [], 0
            for piece in template.generate(**variables):
                length += len(piece)
                budget.check_length(length)
                pieces.append(piece)
            return "".join(pieces)
        except HelexaError:
            raise
        except jinja2.TemplateSyntaxError as error:
            raise TemplateRenderFailed(
                f"the chat template is not valid Jinja, line {error.lineno}: {error.message}"
            ) from error
        except (RecursionError, MemoryError) as error:
            raise TemplateRenderFailed(f"the chat template ran out of bounds: {type(error).__name__}") from error
        except Exception as error:  # a stranger's program: anything can come out of it
            words = marker.take_out(str(error)).text
            raise TemplateRenderFailed(f"the chat template refused: {words[:2000] or type(error).__name__}") from error

    @cached_property
    def _template(self) -> jinja2.Template:
        return _compile(self.source, self._now)

    # -- what it can do ------------------------------------------------------------------------------------------------

    @cached_property
    def capabilities(self) -> Capabilities:
        """Found by rendering probes, once: when the model is loaded, for its :class:`~.request_processor.RequestProcessor` asks."""
        user = {"role": "user", "content": "probe-user"}
        tool = {
            "type": "function",
            "function": {
                "name": "probe_tool",
                "description": "probe",
                "parameters": {"type": "object", "properties": {"key": {"type": "string"}}},
            },
        }
        calls = [
            {"id": f"c{i}", "type": "function", "function": {"name": f"probe_call_{i}", "arguments": {"key": "value"}}}
            for i in range(2)
        ]
        answers = [{"role": "tool", "tool_call_id": f"c{i}", "content": "probe-answer"} for i in range(2)]

        def probe(*messages: Any, **kwargs: Any) -> str:
            tools = kwargs.pop("tools", None)
            try:
                return self._render(list(messages), tools, True, kwargs, MAX_PROBE_STEPS).text
            except TemplateRenderFailed:
                return ""

        system = {"role": "system", "content": "probe-system"}
        assistant = {"role": "assistant", "content": "probe-assistant"}
        again = {"content": "probe-again"}
        in_a_row = ([user, user | again], [user, assistant, assistant | again, user])
        called = probe(user, {"role": "assistant", "content": "", "tool_calls": calls}, *answers, tools=[tool])
        on, off = probe(user, enable_thinking=True), probe(user, enable_thinking=False)
        return Capabilities(
            system="probe-system" in probe(system, user),
            late_system="probe-system" in probe(user, assistant, system, user),
            same_role_turns=all("probe-again" in probe(*turns) for turns in in_a_row),
            tools="probe_tool" in probe(user, tools=[tool]),
            tool_syntax="xml" if "<function=probe_call_0" in called else "json" if "probe_call_0" in called else None,
            parallel_tool_calls="probe_call_0" in called and "probe_call_1" in called,
            thinking=on != off or on.rstrip().endswith("<think>"),
        )


class _Marker:
    """Wraps added tokens in outside strings, and takes the wrapping out of the result (see :class:`ChatTemplate`)."""

    def __init__(self, added_tokens: Mapping[str, bool], source: str, outside: Any) -> None:
        self._all = _Finder(added_tokens)
        self._control = _Finder(token for token, control in added_tokens.items() if control)
        used = set(source)
        for text in _strings(outside):
            used.update(text)
        free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used)
        self._begin, self._end = next(free), next(free)

    def mark(self, value: Any, *, control_only: bool = False) -> Any:
        """``value`` rebuilt from plain JSON types, so that a template sees no methods but theirs, with strings marked."""
        if isinstance(value, str):
            finder = self._control if control_only else self._all
            return finder.wrap(str(value), self._begin, self._end)
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, Mapping):
            return {
                self.mark(k, control_only=control_only): self.mark(v, control_only=control_only)
                for k, v in value.items()
            }
        if isinstance(value, Iterable):
            return [self.mark(item, control_only=control_only) for item in value]
        raise InvalidRequest("messages", f"expected JSON values, got {type(value).__name__}")

    def take_out(self, text: str) -> Rendered:
        if self._begin not in text and self._end not in text:
            return Rendered(text)
        begins, ends, pieces, length = [], [], [], 0
        for piece in re.split(f"([{self._begin}{self._end}])", text):
            if piece == self._begin:
                begins.append(length)
            elif piece == self._end:
                ends.append(length)
            else:
                pieces.append(piece)
                length += len(piece)
        return Rendered("".join(pieces), TextMarks(begins, ends))


class _Finder:
    """Finds whole tokens inside a string and parts of tokens at its edges."""

    def __init__(self, tokens: Iterable[str]) -> None:
        tokens = sorted(tokens, key=len, reverse=True)
        self._whole = re.compile("|".join(map(re.escape, tokens))) if tokens else None
        self._heads = frozenset(token[:k] for token in tokens for k in range(1, len(token)))
        self._tails = frozenset(token[k:] for token in tokens for k in range(1, len(token)))
        self._longest = max(map(len, tokens), default=0)

    def wrap(self, text: str, begin: str, end: str) -> str:
        if self._whole is None or not text:
            return text
        reach = range(1, min(len(text), self._longest) + 1)
        # Inside a token is any strict part of it too: a single string between two others may be the middle of one.
        starts_badly = any(text[:k] in self._tails for k in reach)
        ends_badly = any(text[-k:] in self._heads for k in reach)
        marked = self._whole.sub(lambda match: begin + match[0] + end, text)
        return (begin if starts_badly else "") + marked + (end if ends_badly else "")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, Iterable):
        for item in value:
            yield from _strings(item)


class _Budget:
    """Bounds of the rendering in progress. Templates are shared between threads, so the counts are per thread."""

    def __init__(self) -> None:
        import threading

        self._local = threading.local()

    def open(self, max_steps: int) -> None:
        self._local.left = max_steps
        self._local.deadline = time.monotonic() + MAX_SECONDS

    def step(self) -> None:
        self._local.left -= 1
        if self._local.left < 0:
            raise TemplateRenderFailed("the chat template does not end: too many steps")
        if self._local.left % 1024 == 0 and time.monotonic() > self._local.deadline:
            raise TemplateRenderFailed(f"the chat template did not end within {MAX_SECONDS:.0f} seconds")

    def check_length(self, length: int, what: str = "characters") -> None:
        limit = MAX_CHARACTERS if what == "characters" else MAX_ITEMS
        if length > limit:
            raise TemplateRenderFailed(f"the chat template builds more than {limit} {what}")


def _compile(source: str, now: Callable[[], datetime]) -> jinja2.Template:
    """``source`` compiled in a sandbox of its own. Importing and building it here keeps Jinja out of the import of helexa."""
    import jinja2
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    budget = _Budget()

    class GenerationTag(jinja2.ext.Extension):
        """``{% generation %}`` marks the assistant's words for training; here its body is just rendered."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Counting(NodeTransformer):
        """Sends loops through ``_counted`` and ``~`` through ``_concat``, which keep to the budget."""

        def visit_For(self, node: nodes.For) -> nodes.Node:
            self.generic_visit(node)
            node.iter = nodes.Filter(node.iter, "_counted", [], [], None, None, lineno=node.lineno)
            return node

        def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
            self.generic_visit(node)
            pieces = nodes.List(node.nodes, lineno=node.lineno)
            return nodes.Filter(pieces, "_concat", [], [], None, None, lineno=node.lineno)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def _parse(self, source: str, name: Any, filename: Any) -> nodes.Template:
            tree: nodes.Template = Counting().visit(super()._parse(source, name, filename))
            return tree

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            budget.step()
            if operator == "*":
                for sized, times in ((left, right), (right, left)):
                    if isinstance(sized, (str, list, tuple)) and isinstance(times, int):
                        budget.check_length(len(sized) * times, "characters" if isinstance(sized, str) else "items")
            elif operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
                budget.check_length(len(left) + len(right), "characters" if isinstance(left, str) else "items")
            elif operator == "%" and isinstance(left, str) and re.search(r"%[^a-zA-Z]*(\d{4}|\*)", left):
                raise TemplateRenderFailed("the chat template formats a string to an excessive width")
            elif operator == "**" and (abs(left) > 2**32 or abs(right) > 64):
                raise TemplateRenderFailed("the chat template raises a number to an excessive power")
            value = super().call_binop(context, operator, left, right)
            if isinstance(value, int) and abs(value) > 2**256:
                raise TemplateRenderFailed("the chat template computes an excessive number")
            return value

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
            budget.step()
            for argument in args:
                if isinstance(argument, int) and not isinstance(argument, bool) and abs(argument) > 10**6:
                    if getattr(__obj, "__self__", None).__class__ is str:  # ljust, zfill, center ...
                        raise TemplateRenderFailed("the chat template pads a string to an excessive width")
            if isinstance(getattr(__obj, "__self__", None), str) and getattr(__obj, "__name__", "") in (
                "join",
                "replace",
            ):
                _check_growth(__obj, args)
            value = super().call(__context, __obj, *args, **kwargs)
            if isinstance(value, str):
                budget.check_length(len(value))
            return value

    def _check_growth(method: Any, args: Sequence[Any]) -> None:
        text: str = method.__self__
        if method.__name__ == "replace" and len(args) >= 2 and all(isinstance(arg, str) for arg in args[:2]):
            budget.check_length(len(text) + text.count(args[0]) * len(args[1]))
        elif method.__name__ == "join" and args and isinstance(args[0], (list, tuple)):
            budget.check_length(sum(len(text) + len(str(item)) for item in args[0]))

    def counted(items: Any) -> Iterator[Any]:
        for item in items:
            budget.step()
            yield item

    def concat(items: Sequence[Any]) -> str:
        budget.step()
        pieces = [str(item) for item in items]
        budget.check_length(sum(map(len, pieces)))
        return "".join(pieces)

    def join(items: Any, d: str = "", attribute: Any = None) -> str:
        pieces = [str(item if attribute is None else environment.getitem(item, attribute)) for item in counted(items)]
        budget.check_length(sum(map(len, pieces)) + len(d) * len(pieces))
        return str(d).join(pieces)

    def replace(text: Any, old: str, new: str, count: int = -1) -> str:
        text = str(text)
        budget.check_length(len(text) + text.count(old) * len(new))
        replaced: str = text.replace(old, new, -1 if count is None else count)
        return replaced

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        if indent is not None and (not isinstance(indent, int) or indent > 16):
            raise TemplateRenderFailed("tojson: expected an indent of at most 16")
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: Any) -> None:
        raise jinja2.TemplateError(str(message))

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols], cache_size=0
    )
    # Filters that build strings of a size of the template's choosing and that no chat template needs.
    for name in ("center", "format", "wordwrap", "pprint", "urlize", "xmlattr"):
        environment.filters.pop(name)
    indent_filter = environment.filters["indent"]

    def indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        if (len(width) if isinstance(width, str) else width) > 64:
            raise TemplateRenderFailed("indent: expected a width of at most 64")
        return str(indent_filter(text, width, first, blank))

    environment.filters |= {
        "_counted": counted,
        "_concat": concat,
        "join": join,
        "replace": replace,
        "tojson": tojson,
        "indent": indent,
    }
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: now().strftime(form),
    }
    environment.globals.pop("lipsum", None)
    environment.helexa_budget = budget  # type: ignore[attr-defined]
    return environment.from_string(source)
