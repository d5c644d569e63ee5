"""The end of thinking by budget and on demand."""

from __future__ import annotations

import numpy as np
import pytest

from helexa_engine.sampling_params import StructuredOutput
from helexa_engine.text.structured import GrammarCompiler, format_rules

from .masks import allowed


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer)


def say(control, tokenizer, text, *, stop_at=None):
    """What comes out when the model would say ``text``: its next token if that is allowed, else the only one that is."""
    wanted, said = tokenizer.encode(text, allow_special=True), []
    while wanted and len(said) < 500:
        if len(said) == stop_at:
            control.stop()
        may_come = allowed(control, tokenizer.vocab_size)
        token_id = wanted[0]
        if may_come[token_id]:
            wanted.pop(0)
        else:
            [token_id] = np.flatnonzero(may_come).tolist()
            if tokenizer.token_id("</think>") == token_id and token_id in wanted:
                del wanted[: wanted.index(token_id) + 1]  # the model would have gone on to this point
        control.accept(token_id)
        said.append(token_id)
    return tokenizer.decode(said)


THOUGHT = "one two three four five six"


@pytest.mark.parametrize("thinking", ["open", "may_open"])
@pytest.mark.parametrize("budget", [0, 1, 3, 1000, None])
def test_budget(compiler, tokenizer, thinking, budget):
    opening = "" if thinking == "open" else "<think>"
    ids = tokenizer.encode(THOUGHT)
    control = compiler.thinking_control(thinking, budget, None)
    said = say(control, tokenizer, f"{opening}{THOUGHT}</think>so")
    if budget is None or budget >= len(ids):
        assert said == f"{opening}{THOUGHT}</think>so"
    else:
        blank = "\n\n" if compiler.blank_line is not None else ""
        assert said == f"{opening}{tokenizer.decode(ids[:budget])}\n</think>{blank}so"


def test_an_answer_without_thinking_is_left_alone(compiler, tokenizer):
    text = f"so <think>{THOUGHT} {THOUGHT}"  # a tag later on is no thinking
    assert say(compiler.thinking_control("may_open", 0, None), tokenizer, text) == text
    assert compiler.thinking_control("no", 0, None) is None


def test_stop_thinking(compiler, tokenizer):
    said = say(compiler.thinking_control("open", None, None), tokenizer, f"{THOUGHT}</think>so", stop_at=2)
    assert said.startswith(tokenizer.decode(tokenizer.encode(THOUGHT)[:2]) + "\n</think>") and said.endswith("so")
    late = say(compiler.thinking_control("open", None, None), tokenizer, f"a</think>{THOUGHT}", stop_at=4)
    assert late == f"a</think>{THOUGHT}"


def test_a_constraint_holds_behind_the_closing(compiler, tokenizer):
    grammar = compiler.compile(format_rules(StructuredOutput(regex="yes|no")), "open")
    control = compiler.thinking_control("open", 2, grammar)
    said = say(control, tokenizer, f"{THOUGHT}</think>yes")
    assert said.endswith("yes") and "</think>" in said
    assert control.is_finished()
