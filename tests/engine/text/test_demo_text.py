"""The demo model's text: what is served is, token for token, what it was trained on."""

from __future__ import annotations

import pytest

from helexa_engine import demo
from helexa_engine.demo import conversations
from helexa_engine.demo import tokenizer as training
from helexa_engine.text.chat_template import Capabilities, ChatTemplate
from helexa_engine.text.tokenizer import Tokenizer
from helexa_engine.weights.gguf import GGUFFile


@pytest.fixture(scope="module")
def shipped():
    file = GGUFFile(demo.path())
    tokenizer = Tokenizer.from_gguf(file.metadata, str(demo.path()))
    template = ChatTemplate.from_gguf(file.metadata, tokenizer)
    assert template is not None
    return tokenizer, template


@pytest.mark.parametrize("skill", conversations.SKILLS)
def test_prompts_are_the_trained_ones(shipped, skill):
    tokenizer, template = shipped
    for sample in conversations.held_out(skill, 20):
        kwargs = {"tools": sample.tools, **sample.chat_template_kwargs}
        expected = tokenizer.encode(training.prompt(sample), allow_special=True)
        assert template.encode(tokenizer, sample.messages, **kwargs) == expected
        whole = template.encode(tokenizer, [*sample.messages, sample.answer], add_generation_prompt=False, **kwargs)
        assert whole == tokenizer.encode(training.conversation(sample), allow_special=True)


def test_capabilities(shipped):
    assert shipped[1].capabilities == Capabilities(
        system=True,
        late_system=False,
        same_role_turns=True,
        tools=True,
        tool_syntax="json",
        parallel_tool_calls=True,
        thinking=True,
    )


def test_the_tokenizer_fits_the_model(shipped):
    shipped[0].check_fits(training.VOCAB_SIZE)
