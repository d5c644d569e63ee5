"""Facts that the prompt states: asked for again (recall), or written as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .sample import Message, Sample, assistant, user
from .small_talk import chat
from .writer import ANIMALS, CODES, THINGS, Writer, plain_sample

UNTOLD = "You have not told me that yet."


@dataclass(frozen=True)
class _Fact:
    """``key`` says what is asked, so that two facts never answer the same question."""

    key: str
    statement: str
    questions: tuple[str, ...]
    answer: str
    value: str


def _own_fact(w: Writer, kind: str) -> _Fact:
    """A fact that the user tells about himself or herself."""
    if kind == "name":
        v = w.name()
        said = w.choose([f"My name is {v}.", f"I am {v}.", f"Call me {v}.", f"I'm {v}.", f"My name's {v}."])
        return _Fact(
            kind,
            said,
            ("What is my name?", "Who am I?", "Do you know my name?", "What's my name?"),
            f"Your name is {v}.",
            v,
        )
    if kind == "city":
        v = w.city()
        said = w.choose([f"I live in {v}.", f"My home is in {v}.", f"I live in the city of {v}."])
        return _Fact(
            kind, said, ("Where do I live?", "In which city do I live?", "Where is my home?"), f"You live in {v}.", v
        )
    if kind == "colour":
        v = w.word("colour")
        said = w.choose([f"My favourite colour is {v}.", f"I like the colour {v}.", f"My favorite color is {v}."])
        asked = ("What is my favourite colour?", "Which colour do I like?", "What is my favorite color?")
        return _Fact(kind, said, asked, f"Your favourite colour is {v}.", v)
    if kind == "age":
        v = str(w.rng.randint(5, 99))
        said = w.choose([f"I am {v} years old.", f"I'm {v} years old.", f"My age is {v}."])
        return _Fact(kind, said, ("How old am I?", "What is my age?"), f"You are {v} years old.", v)
    if kind == "job":
        v = w.word("job")
        said = w.choose([f"I work as a {v}.", f"My job is {v}.", f"I am a {v}."])
        return _Fact(
            kind,
            said,
            ("What is my job?", "What do I do for a living?", "What do I work as?"),
            f"You work as a {v}.",
            v,
        )
    if kind == "food":
        v = w.word("food")
        said = w.choose([f"I like {v}.", f"My favourite food is {v}.", f"I love {v}."])
        return _Fact(
            kind,
            said,
            ("What food do I like?", "What do I like to eat?", "What is my favourite food?"),
            f"You like {v}.",
            v,
        )
    animal = kind
    v = w.name()
    said = w.choose(
        [f"My {animal} is called {v}.", f"I have a {animal} called {v}.", f"The name of my {animal} is {v}."]
    )
    asked = (f"What is my {animal} called?", f"What is the name of my {animal}?", f"What is my {animal}'s name?")
    return _Fact(animal, said, asked, f"Your {animal} is called {v}.", v)


def _other_fact(w: Writer, who: str, kind: str) -> _Fact:
    """A fact about another person."""
    key = f"{who} {kind}"
    if kind == "city":
        v = w.city()
        said = w.choose([f"{who} lives in {v}.", f"{who}'s home is in {v}."])
        return _Fact(
            key, said, (f"Where does {who} live?", f"In which city does {who} live?"), f"{who} lives in {v}.", v
        )
    if kind == "age":
        v = str(w.rng.randint(5, 99))
        return _Fact(
            key,
            f"{who} is {v} years old.",
            (f"How old is {who}?", f"What is the age of {who}?"),
            f"{who} is {v} years old.",
            v,
        )
    if kind == "job":
        v = w.word("job")
        said = w.choose([f"{who} works as a {v}.", f"{who} is a {v}."])
        return _Fact(
            key,
            said,
            (f"What is the job of {who}?", f"What does {who} work as?", f"What does {who} do?"),
            f"{who} works as a {v}.",
            v,
        )
    if kind == "food":
        v = w.word("food")
        return _Fact(
            key, f"{who} likes {v}.", (f"What does {who} like?", f"What food does {who} like?"), f"{who} likes {v}.", v
        )
    v = w.name([who])
    said = w.choose([f"{who}'s sister is {v}.", f"{who} has a sister called {v}."])
    return _Fact(
        key, said, (f"Who is {who}'s sister?", f"What is the name of {who}'s sister?"), f"{who}'s sister is {v}.", v
    )


def _thing_fact(w: Writer, kind: str) -> _Fact:
    """A fact about a thing: where it is, or a number to remember."""
    if kind in THINGS:
        v = w.word("place")
        asked = (f"Where is the {kind}?", f"Where did I put the {kind}?", f"Where can I find the {kind}?")
        said = w.choose([f"The {kind} is in the {v}.", f"I put the {kind} in the {v}."])
        return _Fact(kind, said, asked, f"The {kind} is in the {v}.", v)
    v = w.made_up().lower() if kind == "password" else w.number()
    said = w.choose([f"The {kind} is {v}.", f"My {kind} is {v}."])
    return _Fact(
        kind, said, (f"What is the {kind}?", f"What is my {kind}?", f"Tell me the {kind}."), f"The {kind} is {v}.", v
    )


def _facts(w: Writer) -> list[_Fact]:
    """One to five facts with different questions."""
    n = w.choose([1, 2, 2, 3, 3, 4])
    style = w.choose(["own", "others", "things", "mixed"])
    people: list[str] = []
    for _ in range(w.rng.randint(1, 3)):
        people.append(w.name(people))
    makers: list[Callable[[], _Fact]] = []
    if style in ("own", "mixed"):
        kinds = ["name", "city", "colour", "age", "job", "food", w.choose(ANIMALS)]
        makers += [lambda k=k: _own_fact(w, k) for k in w.rng.sample(kinds, len(kinds))]  # type: ignore[misc]
    if style in ("others", "mixed"):
        same = w.choose(["city", "age", "job", "food", "sister"]) if w.chance(0.5) else None
        for who in people:
            kinds = [same] if same else w.rng.sample(["city", "age", "job", "food", "sister"], 2)
            makers += [lambda who=who, k=k: _other_fact(w, who, k) for k in kinds]  # type: ignore[misc]
    if style in ("things", "mixed"):
        makers += [lambda k=k: _thing_fact(w, k) for k in w.rng.sample(THINGS + CODES, 5)]  # type: ignore[misc]
    w.rng.shuffle(makers)
    facts: list[_Fact] = []
    for make in makers[:n]:
        fact = make()
        if fact.value not in [f.value for f in facts]:
            facts.append(fact)
    return facts


def recall(w: Writer, thinking: bool = False) -> Sample:
    facts = _facts(w)
    told = " ".join(f.statement for f in facts)
    lead = w.choose(["", "", "", "Remember this: "])
    asked = w.rng.sample(facts, min(len(facts), w.choose([1, 2, 3])))
    messages: list[Message] = []
    if w.chance(0.5):
        own_name = [f.value for f in facts if f.key == "name"]
        messages += [
            user(lead + told),
            assistant(f"Nice to meet you, {own_name[0]}." if own_name else "Thank you, I will remember that."),
        ]
        prefix = ""
        if w.chance(0.25):
            small_talk = chat(w)
            messages += [user(small_talk.messages[-1]["content"]), small_talk.answer]
    else:
        prefix = lead + told + w.choose([" ", "\n"])
    for i, fact in enumerate(asked):
        question = w.casual(w.choose(fact.questions)) if not prefix else w.choose(fact.questions)
        messages.append(user(prefix + question))
        prefix = ""
        reasoning = f"I was told: {fact.answer}" if thinking else ""
        if i + 1 < len(asked):
            messages.append(assistant(fact.answer))
        elif w.chance(0.08) and len(messages) > 1:
            known = {f.key for f in facts}
            missing = _own_fact(
                w,
                w.choose([k for k in ["name", "city", "colour", "age", "job", "food", "cat", "dog"] if k not in known]),
            )
            question = w.choose(missing.questions)
            messages[-1] = user(question)
            reasoning = "I was not told this." if thinking else ""
            return plain_sample(w, "recall", messages, UNTOLD, reasoning)
        else:
            return plain_sample(w, "recall", messages, fact.answer, reasoning)
    raise AssertionError("a recall sample asks at least one question")


def json_object(w: Writer, thinking: bool = False) -> Sample:
    who = w.name()
    if w.chance(0.25):
        things = w.words("fruit", w.rng.randint(2, 3))
        values: dict[str, Any] = {thing: w.rng.randint(1, 60) for thing in things}
        listed = [f"{count} {thing}" for thing, count in values.items()]
        told = (
            w.choose(["I need", "We have", "I bought", f"{who} has"])
            + " "
            + ", ".join(listed[:-1])
            + f" and {listed[-1]}."
        )
    else:
        facts: dict[str, tuple[Any, str]] = {"name": (who, f"{who} is here.")}
        age, city, job, food, colour = w.rng.randint(5, 99), w.city(), w.word("job"), w.word("food"), w.word("colour")
        first = w.chance(0.4)
        clauses = {
            "age": (age, f"I am {age} years old." if first else f"{who} is {age} years old."),
            "city": (city, f"I live in {city}." if first else f"{who} lives in {city}."),
            "job": (job, f"I work as a {job}." if first else f"{who} works as a {job}."),
            "food": (food, f"I like {food}." if first else f"{who} likes {food}."),
            "colour": (
                colour,
                f"My favourite colour is {colour}." if first else f"The favourite colour of {who} is {colour}.",
            ),
        }
        chosen = w.rng.sample(list(clauses), w.rng.randint(1, 3))
        facts |= {key: clauses[key] for key in chosen}
        sentences = [clauses[key][1] for key in chosen]
        if first:
            sentences.insert(0, w.choose([f"My name is {who}.", f"I am {who}."]))
        told = " ".join(sentences)
        keys = w.rng.sample(list(facts), w.rng.randint(min(2, len(facts)), len(facts)))
        values = {key: facts[key][0] for key in keys}
    names = list(values)
    listed_keys = ", ".join(names[:-1]) + w.choose([" and ", ", "]) + names[-1]
    request = w.choose(
        [
            f"Give me this as JSON with the keys {listed_keys}.",
            f"Answer in JSON with the keys {listed_keys}.",
            f"Return a JSON object with {listed_keys}.",
            f"Write this as a JSON object with the keys {listed_keys}.",
        ]
    )
    question = f"{told} {request}" if w.chance(0.7) else f"{request} {told}"
    reasoning = "The user wants JSON." if thinking else ""
    return plain_sample(w, "json", [user(question)], json.dumps(values, ensure_ascii=False), reasoning)
