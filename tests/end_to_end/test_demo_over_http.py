"""``helexa serve demo``, asked by the openai client: everything from the file to the words, in one process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from helexa_engine.demo.conversations import CLAIMED, SKILLS, held_out
from helexa_engine.demo.over_http import Answer, answer, ask, wrong_answers
from helexa_engine.demo.sample import Sample


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """URL of a server of its own process that is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-m", "helexa_engine", "serve", "demo", "--port", str(port)], env=environment
    )
    try:
        deadline = time.monotonic() + 120
        while not is_ready(url):
            assert process.poll() is None, "the server ended before it was ready"
            assert time.monotonic() < deadline, "the server never got ready"
            time.sleep(0.2)
        yield url
        process.terminate()
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=120)


def streamed_answer(client: openai.OpenAI, sample: Sample) -> Answer:
    text, reasoning, calls = "", "", []
    for chunk in ask(client, sample, stream=True):
        delta = chunk.choices[0].delta
        text += delta.content or ""
        reasoning += getattr(delta, "reasoning_content", None) or ""
        for call in delta.tool_calls or ():
            if call.id:
                calls.append([call.function.name, ""])
            calls[call.index][1] += call.function.arguments or ""
    return text, [(name, arguments) for name, arguments in calls], reasoning


@pytest.mark.parametrize("skill", SKILLS)
def test_streamed_answer_equals_the_whole(client: openai.OpenAI, skill: str) -> None:
    for sample in held_out(skill, 3, seed=2):
        assert streamed_answer(client, sample) == answer(client, sample)


@pytest.mark.parametrize("skill", CLAIMED)
def test_claimed_skills_hold_over_http(client: openai.OpenAI, skill: str) -> None:
    n = 100
    wrong = wrong_answers(client, held_out(skill, n, seed=23))
    print(f"| {skill} | {1 - len(wrong) / n:.0%} | {n} |")
    assert len(wrong) <= n // 10, wrong


def test_json_on_request(client: openai.OpenAI) -> None:
    """The grammar holds whatever the model would rather say."""
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "What is helexa?"}],
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},  # type: ignore[arg-type]
    )
    person = json.loads(answer.choices[0].message.content or "")
    assert set(person) == {"name", "age"} and isinstance(person["age"], int)


def test_tokens_round_trip_and_prompt_echo(client: openai.OpenAI, server: str) -> None:
    text = "Hello, wörld 🙂 <|im_end|>"
    tokens = httpx.post(f"{server}/tokenize", json={"prompt": text}).json()["tokens"]
    assert httpx.post(f"{server}/detokenize", json={"tokens": tokens}).json()["prompt"] == text
    echoed = client.completions.create(model="demo", prompt=text, echo=True, max_tokens=1, logprobs=1, temperature=0)
    choice = echoed.choices[0]
    assert choice.text.startswith(text) and echoed.usage is not None
    assert echoed.usage.prompt_tokens == len(tokens)
    assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    assert len(choice.logprobs.token_logprobs) == len(tokens) + 1 and choice.logprobs.token_logprobs[0] is None
    assert all(value is not None and value <= 0 for value in choice.logprobs.token_logprobs[1:])


def test_a_prompt_over_the_context(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="prompt is too long") as caught:
        client.completions.create(model="demo", prompt="word " * 40_000)
    assert caught.value.code == "context_length_exceeded"
    body: Any = caught.value.body
    assert body["prompt_len"] > body["max"]


# -- The same model through the other wires

GREETING = "What is helexa?"
GREEDY = {"temperature": 0}  # in the body: not every major of the anthropic client has a word for it
TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Tells the weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture(scope="module")
def claude(server: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server, api_key="none", max_retries=0, timeout=120)


