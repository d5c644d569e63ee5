from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator

import pytest

from helexa_engine.cli.run import Chat, Interrupt, Message, Printer
from helexa_engine.errors import ContextLengthExceeded
from helexa_engine.events import (
    ContentDelta,
    Event,
    Failed,
    Finished,
    PromptProcessed,
    ReasoningDelta,
    Timings,
    ToolCallDelta,
    ToolCallStart,
    Usage,
)

FINISHED = Finished(0, "stop", Usage(7, 3, cached_tokens=2), Timings(0.0, 0.5, 0.1))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Model:
    """Replays events; remembers what it was asked and whether its answers were closed."""

    def __init__(self, *answers: list[Event | int]) -> None:
        self.answers = list(answers)
        self.asked: list[list[Message]] = []
        self.closed = 0
        self.at_close: int | None = None

    def stream(self, messages: list[Message]) -> Iterator[Event]:
        self.asked.append(messages)
        try:
            for event in self.answers.pop(0):
                if isinstance(event, int):
                    os.kill(os.getpid(), event)
                else:
                    yield event
        finally:
            self.closed += 1
            if self.at_close is not None:
                os.kill(os.getpid(), self.at_close)


def chat(model: Model, *, terminal: bool = False, system: str | None = None) -> tuple[Chat, io.StringIO, io.StringIO]:
    out, notes = (Terminal(), Terminal()) if terminal else (io.StringIO(), io.StringIO())
    return Chat(model.stream, system, Printer(out, notes)), out, notes


def words(*texts: str) -> list[Event | int]:
    return [PromptProcessed((1, 2)), *(ContentDelta(0, text, (3,)) for text in texts), FINISHED]


class Lines:
    """Stands for the keyboard: a line, or the exception a key raises; then end of input."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self.lines = list(lines)

    def __call__(self) -> str:
        line = self.lines.pop(0) if self.lines else EOFError
        if isinstance(line, str):
            return line
        raise line


def test_the_answer_alone_goes_to_stdout() -> None:
    one, out, notes = chat(Model(words("Hello", " there")))
    assert one.answer("hi") == 0
    assert out.getvalue() == "Hello there\n"
    assert notes.getvalue() == "[3 tokens, 20.0 tokens/s, prompt of 7 at 10.0 tokens/s]\n"


def test_history_grows_and_clear_forgets_it() -> None:
    model = Model(words("A"), words("B"), words("C"))
    conversation, _, _ = chat(model, system="be brief")
    assert conversation.converse(Lines("one", "two", "/clear", "three")) == 0
    system = {"role": "system", "content": "be brief"}
    one, two, three = ({"role": "user", "content": text} for text in ("one", "two", "three"))
    assert model.asked == [[system, one], [system, one, {"role": "assistant", "content": "A"}, two], [system, three]]


@pytest.mark.parametrize("lines", [["/exit"], []])
def test_leaving(lines: list[str]) -> None:
    model = Model()
    conversation, _, _ = chat(model)
    assert conversation.converse(Lines(*lines, "never read") if lines else Lines()) == 0
    assert model.asked == []


def test_unknown_commands_are_not_sent_to_the_model() -> None:
    model = Model()
    conversation, _, notes = chat(model)
    conversation.converse(Lines("/frobnicate", "/help"))
    assert "unknown command /frobnicate" in notes.getvalue() and notes.getvalue().count("/clear") == 2
    assert model.asked == []


def test_reasoning_is_dimmed_on_a_terminal_and_kept_for_the_template() -> None:
    model = Model([PromptProcessed((1,)), ReasoningDelta(0, "hmm", (2,)), ContentDelta(0, "\n\nYes", (3,)), FINISHED])
    one, out, _ = chat(model, terminal=True)
    one.answer("?")
    assert out.getvalue() == "\x1b[2mhmm\x1b[0m\nYes\n"
    assert one.history[1] == {"role": "assistant", "content": "Yes", "reasoning_content": "hmm"}


def test_reasoning_stays_out_of_a_pipe() -> None:
    one, out, notes = chat(Model([PromptProcessed((1,)), ReasoningDelta(0, "hmm"), ContentDelta(0, "Yes"), FINISHED]))
    one.answer("?")
    assert out.getvalue() == "Yes\n" and "hmm" not in notes.getvalue()


def test_tool_calls_are_shown() -> None:
    events: list[Event | int] = [
        ContentDelta(0, "Look:"),
        ToolCallStart(0, 0, "id", "f"),
        ToolCallDelta(0, 0, "{}"),
        FINISHED,
    ]
    one, out, _ = chat(Model(events))
    one.answer("?")
    assert out.getvalue() == "Look:\nf {}\n"


def test_a_failed_answer_does_not_end_the_conversation() -> None:
    model = Model([Failed(ContextLengthExceeded(9, 8))], words("fine"))
    conversation, out, notes = chat(model)
    assert conversation.converse(Lines("long", "short")) == 0
    assert "prompt is too long: 9 tokens > 8 maximum" in notes.getvalue() and out.getvalue() == "fine\n"
    assert model.asked[1] == [{"role": "user", "content": "short"}]


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on() -> None:
    model = Model([PromptProcessed((1,)), ContentDelta(0, "never", (1,)), signal.SIGINT, ContentDelta(0, " ends", (2,)),
                   ContentDelta(0, " at all", (3,))], words("ok"))  # fmt: skip
    conversation, out, notes = chat(model)
    before = signal.getsignal(signal.SIGINT)
    assert conversation.converse(Lines("go", "again")) == 0
    assert out.getvalue() == "never\nok\n"
    assert "[stopped after 1 tokens" in notes.getvalue()
    assert model.closed == 2  # the request was aborted, not left running
    assert model.asked[1][1] == {"role": "assistant", "content": "never"}
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_makes_a_single_answer_exit_with_130() -> None:
    model = Model([ContentDelta(0, "a"), signal.SIGINT, ContentDelta(0, "b"), FINISHED])
    one, _, _ = chat(model)
    assert one.answer("go") == 130 and model.closed == 1


def test_a_second_ctrl_c_leaves_at_once() -> None:
    model = Model([signal.SIGINT, ContentDelta(0, "never")])
    model.at_close = signal.SIGINT  # the engine takes its time to stop
    conversation, out, _ = chat(model)
    with pytest.raises(KeyboardInterrupt):
        conversation.converse(Lines("go"))
    assert out.getvalue() == "" and model.closed == 1


def test_ctrl_c_while_printing_takes_effect_before_the_next_event() -> None:
    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            if text == "one":
                os.kill(os.getpid(), signal.SIGINT)
            return super().write(text)

    model, out = Model(words("one", "two")), Slow()
    assert Chat(model.stream, None, Printer(out, io.StringIO())).answer("go") == 130
    assert out.getvalue() == "one\n" and model.closed == 1


def test_ctrl_c_at_the_prompt_warns_once_and_then_leaves() -> None:
    model = Model(words("x"))
    conversation, _, notes = chat(model)
    assert conversation.converse(Lines(KeyboardInterrupt, "hi", KeyboardInterrupt, KeyboardInterrupt, "never")) == 130
    assert notes.getvalue().count("once more") == 2 and len(model.asked) == 1


def test_interrupt_restores_the_handler_after_an_error() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError), Interrupt():
        raise ValueError
    assert signal.getsignal(signal.SIGINT) is before
