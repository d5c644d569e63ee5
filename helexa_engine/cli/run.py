"""``helexa run MODEL``: a conversation in the terminal, or one answer for ``--prompt`` or piped input.

The answer goes to stdout and everything else (progress, statistics, notes) to stderr, so that the answer can be piped.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, TextIO

from ..config import EngineConfig, add_flags
from ..errors import ContextLengthExceeded, HelexaError, InvalidRequest
from ..events import (
    ContentDelta,
    Event,
    Failed,
    Finished,
    PromptProcessed,
    ReasoningDelta,
    ToolCallDelta,
    ToolCallStart,
)
from ..sampling_params import SamplingParams
from .options import UsageError, add_config_flag, resolve_config

Message = dict[str, Any]
#: Messages -> the events of the answer. Closing the iterator aborts the request.
Stream = Callable[[list[Message]], Iterator[Event]]

HELP = """\
/help    this list
/clear   forget the conversation
/exit    leave (also Ctrl-D)
Ctrl-C   stop the answer; once more to leave"""

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=".gguf file, HuggingFace folder, hub id, or demo")
    parser.add_argument(
        "-p", "--prompt", metavar="TEXT", help="answer this and exit; without it, piped input is the prompt"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message ahead of the conversation")
    parser.add_argument(
        "--think",
        action=argparse.BooleanOptionalAction,
        help="let the model reason before it answers; default: its template's",
    )
    sampling = parser.add_argument_group("sampling options (default: the model's own)")
    sampling.add_argument(
        "--max-tokens", metavar="N", type=int, help="longest answer in tokens; default: rest of the context"
    )
    sampling.add_argument("--temperature", metavar="T", type=float, help="0 always takes the likeliest token")
    sampling.add_argument(
        "--top-p", metavar="P", type=float, help="keep the likeliest tokens that reach this probability"
    )
    sampling.add_argument("--top-k", metavar="K", type=int, help="keep the K likeliest tokens; 0 keeps all")
    sampling.add_argument("--min-p", metavar="P", type=float, help="drop tokens less likely than P times the likeliest")
    sampling.add_argument("--repetition-penalty", metavar="X", type=float, help="above 1 discourages repeated tokens")
    sampling.add_argument(
        "--stop", metavar="TEXT", action="append", help="end the answer at this text; may be repeated"
    )
    add_config_flag(parser)
    add_flags(parser, EngineConfig)


def sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    """The sampling flags that were given. Raises :class:`UsageError`."""
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    try:
        return SamplingParams(stop=tuple(arguments.stop or ()), **{name: getattr(arguments, name) for name in names})
    except InvalidRequest as error:
        raise UsageError(f"--{error.path.replace('_', '-')}: {error.reason}") from None


def run(arguments: argparse.Namespace) -> int:
    config = resolve_config(arguments, "engine", EngineConfig)
    params = sampling_params(arguments)
    prompt: str | None = arguments.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise UsageError("the prompt is empty: expected text in --prompt or on standard input")

    from .loading import load

    with load(arguments.model, config) as llm:
        template_kwargs: Mapping[str, Any] = {} if arguments.think is None else {"enable_thinking": arguments.think}

        def stream(messages: list[Message]) -> Iterator[Event]:
            return llm.stream(messages=messages, sampling_params=params, chat_template_kwargs=template_kwargs)

        chat = Chat(stream, system=arguments.system, printer=Printer(sys.stdout, sys.stderr))
        if prompt is not None:
            return chat.answer(prompt)
        return chat.converse(_reader())


def _reader() -> Callable[[], str]:
    """Asks for one line, with editing and history where the platform has them. Raises EOFError and KeyboardInterrupt."""
    try:
        import readline  # noqa: F401  (its import gives input() editing and history)
    except ImportError:
        pass
    return lambda: input(">>> ")


class Stopped(Exception):
    """The first Ctrl-C, raised only where the answer's next event is awaited."""


class Interrupt:
    """While entered, the first Ctrl-C ends :meth:`next` with :class:`Stopped` and the second raises KeyboardInterrupt.

    The engine works on a thread of its own, so nothing of it is torn apart; what is printed never is either, because the first
    Ctrl-C takes effect only while waiting.
    """

    def __init__(self) -> None:
        self._requested = False
        self._waiting = False

    def next(self, events: Iterator[Event]) -> Event | None:
        """The next event, None after the last one. Raises :class:`Stopped`."""
        self._waiting = True
        try:
            if self._requested:
                raise Stopped
            return next(events, None)
        finally:
            self._waiting = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        if self._waiting:
            raise Stopped

    def __enter__(self) -> Interrupt:
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)


