"""From a request to token ids, and from token ids to events."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helexa_engine.errors import InvalidRequest
from helexa_engine.events import Collector, Finished, PromptProcessed
from helexa_engine.generate_request import GenerateRequest
from helexa_engine.sampling_params import SamplingParams, StructuredOutput
from helexa_engine.text.chat_template import ChatTemplate
from helexa_engine.text.request_processor import RequestProcessor
from helexa_engine.text.structured import GrammarCompiler

USER = [{"role": "user", "content": "hi"}]
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture(scope="module")
def processor(qwen2, tokenizer):
    template = ChatTemplate.from_gguf(qwen2.metadata, tokenizer)
    return RequestProcessor(tokenizer, template, {"temperature": 0.6, "top_k": 20})


def run(processor, text, *, chunk=1, end="<|im_end|>", reason="stop", logprobs=False, **kwargs):
    """What an engine that generates ``text`` makes of the request."""
    prepared = processor.prepare(GenerateRequest(**{"messages": USER} | kwargs))
    ids = processor.tokenizer.encode(text + end, allow_special=True)
    output, events = prepared.make_output(0), [PromptProcessed(prepared.prompt_token_ids)]
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        last = start + chunk >= len(ids)
        values = [processor.token_logprob(i, -0.5, [(i, -0.5)]) for i in part] if logprobs else []
        events += output.push(part, values, reason if last else None)
        if output.stop_hit:
            break
    collector = Collector(1, logprobs)
    for event in events:
        collector.push(event)
    assert sum(isinstance(event, Finished) for event in events) == 1 and isinstance(events[-1], Finished)
    return collector.result(), ids


def allowed(grammar, tokenizer):
    logits = np.zeros(tokenizer.vocab_size, np.float32)
    grammar.apply(logits)
    return logits == 0


def test_the_middle_between_prompt_and_suffix(processor, monkeypatch):
    tokenizer = processor.tokenizer
    names = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>", "<|file_sep|>"]
    request = GenerateRequest(prompt="def f(", suffix="):\n", echo=True)
    with pytest.raises(InvalidRequest, match=r"suffix: this model does not fill in the middle.*<\|fim_prefix\|>"):
        processor.prepare(request)
    assert not processor.capabilities()["fill_in_the_middle"]
    for token_id, name in enumerate(names, 100):
        monkeypatch.setitem(tokenizer._id_of_added, name, token_id)
    assert processor.capabilities()["fill_in_the_middle"]
    prepared = processor.prepare(request)
    expected = [100, *tokenizer.encode("def f("), 101, *tokenizer.encode("):\n"), 102]
    assert list(prepared.prompt_token_ids) == expected and prepared.prompt_text == "def f("
    assert {100, 101, 102, 103, 104} <= prepared.eos_token_ids
    assert processor.prepare(GenerateRequest(prompt="x")).eos_token_ids == frozenset(tokenizer.eos_token_ids)


def test_prompt_and_defaults(processor):
    prepared = processor.prepare(GenerateRequest(messages=USER, sampling_params=SamplingParams(top_k=5)))
    assert (
        processor.tokenizer.decode(prepared.prompt_token_ids)
        == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (prepared.params.temperature, prepared.params.top_k, prepared.params.top_p) == (0.6, 5, 1.0)
    assert prepared.eos_token_ids == frozenset(processor.tokenizer.eos_token_ids)
    assert prepared.prompt_text is None


def test_raw_prompts(processor):
    text = "a<|im_end|>"
    prepared = processor.prepare(GenerateRequest(prompt=text, echo=True))
    assert prepared.prompt_text == text and not set(prepared.prompt_token_ids) & set(processor.tokenizer.added_tokens)
    ids = processor.prepare(GenerateRequest(prompt=prepared.prompt_token_ids, echo=True))
    assert (ids.prompt_token_ids, ids.prompt_text) == (prepared.prompt_token_ids, text)
    result, _ = run(processor, f"<think>x</think>{CALL}", messages=None, prompt="a")
    assert (result.text, result.reasoning, result.tool_calls) == (f"<think>x</think>{CALL}", "", [])


def test_answer_with_everything(processor):
    result, ids = run(processor, f"<think>\nwhy 🦙\n</think>\n\nso\n{CALL}", tools=[TOOL], logprobs=True)
    assert (result.reasoning, result.text, result.finish_reason) == ("why 🦙", "so", "tool_calls")
    assert [(call.name, call.arguments) for call in result.tool_calls] == [("f", '{"a": 1}')]
    assert result.tool_calls[0].id.startswith("call_")
    assert result.token_ids == ids and [entry.token_id for entry in result.logprobs] == ids
    usage = result.completions[0].usage
    thought = processor.tokenizer.encode("<think>\nwhy 🦙\n</think>", allow_special=True)
    assert usage.completion_tokens == len(ids) and usage.reasoning_tokens == len(thought)
    assert b"".join(entry.token_bytes for entry in result.logprobs).decode().startswith("<think>\nwhy 🦙")


def test_cut_off_while_thinking(processor):
    result, ids = run(processor, "<think>\nbut then", end="", reason="length")
    assert (result.reasoning, result.text, result.finish_reason) == ("but then", "", "length")
    assert result.completions[0].usage.reasoning_tokens == len(ids)


def test_calls_are_text_without_tools_and_with_choice_none(processor):
    assert run(processor, CALL)[0].text == CALL
    assert run(processor, CALL, tools=[TOOL], tool_choice="none")[0].text == CALL


def test_without_calls_the_prompt_is_the_same_and_their_tag_is_barred(processor, tokenizer):
    auto, none = (
        processor.prepare(GenerateRequest(messages=USER, tools=[TOOL], tool_choice=choice))
        for choice in ("auto", "none")
    )
    assert none.prompt_token_ids == auto.prompt_token_ids
    assert (none.params.logit_bias, auto.params.logit_bias) == ({tokenizer.token_id("<tool_call>"): -100.0}, None)


def test_templates_are_probed_when_the_model_is_loaded(tokenizer, monkeypatch):
    template = ChatTemplate.for_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}", tokenizer)
    processor, renderings = RequestProcessor(tokenizer, template), []
    monkeypatch.setattr(template, "_run", lambda variables, *_: renderings.append(variables) or "x")
    for _ in range(2):
        processor.prepare(GenerateRequest(messages=USER))
    assert len(renderings) == 2


def test_stop_strings(processor):
    result, ids = run(processor, "one two three", sampling_params=SamplingParams(stop="o th"))
    completion = result.completions[0]
    assert (result.text, result.finish_reason, completion.stop_reason) == ("one tw", "stop", "o th")
    assert len(result.token_ids) < len(ids)
    prepared = processor.prepare(GenerateRequest(messages=USER, sampling_params=SamplingParams(stop="x")))
    output = prepared.make_output(0)
    output.push(processor.tokenizer.encode("axb"))
    assert output.stop_hit and output.push([1]) == []


def test_stop_token_is_no_text(processor):
    prepared = processor.prepare(GenerateRequest(messages=USER))
    ids = processor.tokenizer.encode("ab")
    stop = processor.tokenizer.encode("!")[0]
    finished = prepared.make_output(0).push([*ids, stop], finish_reason="stop", stop_token_id=stop)
    assert "".join(getattr(event, "text", "") for event in finished) == "ab"
    assert finished[-1].stop_reason == stop and finished[-1].usage.completion_tokens == len(ids) + 1


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(["<think>", "</think>", CALL, "🦙", "\n", "one ", "st", "op", "<tool_call>", "{"]), max_size=8
    ).map("".join),
    st.integers(1, 7),
)
def test_streamed_equals_whole(processor, text, chunk):
    def answer(chunk):
        result, _ = run(processor, text, chunk=chunk, tools=[TOOL], sampling_params=SamplingParams(stop="stop"))
        calls = [(call.name, call.arguments) for call in result.tool_calls]
        return result.text, result.reasoning, calls, result.finish_reason

    assert answer(1) == answer(10**6) == answer(chunk)


@pytest.mark.parametrize(("kwargs", "thinking"), [({}, "may_open"), ({"enable_thinking": False}, "no")])
def test_thinking_is_read_off_the_prompt(processor, kwargs, thinking):
    prepared = processor.prepare(
        GenerateRequest(messages=[{"role": "user", "content": "<think>"}], chat_template_kwargs=kwargs)
    )
    assert processor.thinking(prepared.prompt_token_ids) == thinking


def test_template_that_opens_the_think_block(tokenizer):
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n<think>\n"
    opens = RequestProcessor(tokenizer, ChatTemplate.for_tokenizer(template, tokenizer))
    result, _ = run(opens, "why\n</think>\n\nso")
    assert (result.reasoning, result.text) == ("why", "so")


def test_grammars(processor):
    compiler = GrammarCompiler(processor.tokenizer)
    schema = StructuredOutput(json_schema={"type": "object"})
    prepared = processor.prepare(GenerateRequest(messages=USER, sampling_params=SamplingParams(structured=schema)))
    make = compiler.maker(prepared.constraint)
    assert make() is not make()
    for choice in ("required", {"name": "f"}, {"type": "function", "function": {"name": "f"}}):
        asked = GenerateRequest(messages=USER, tools=[TOOL], tool_choice=choice)
        assert processor.prepare(asked).constraint.rules is not None
    both = GenerateRequest(
        messages=USER, tools=[TOOL], tool_choice="required", sampling_params=SamplingParams(structured=schema)
    )
    opening = allowed(compiler.maker(processor.prepare(both).constraint)(), processor.tokenizer)
    assert opening[processor.tokenizer.token_id("<tool_call>")] and not opening[processor.tokenizer.encode("{")[0]]
    for free in (GenerateRequest(messages=USER, tools=[TOOL]), GenerateRequest(prompt="a")):
        constraint = processor.prepare(free).constraint
        grammar = None if constraint is None else compiler.maker(constraint)()
        assert grammar is None or (not grammar.is_finished() and allowed(grammar, processor.tokenizer).all())


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"prompt": ""}, "empty prompt"),
        ({"prompt": [10**9]}, r"prompt\[0\]"),
        ({"messages": USER, "tool_choice": "required"}, "there are no tools"),
        ({"messages": USER, "tool_choice": "sometimes"}, "tool_choice"),
        ({"messages": USER, "tools": [TOOL], "tool_choice": {"name": "g"}}, "'g'"),
        ({"messages": USER, "tools": [{"type": "function"}]}, r"tools\[0\].function.name"),
        ({"messages": USER, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        (
            {"messages": USER, "sampling_params": SamplingParams(structured=StructuredOutput(json_schema="{"))},
            "structured.json_schema",
        ),
    ],
)
def test_bad_requests(processor, kwargs, words):
    with pytest.raises(InvalidRequest, match=words):
        processor.prepare(GenerateRequest(**kwargs))


def test_models_without_template_or_without_tools(tokenizer):
    with pytest.raises(InvalidRequest, match="no chat template"):
        RequestProcessor(tokenizer).prepare(GenerateRequest(messages=USER))
    plain = RequestProcessor(tokenizer, ChatTemplate.for_tokenizer("{{ messages[0].content }}", tokenizer))
    with pytest.raises(InvalidRequest, match="no place for tools"):
        plain.prepare(GenerateRequest(messages=USER, tools=[TOOL]))
    assert plain.prepare(GenerateRequest(messages=USER, tools=[TOOL], tool_choice="none")).params.logit_bias is None


def test_imports_stay_light():
    heavy = "{'tokenizers', 'jinja2', 'llguidance', 'torch'}"
    code = f"import sys, helexa_engine.text.request_processor as _; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_the_last_message_is_found_in_the_prompt(processor):
    def begins_with(messages, **kwargs):
        prepared = processor.prepare(GenerateRequest(messages=messages, **kwargs))
        assert prepared.last_message_start is not None
        return processor.tokenizer.decode(prepared.prompt_token_ids[prepared.last_message_start :])

    turns = [*USER, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "<|im_start|>user\nbye"}]
    assert begins_with(turns).startswith("<|im_start|>user\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant")
    assert begins_with(turns[:2], add_generation_prompt=False).startswith("<|im_start|>assistant\n")
    asks = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    answered = [*USER, asks, {"role": "tool", "tool_call_id": "c", "content": "done"}]
    assert "done" in begins_with(answered) and "hi" not in begins_with(answered)


def test_a_prompt_without_visible_messages_has_no_last_one(processor, tokenizer):
    assert processor.prepare(GenerateRequest(prompt="hi")).last_message_start is None
    plain = RequestProcessor(tokenizer, ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}"))
    assert plain.prepare(GenerateRequest(messages=USER)).last_message_start is None
