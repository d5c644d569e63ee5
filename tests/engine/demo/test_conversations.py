"""The generator behind the demo model: the same seed gives the same samples, and nothing held out is trained on."""

from __future__ import annotations

import itertools
import json
import re

import pytest

from helexa_engine.demo import writer
from helexa_engine.demo.conversations import SKILLS, held_out, training
from helexa_engine.demo.manual import TOPICS
from helexa_engine.demo.sample import Sample

PROBLEM = re.compile(r"So (\d+) ([+-]) (\d+) = (\d+)")
EQUATION = re.compile(r"(\d+(?: ?[+-] ?\d+)+) ?= ?(-?\d+)")


def own_answer(sample: Sample) -> tuple[str, list[tuple[str, str]], str]:
    calls = [call["function"] for call in sample.answer.get("tool_calls", ())]
    return (
        sample.answer["content"],
        [(call["name"], json.dumps(call["arguments"])) for call in calls],
        sample.answer.get("reasoning_content", ""),
    )


def words(question: str) -> str:
    """A question without what :meth:`casual` may change."""
    return question.lower().rstrip("?.! ")


@pytest.fixture(scope="module")
def trained() -> list[Sample]:
    return list(itertools.islice(training(seed=7), 4000))


def test_same_seed_same_samples() -> None:
    first = list(itertools.islice(training(seed=3), 200))
    assert first == list(itertools.islice(training(seed=3), 200))
    assert first != list(itertools.islice(training(seed=4), 200))
    for skill in SKILLS:
        assert held_out(skill, 20, seed=5) == held_out(skill, 20, seed=5)
        assert held_out(skill, 20, seed=5) != held_out(skill, 20, seed=6)


def test_training_covers_every_skill(trained: list[Sample]) -> None:
    assert {sample.skill for sample in trained} == set(SKILLS)


@pytest.mark.parametrize("skill", SKILLS)
def test_checker_accepts_the_answer_and_nothing_else(skill: str) -> None:
    for sample in held_out(skill, 60, seed=1):
        text, calls, reasoning = own_answer(sample)
        assert sample.check(text, calls, reasoning)
        assert not sample.check(text + " Or not.", calls, reasoning)
        assert not sample.check(text, [*calls, ("get_weather", "{}")], reasoning)
        assert not sample.check(text, calls, "" if reasoning else "Hm.")
        if calls:
            assert not sample.check(text, [], reasoning)
            assert not sample.check(text, [(calls[0][0], "{not JSON")], reasoning)
            assert sample.check(text, [(name, json.loads(arguments)) for name, arguments in calls], reasoning)


def test_checker_compares_json_by_value() -> None:
    sample = next(s for s in held_out("json", 10) if len(json.loads(s.answer["content"])) > 1)
    values = json.loads(sample.answer["content"])
    assert sample.check(json.dumps(dict(reversed(values.items())), indent=2))
    assert not sample.check(json.dumps(dict(itertools.islice(values.items(), 1))))
    assert not sample.check("not JSON")


def test_no_held_out_question_is_trained_on(trained: list[Sample]) -> None:
    seen = {json.dumps(sample.messages[-1]) for sample in trained if sample.messages[-1]["role"] == "user"}
    alone = {json.dumps(sample.messages) for sample in trained}
    for skill in SKILLS:
        for sample in held_out(skill, 200, seed=2):
            assert json.dumps(sample.messages) not in alone
            if skill == "helexa":
                assert json.dumps(sample.messages[-1]) not in seen


def test_no_held_out_problem_is_trained_on(trained: list[Sample]) -> None:
    def problems(samples: list[Sample]) -> set[tuple[str, int, int]]:
        text = "\n".join(
            str(m["content"]) for s in samples for m in [*s.messages, s.answer] if m["role"] == "assistant"
        )
        return {(op, *sorted((int(a), int(b)))) for a, op, b, _ in PROBLEM.findall(text)}  # type: ignore[misc]

    arithmetic = [s for s in trained if s.skill == "arithmetic"]
    unseen = problems(held_out("arithmetic", 300, seed=3))
    assert len(unseen) > 100
    assert not unseen & problems(arithmetic)


def test_arithmetic_is_right(trained: list[Sample]) -> None:
    """Every equation in an answer or in its working, column by column, adds up."""
    count = 0
    for sample in trained + held_out("arithmetic", 300) + held_out("thinking", 300):
        if sample.tools or sample.skill not in ("arithmetic", "thinking"):
            continue
        text = f"{sample.answer.get('reasoning_content', '')} {sample.answer['content']}"
        for left, right in EQUATION.findall(text):
            first, *rest = re.findall(r"[+-]|\d+", left)
            total = int(first)
            for sign, number in zip(rest[::2], rest[1::2], strict=True):
                total += int(number) if sign == "+" else -int(number)
            assert total == int(right), text
            count += 1
    assert count > 1000


def test_names_and_words_of_the_splits_are_disjoint(trained: list[Sample]) -> None:
    text = " ".join(str(m["content"]) for s in trained for m in s.messages)
    for word in itertools.chain(*writer.UNSEEN.values()):
        assert not re.search(rf"\b{word}\b", text), word
    for name in writer.NAMES + writer.CITIES:
        if writer.is_held_out(name):
            assert not re.search(rf"\b{name}\b", text), name


def test_wordings_about_helexa_are_disjoint() -> None:
    topic_of: dict[str, str] = {}
    for key, topic in TOPICS.items():
        for question in topic.ways_to_ask()[0]:
            assert topic_of.setdefault(words(question), key) == key, question
    for key, topic in TOPICS.items():
        unseen = topic.ways_to_ask()[1]
        assert len(unseen) >= 5, key
        for question in unseen:
            assert words(question) not in topic_of, question