def test_every_wire_gives_the_same_words(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    """One question, three wire formats, streamed and not: the same prompt, so the same greedy answer."""
    messages: Any = [{"role": "user", "content": GREETING}]
    chat = client.chat.completions.create(
        model="demo",
        messages=messages,
        temperature=0,
        max_tokens=60,
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
    )
    response = client.responses.create(
        model="demo", input=GREETING, temperature=0, max_output_tokens=60, reasoning={"effort": "none"}
    )
    message = claude.messages.create(model="demo", messages=messages, max_tokens=60, extra_body=GREEDY)
    words = chat.choices[0].message.content
    assert words and response.output_text == words and message.content[0].text == words
    assert chat.usage is not None and response.usage is not None
    counted = claude.messages.count_tokens(model="demo", messages=messages).input_tokens
    assert counted == chat.usage.prompt_tokens == response.usage.input_tokens
    assert counted == message.usage.input_tokens + message.usage.cache_read_input_tokens
    with claude.messages.stream(model="demo", messages=messages, max_tokens=60, extra_body=GREEDY) as stream:
        assert stream.get_final_text() == words
    with client.responses.stream(
        model="demo", input=GREETING, temperature=0, max_output_tokens=60, reasoning={"effort": "none"}
    ) as answer:
        assert answer.get_final_response().output_text == words


def test_a_forced_call_and_its_result_through_each_wire(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    """A tool round trip: the grammar makes the call, its result is read, and count_tokens is exact with tools too."""
    question: Any = {"role": "user", "content": "How is the weather in Oslo?"}
    response = client.responses.create(
        model="demo", input=[question], tools=[TOOL], tool_choice="required", max_output_tokens=200, temperature=0
    )
    (call,) = [item for item in response.output if item.type == "function_call"][:1]
    assert call.name == "get_weather" and "city" in json.loads(call.arguments)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain, 7 degrees."}
    after = client.responses.create(
        model="demo", input=[question, *response.output, result], tools=[TOOL], max_output_tokens=60, temperature=0
    )
    assert after.usage is not None and response.usage is not None
    assert after.output and after.usage.input_tokens > response.usage.input_tokens

    tool = {"name": TOOL["name"], "description": TOOL["description"], "input_schema": TOOL["parameters"]}
    ask: Any = {"model": "demo", "tools": [tool]}
    with claude.messages.stream(
        **ask, messages=[question], tool_choice={"type": "any"}, max_tokens=200, extra_body=GREEDY
    ) as stream:
        message = stream.get_final_message()
    use = next(block for block in message.content if block.type == "tool_use")
    assert use.name == "get_weather" and "city" in use.input and message.stop_reason == "tool_use"
    turns: Any = [
        question,
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "Rain, 7 degrees."}]},
    ]
    answered = claude.messages.create(**ask, messages=turns, max_tokens=60, extra_body=GREEDY)
    counted = claude.messages.count_tokens(**ask, messages=turns).input_tokens
    assert counted == answered.usage.input_tokens + answered.usage.cache_read_input_tokens


def test_every_wire_says_how_much_of_the_prompt_was_reused(
    client: openai.OpenAI, claude: anthropic.Anthropic, server: str
) -> None:
    """A page holds 64 tokens; the last token of a prompt is always computed."""
    question = " ".join(f"Is {i} more than {i // 2}?" for i in range(40))
    messages: Any = [{"role": "user", "content": question}]
    first, second = (
        client.chat.completions.create(model="demo", messages=messages, max_tokens=2).usage for _ in range(2)
    )
    assert first is not None and second is not None and first.prompt_tokens_details and second.prompt_tokens_details
    cached = (second.prompt_tokens - 1) // 64 * 64
    assert cached >= 128
    assert first.prompt_tokens_details.cached_tokens == 0 and second.prompt_tokens_details.cached_tokens == cached
    said = client.responses.create(model="demo", input=question, max_output_tokens=2).usage
    assert said is not None and said.input_tokens_details.cached_tokens == cached
    usage = claude.messages.create(model="demo", messages=messages, max_tokens=2).usage
    assert usage.cache_read_input_tokens == cached and usage.input_tokens == second.prompt_tokens - cached
    metrics = httpx.get(f"{server}/metrics").text.splitlines()
    hits = next(float(line.split()[-1]) for line in metrics if line.startswith("vllm:prefix_cache_hits_total"))
    assert hits >= 3 * cached