@dataclass(slots=True)
class Printer:
    """Writes one answer as it arrives. Reasoning is dimmed on a terminal and otherwise kept out of stdout."""

    out: TextIO
    notes: TextIO
    _dimmed: bool = False
    _ends_line: bool = True
    _answered: bool = False

    def show(self, event: Event) -> None:
        if isinstance(event, ContentDelta):
            self._dim(False)
            # A template may leave blank lines between the reasoning and the answer.
            self._write(event.text if self._answered else event.text.lstrip("\n"))
            self._answered = self._answered or bool(event.text.strip())
        elif isinstance(event, ReasoningDelta):
            if self.out.isatty():
                self._dim(True)
                self._write(event.text)
            elif self.notes.isatty():
                self.notes.write(f"{_DIM}{event.text}{_PLAIN}")
                self.notes.flush()
        elif isinstance(event, ToolCallStart):
            self._dim(False)
            self._write(f"{'' if self._ends_line else chr(10)}{event.name} ")
        elif isinstance(event, ToolCallDelta):
            self._write(event.arguments)

    def end(self, note: str) -> None:
        """Closes the answer's last line and writes ``note`` under it."""
        self._dim(False)
        if not self._ends_line:
            self._write("\n")
        self.note(note)
        self._answered = False

    def note(self, text: str) -> None:
        dim, plain = (_DIM, _PLAIN) if self.notes.isatty() else ("", "")
        self.notes.write(f"{dim}{text}{plain}\n")
        self.notes.flush()

    def _dim(self, wanted: bool) -> None:
        if self._dimmed == wanted:
            return
        self._dimmed = wanted
        if wanted:
            self.out.write(_DIM)
        else:
            self.out.write(_PLAIN)
            if not self._ends_line:
                self._write("\n")

    def _write(self, text: str) -> None:
        if text:
            self.out.write(text)
            self.out.flush()
            self._ends_line = text.endswith("\n")


@dataclass(slots=True)
class Chat:
    """A conversation: its history, and one question at a time."""

    stream: Stream
    system: str | None
    printer: Printer
    history: list[Message] = field(default_factory=list)

    def converse(self, read: Callable[[], str]) -> int:
        """Questions from ``read`` until it ends; an error of one answer does not end the conversation. Returns the exit code."""
        self.printer.note("Type a message; /help lists the commands.")
        leaving = False
        while True:
            try:
                text = read().strip()
            except EOFError:
                self.printer.note("")
                return 0
            except KeyboardInterrupt:
                if leaving:
                    self.printer.note("")
                    return 130
                leaving = True
                self.printer.note("\nCtrl-C once more, or /exit, to leave")
                continue
            leaving = False
            if text == "/exit":
                return 0
            if text == "/clear":
                self.history.clear()
                self.printer.note("the conversation is forgotten")
            elif text.startswith("/"):
                self.printer.note(HELP if text == "/help" else f"unknown command {text.split()[0]}\n{HELP}")
            elif text:
                try:
                    self.answer(text)
                except ContextLengthExceeded as error:
                    self.printer.end(f"{error.message}\n/clear starts over")
                except HelexaError as error:
                    self.printer.end(error.message)

    def answer(self, text: str) -> int:
        """Streams the answer to one question and keeps both in the history. Returns 0, or 130 when Ctrl-C cut it short.

        Raises the :class:`HelexaError` of a failed request; the history is then as before.
        """
        question: Message = {"role": "user", "content": text}
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        content, reasoning, num_tokens = "", "", 0
        started = first_token_at = time.perf_counter()
        prompt: PromptProcessed | None = None
        finished: Finished | None = None
        with Interrupt() as interrupt:
            events = self.stream([*system, *self.history, question])
            try:
                while (event := interrupt.next(events)) is not None:
                    if isinstance(event, Failed):
                        raise event.error
                    if isinstance(event, PromptProcessed):
                        prompt, first_token_at = event, time.perf_counter()
                        continue
                    num_tokens += len(event.token_ids)
                    if isinstance(event, ContentDelta):
                        content += event.text
                    elif isinstance(event, ReasoningDelta):
                        reasoning += event.text
                    elif isinstance(event, Finished):
                        finished = event
                    self.printer.show(event)
            except Stopped:
                pass
            finally:
                close = getattr(events, "close", None)
                if close is not None:
                    close()
        if finished is not None:
            self._remember(question, content, reasoning)
            self.printer.end(_statistics(finished))
            return 0
        # What was shown before Ctrl-C is part of the conversation; an answer that had not begun is not.
        if content.strip():
            self._remember(question, content, reasoning)
        seconds = time.perf_counter() - (first_token_at if prompt else started)
        rate = f", {(num_tokens - 1) / seconds:.1f} tokens/s" if num_tokens > 1 else ""
        self.printer.end(f"[stopped after {num_tokens} tokens{rate}]")
        return 130

    def _remember(self, question: Message, content: str, reasoning: str) -> None:
        answer: Message = {"role": "assistant", "content": content.strip()}
        if reasoning:
            answer["reasoning_content"] = reasoning  # the template decides whether old reasoning is shown again
        self.history += [question, answer]


def _statistics(finished: Finished) -> str:
    usage, timings = finished.usage, finished.timings
    parts = [f"{usage.completion_tokens} tokens"]
    rate = timings.decode_tokens_per_second(usage.completion_tokens)
    if rate:
        parts.append(f"{rate:.1f} tokens/s")
    computed = usage.prompt_tokens - usage.cached_tokens
    if timings.prefill_seconds > 0:
        parts.append(f"prompt of {usage.prompt_tokens} at {computed / timings.prefill_seconds:.1f} tokens/s")
    if finished.finish_reason == "length":
        parts.append("cut off at the token limit")
    return f"[{', '.join(parts)}]"
