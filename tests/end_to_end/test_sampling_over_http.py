"""Every sampling setting that HTTP clients are promised, by what it does to the demo model's answers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from helexa_engine.config import EngineConfig
from helexa_engine.runtime.async_engine import AsyncEngine
from tests.server.live import Live, live_server

MESSAGES = [{"role": "user", "content": "What is helexa?"}]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    engine = AsyncEngine("demo", EngineConfig(max_model_len=1024))
    with live_server(engine) as live:
        yield live
    asyncio.run(engine.aclose())


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return live.openai(timeout=120)


@pytest.fixture(scope="module")
def end_token(live: Live) -> int:
    """The id of the token that ends a turn."""
    engine: Any = live.model.engine
    return int(engine.tokenizer.eos_token_ids[0])


def ask(client: openai.OpenAI, **options: Any) -> Any:
    fixed = {"model": "fake", "messages": MESSAGES, "reasoning_effort": "none", "temperature": 0, "max_tokens": 24}
    return client.chat.completions.create(**fixed | options)


def texts(answer: Any) -> list[str]:
    return [choice.message.content for choice in answer.choices]


def complete(client: openai.OpenAI, **options: Any) -> Any:
    return client.completions.create(
        **{"model": "fake", "prompt": "What", "temperature": 0, "max_tokens": 12} | options
    )


def test_temperature_zero_is_the_likeliest_and_top_k_and_top_p_and_min_p_come_down_to_it(client: openai.OpenAI) -> None:
    greedy = texts(ask(client))
    hot = {"temperature": 5.0, "seed": 1}
    assert texts(ask(client, **hot)) != greedy
    assert texts(ask(client, **hot, extra_body={"top_k": 1})) == greedy
    assert texts(ask(client, **hot, extra_body={"min_p": 1.0})) == greedy
    assert texts(ask(client, **hot, top_p=1e-6)) == greedy
    assert texts(ask(client, **hot, extra_body={"top_k": -1})) == texts(ask(client, **hot, extra_body={"top_k": 0}))


def test_n_answers_differ_and_the_seed_repeats_them(client: openai.OpenAI) -> None:
    several = ask(client, n=3, seed=11, temperature=5.0)
    assert [choice.index for choice in several.choices] == [0, 1, 2] and len(set(texts(several))) > 1
    assert texts(ask(client, n=3, seed=11, temperature=5.0)) == texts(several)
    assert texts(ask(client, n=1, seed=11, temperature=5.0)) == texts(several)[:1]
    assert texts(ask(client, n=3, seed=12, temperature=5.0)) != texts(several)
    assert several.usage.completion_tokens > several.usage.prompt_tokens_details.cached_tokens


def test_logprobs(client: openai.OpenAI) -> None:
    choice = ask(client, logprobs=True, top_logprobs=3).choices[0]
    content = choice.logprobs.content
    assert b"".join(bytes(item.bytes) for item in content).decode().startswith(choice.message.content)
    for item in content:
        likeliest = item.top_logprobs[0]
        assert len(item.top_logprobs) == 3 and (likeliest.token, likeliest.logprob) == (item.token, item.logprob)
        assert all(a.logprob >= b.logprob for a, b in zip(item.top_logprobs, item.top_logprobs[1:], strict=False))
        assert sum(math.exp(other.logprob) for other in item.top_logprobs) <= 1.0001
    bare = ask(client, logprobs=True).choices[0].logprobs.content
    assert [(item.token, item.logprob, item.top_logprobs) for item in bare] == [
        (i.token, i.logprob, []) for i in content
    ]
    assert ask(client).choices[0].logprobs is None
    streamed = [
        item
        for chunk in ask(client, logprobs=True, top_logprobs=3, stream=True)
        for item in chunk.choices[0].logprobs.content
    ]
    assert streamed == content


def test_logit_bias_forbids_and_forces(client: openai.OpenAI, live: Live) -> None:
    engine: Any = live.model.engine
    first = ask(client, logprobs=True, max_tokens=1).choices[0].logprobs.content[0]
    [token_id] = engine.tokenizer.encode(first.token)
    barred = ask(client, logprobs=True, max_tokens=1, logit_bias={str(token_id): -100}).choices[0].logprobs.content[0]
    assert barred.token != first.token
    [word] = engine.tokenizer.encode("a")
    assert set(texts(ask(client, logit_bias={str(word): 100}, max_tokens=5))[0]) == {"a"}
    with pytest.raises(openai.BadRequestError, match="outside the vocabulary"):
        ask(client, logit_bias={str(engine.model_info.vocab_size): 1})


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_penalties_keep_from_repeating(client: openai.OpenAI, penalty: str) -> None:
    """Past its end of turn a small greedy model repeats itself, unless that has a price."""
    on = {"ignore_eos": True, "max_tokens": 200}
    plain = texts(ask(client, extra_body=on))[0]
    penalised = texts(ask(client, extra_body=on | {penalty: 1.9}))[0]
    assert len(set(penalised)) > len(set(plain))
    with pytest.raises(openai.BadRequestError, match=penalty):
        ask(client, extra_body={penalty: -7})


def test_stop_strings_and_stop_tokens(client: openai.OpenAI, live: Live) -> None:
    whole = texts(ask(client))[0]
    stop = whole[4:7]
    choice = ask(client, stop=["never said", stop]).choices[0]
    assert choice.message.content == whole[: whole.index(stop)] and choice.finish_reason == "stop"
    assert choice.stop_reason == stop
    assert texts(ask(client, stop=stop))[0] == whole[: whole.index(stop)]
    engine: Any = live.model.engine
    ids = engine.tokenizer.encode(whole)
    ended = ask(client, extra_body={"stop_token_ids": [ids[2]]}).choices[0]
    assert ended.finish_reason == "stop" and ended.stop_reason == ids[2]
    assert ended.message.content == engine.tokenizer.decode(ids[: ids.index(ids[2])])


def test_ends_of_turn_are_ignored_or_put_off(client: openai.OpenAI, end_token: int) -> None:
    favoured = {"logit_bias": {str(end_token): 100}}
    ended = ask(client, **favoured)
    assert (ended.choices[0].finish_reason, ended.usage.completion_tokens) == ("stop", 1)
    ignored = ask(client, **favoured, extra_body={"ignore_eos": True}, max_tokens=9)
    assert (ignored.choices[0].finish_reason, ignored.usage.completion_tokens) == ("length", 9)
    put_off = ask(client, **favoured, extra_body={"min_tokens": 6})
    assert (put_off.choices[0].finish_reason, put_off.usage.completion_tokens) == ("stop", 7)
    with pytest.raises(openai.BadRequestError, match="min_tokens"):
        ask(client, extra_body={"min_tokens": 30})


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_most_tokens(client: openai.OpenAI, name: str) -> None:
    body = {"ignore_eos": True, "max_tokens": None}
    short = ask(client, extra_body=body | {name: 5})
    assert (short.usage.completion_tokens, short.choices[0].finish_reason) == (5, "length")
    clamped = ask(client, extra_body=body | {name: 10**6})
    assert clamped.usage.total_tokens == 1024
    rest = ask(client, extra_body=body)
    assert rest.usage.total_tokens == 1024


def test_completions_have_the_same_settings_and_score_the_prompt(client: openai.OpenAI) -> None:
    several = complete(
        client, n=2, seed=3, temperature=5.0, logprobs=2, echo=True, extra_body={"top_k": 40, "min_tokens": 2}
    )
    assert [choice.index for choice in several.choices] == [0, 1]
    for choice in several.choices:
        scores = choice.logprobs
        assert choice.text.startswith("What") and scores.token_logprobs[0] is None
        assert all(value <= 0 for value in scores.token_logprobs[1:])
        assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == len(scores.text_offset)
    assert complete(client, extra_body={"regex": "[xy]{3}"}).choices[0].text.strip("xy") == ""
