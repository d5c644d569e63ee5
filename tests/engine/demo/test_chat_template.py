"""The demo model's chat template: what the model reads is what it was trained on."""

from __future__ import annotations

import itertools

import jinja2
import pytest

from helexa_engine.demo.conversations import SKILLS, held_out, training
from helexa_engine.demo.tokenizer import conversation, prompt, render

QUESTION = {"role": "user", "content": "Hi"}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}],
}
SILENT = "<think>\n\n</think>\n\n"


def test_plain_question() -> None:
    assert render([QUESTION], add_generation_prompt=True) == (
        f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{SILENT}"
    )
    assert render([QUESTION]) == "<|im_start|>user\nHi<|im_end|>\n"


def test_thinking_is_left_to_the_model() -> None:
    text = render([QUESTION], add_generation_prompt=True, enable_thinking=True)
    assert text.endswith("<|im_start|>assistant\n")
    assert render([QUESTION], add_generation_prompt=True, enable_thinking=False).endswith(SILENT)


def test_system_and_tools_share_one_block() -> None:
    text = render([{"role": "system", "content": "Be brief."}, QUESTION], [TOOL])
    assert text.startswith("<|im_start|>system\nBe brief.\n\n")
    assert text.count("<|im_start|>system") == 1
    block = text.split("<tools>\n")[1].split("\n</tools>")[0]
    assert '"name": "weather"' in block
    assert render([QUESTION], [TOOL]).startswith("<|im_start|>system\nThese tools")


def test_calls_and_results() -> None:
    result = {"role": "tool", "content": '{"temperature": 3}'}
    text = render([QUESTION, CALL, result, result], [TOOL])
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call><|im_end|>' in text
    response = '\n<tool_response>\n{"temperature": 3}\n</tool_response>'
    assert text.endswith(f"<|im_start|>user{response * 2}<|im_end|>\n")


def test_arguments_may_be_text_or_a_mapping() -> None:
    as_text = {**CALL, "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}]}
    assert render([QUESTION, as_text]) == render([QUESTION, CALL])
    assert render([QUESTION, {**CALL, "content": None}]) == render([QUESTION, CALL])


def test_misplaced_role_is_refused() -> None:
    with pytest.raises(jinja2.TemplateError):
        render([QUESTION, {"role": "system", "content": "Late."}])


@pytest.mark.parametrize("skill", SKILLS)
def test_prompt_is_a_prefix_of_the_conversation(skill: str) -> None:
    for sample in held_out(skill, 50) + list(itertools.islice(training(1), 50)):
        text = prompt(sample)
        assert conversation(sample).startswith(text)


def test_history_renders_to_what_was_generated() -> None:
    """So that the cached pages of a conversation stay valid when it goes on."""
    for thinking in (False, True):
        asked = render([QUESTION], add_generation_prompt=True, enable_thinking=thinking)
        answer: dict[str, str] = {"role": "assistant", "content": "Hello!"}
        generated = "Hello!<|im_end|>"
        if thinking:
            answer["reasoning_content"] = "A greeting."
            generated = "<think>\nA greeting.\n</think>\n\n" + generated
        follow_up = render([QUESTION, answer, QUESTION], add_generation_prompt=True, enable_thinking=thinking)
        assert follow_up.startswith(asked + generated)
