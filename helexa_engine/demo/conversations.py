"""The conversations the demo model is trained and judged on, written by a seeded generator.

Every sample states the question, the answer and what counts as right, so the same objects train the model, fill the accuracy
table and test the engine end to end. Training and held-out samples never share an arithmetic problem, a name, a city or a
made-up word, nor a wording of a question about helexa: membership is a checksum of the thing itself (:func:`is_held_out`).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

from .manual import TOPICS

Split = Literal["train", "held_out"]
Message = dict[str, Any]

#: Share of the training conversations that each skill leads.
SKILLS: dict[str, float] = {
    "helexa": 0.08,
    "recall": 0.24,
    "arithmetic": 0.15,
    "tool_call": 0.16,
    "tool_answer": 0.08,
    "thinking": 0.12,
    "json": 0.14,
    "chat": 0.03,
}

#: Skills that the shipped file answers rightly on at least 90 % of held-out samples: what may be promised and tested.
CLAIMED: tuple[str, ...] = ("helexa",)

UNKNOWN = "I am a small demo model, so I do not know that. Ask me about helexa, or give me the facts."
UNTOLD = "You have not told me that yet."
CANNOT_CALCULATE = "I am a small demo model: I only add and subtract numbers up to 50."


@dataclass(frozen=True)
class Sample:
    """One question with its answer.

    Attributes:
        skill: a key of :data:`SKILLS`.
        messages: the prompt, in OpenAI's shape; it ends with a user or a tool message.
        answer: the assistant message that should follow: ``content``, and ``reasoning_content`` or ``tool_calls`` where there are any.
        tools: tools in OpenAI's shape, or none.
        chat_template_kwargs: template variables, ``enable_thinking`` where the answer starts with a think block.
        accepted: other answers in words that are as good as the one given.
    """

    skill: str
    messages: list[Message]
    answer: Message
    tools: list[dict[str, Any]] = field(default_factory=list)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    accepted: tuple[str, ...] = ()

    def check(
        self, answer_text: str, tool_calls: Sequence[tuple[str, str | Mapping[str, Any]]] = (), reasoning: str = ""
    ) -> bool:
        """Whether an answer is right.

        Words must be one of the accepted sentences, JSON must equal the expected value, a tool call needs the right name and
        arguments (given as JSON text or decoded). There must be reasoning exactly when thinking is enabled.
        """
        if bool(reasoning.strip()) != bool(self.chat_template_kwargs.get("enable_thinking")):
            return False
        try:
            calls = [(name, json.loads(a) if isinstance(a, str) else dict(a)) for name, a in tool_calls]
            if calls != [
                (c["function"]["name"], c["function"]["arguments"]) for c in self.answer.get("tool_calls", ())
            ]:
                return False
            text, expected = answer_text.strip(), str(self.answer["content"])
            if expected.startswith("{"):
                return bool(json.loads(text) == json.loads(expected))
        except ValueError:
            return False
        return text == expected or text in self.accepted


def is_held_out(*facts: object) -> bool:
    """Whether something is kept for evaluation: true for a fixed eighth of all things, by checksum."""
    return zlib.crc32("|".join(map(str, facts)).encode()) % 8 == 0


def held_out(skill: str, n: int, seed: int = 0) -> list[Sample]:
    """``n`` samples of a skill, each about something that no training conversation contains. Raises KeyError for an unknown skill."""
    rng = Random(f"held out {skill} {seed}")
    samples: list[Sample] = []
    while len(samples) < n:
        writer = _Writer(rng, "held_out")
        sample = _WRITERS[skill](writer)
        text = " ".join(str(message["content"]) for message in sample.messages)
        if any(thing in text for thing in writer.unseen):
            samples.append(sample)
    return samples


def training(seed: int, weights: Mapping[str, float] | None = None) -> Iterator[Sample]:
    """Endless training samples, the same for the same seed. ``weights`` replaces the shares of :data:`SKILLS`."""
    rng = Random(f"train {seed}")
    shares = dict(weights or SKILLS)
    while True:
        writer = _Writer(rng, "train")
        sample = _WRITERS[rng.choices(list(shares), list(shares.values()))[0]](writer)
        while rng.random() < 0.3:
            sample = _continue(writer, sample)
        yield sample


# Words. Lists are split by checksum; made-up words make the supply of both splits endless, so that copying is learnt and not a list.

NAMES = (
    "Anna Boris Clara David Elena Felix Greta Hugo Irene Jonas Karin Leon Maria Nils Olga Paul Rosa Simon Tanya Victor Wanda Yusuf Zoe "
    "Amir Bella Carlos Dana Emil Fatima Georg Hanna Ivan Julia Kofi Laura Mehmet Nadia Oscar Priya Rafael Sara Tomas Uma Vera Walter Xenia "
    "Yara Ben Chloe Diego Eva Frank Gina Henry Ida Jack Kate Liam Mia Noah Olivia Peter Quinn Ruth Sam Tina Ulrich "
    "Alice Bob Carol Dora Erik Fiona"
).split()
CITIES = (
    "Oslo Rome Paris Berlin Madrid Lisbon Vienna Prague Athens Dublin London Warsaw Helsinki Zurich Geneva Munich Hamburg Milan Naples "
    "Tokyo Osaka Kyoto Seoul Beijing Delhi Mumbai Cairo Lagos Nairobi Accra Lima Quito Bogota Santiago Havana Toronto Boston "
    "Chicago Denver Seattle Austin Dallas Miami Sydney Perth Auckland Dubai Istanbul Ankara Riga Tallinn Vilnius Krakow "
    "Budapest Sofia Porto Seville"
).split()
COLOURS = "red blue green yellow orange purple black white brown pink grey violet turquoise silver".split()
JOBS = (
    "teacher baker doctor pilot nurse farmer painter lawyer driver cook gardener plumber singer writer carpenter chemist dentist tailor "
    "sailor librarian mechanic photographer engineer waiter"
).split()
ANIMALS = "dog cat horse parrot rabbit hamster goat".split()
FOODS = "pizza soup rice pasta salad bread cheese apples chocolate noodles pancakes curry fish beans".split()
THINGS = "key book phone wallet map ticket lamp umbrella camera letter hammer guitar".split()
PLACES = "kitchen garden garage cellar attic office hall drawer cupboard car bathroom library".split()
CODES = "door code|safe code|room number|ticket number|password|order number|gate code|flight number".split("|")
FRUITS = "apples pears plums cherries oranges bananas nuts eggs coins books pens stamps cards marbles".split()
ONSETS = "b c d f g h j k l m n p r s t v w z br dr gr kr pl st tr sh".split()
VOWELS = "a e i o u ai ea ou".split()
CODAS = ["", "", "", "n", "r", "l", "s", "m", "k", "x"]

#: Words that stand in for those of the lists above in held-out samples.
UNSEEN: dict[str, list[str]] = {
    "colour": "golden crimson beige maroon".split(),
    "job": "judge poet florist barber miner surgeon".split(),
    "food": "cake stew toast lentils mushrooms omelettes".split(),
    "place": "bedroom balcony basement studio workshop".split(),
    "fruit": "lemons grapes peaches stones candles spoons".split(),
}
SEEN = {"colour": COLOURS, "job": JOBS, "food": FOODS, "place": PLACES, "fruit": FRUITS}


class _Writer:
    """Draws everything that a sample needs, from one split."""

    def __init__(self, rng: Random, split: Split) -> None:
        self.rng, self.split = rng, split
        self.unseen: list[str] = []  #: what training never shows; "" where it is not one word of the prompt

    def belongs(self, *facts: object) -> bool:
        return is_held_out(*facts) == (self.split == "held_out")

    def words(self, kind: str, n: int) -> list[str]:
        """Different words of a kind, real or made up: a model that sees only a list learns the list, not to copy."""
        chosen: list[str] = []
        while len(chosen) < n:
            if self.chance(0.5):
                word = str(self.choose((SEEN if self.split == "train" else UNSEEN)[kind]))
            else:
                word = str(self.drawn(lambda: self.made_up().lower() + ("s" if kind == "fruit" else "")))
            if word not in chosen:
                chosen.append(word)
        self.unseen += chosen
        return chosen

    def word(self, kind: str) -> str:
        return self.words(kind, 1)[0]

    def choose(self, options: Sequence[Any]) -> Any:
        return self.rng.choice(options)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def drawn(self, draw: Callable[[], Any], used: Sequence[Any] = ()) -> Any:
        """The first draw that belongs to this split and was not used."""
        while True:
            value = draw()
            if self.belongs(value) and value not in used:
                self.unseen.append(str(value))
                return value

    def made_up(self) -> str:
        syllables = (
            self.choose(ONSETS) + self.choose(VOWELS) + self.choose(CODAS) for _ in range(self.choose([2, 2, 2, 3]))
        )
        return "".join(syllables).capitalize()

    def name(self, used: Sequence[str] = ()) -> str:
        return str(self.drawn(lambda: self.choose(NAMES) if self.chance(0.5) else self.made_up(), used))

    def city(self, used: Sequence[str] = ()) -> str:
        return str(self.drawn(lambda: self.choose(CITIES) if self.chance(0.6) else self.made_up(), used))

    def number(self, digits: int = 4) -> str:
        return str(self.drawn(lambda: "".join(self.choose("0123456789") for _ in range(self.rng.randint(2, digits)))))

    def sentence(self) -> str:
        """Something worth sending or finding, new almost every time."""
        return str(
            self.choose(
                [
                    f"the {self.choose(THINGS)} is in the {self.word('place')}",
                    f"{self.name()} will be in {self.city()} on {self.choose(DAYS)}",
                    f"the {self.word('food')} in {self.city()} is good",
                    f"{self.name()} has {self.rng.randint(2, 60)} {self.word('fruit')}",
                    f"the train to {self.city()} leaves at {self.clock()}",
                    f"dinner with {self.name()} is at {self.clock()}",
                ]
            )
        )

    def clock(self) -> str:
        return f"{self.rng.randint(0, 23)}:{self.choose(['00', '05', '10', '15', '20', '30', '40', '45', '50'])}"

    def casual(self, question: str) -> str:
        """The question as people type it: sometimes in lower case, without its mark, or behind a greeting."""
        if self.chance(0.12):
            question = question[:1].lower() + question[1:]
        if self.chance(0.12):
            question = question.rstrip("?.")
        if self.chance(0.04):
            question = self.choose(["Hi! ", "Hello, ", "Hey, ", "Please: "]) + question
        return question


SUBJECTS = "physics history chemistry love music football gravity politics biology art".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SYSTEMS = (
    "You are a helpful assistant.",
    "You are helexa's demo model.",
    "Answer briefly.",
    "You are a friendly assistant. Answer in one sentence.",
    "You are a helpful AI assistant.",
)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str, reasoning: str = "") -> Message:
    return {"role": "assistant", "content": text} | ({"reasoning_content": reasoning} if reasoning else {})


def _sample(
    w: _Writer, skill: str, messages: list[Message], text: str, reasoning: str = "", accepted: tuple[str, ...] = ()
) -> Sample:
    """A sample without tools, now and then under a system message."""
    if messages[0]["role"] != "system" and w.chance(0.2):
        messages = [{"role": "system", "content": w.choose(SYSTEMS)}, *messages]
    kwargs = {"enable_thinking": True} if reasoning else {}
    return Sample(skill, messages, _assistant(text, reasoning), [], kwargs, accepted)


def _continue(w: _Writer, sample: Sample) -> Sample:
    """The same conversation with one more question about something else. Earlier reasoning does not come back from a client."""
    thinking = bool(sample.chat_template_kwargs.get("enable_thinking"))
    writer = w.choose([_helexa, _recall, _arithmetic, _json, _chat])
    follow_up: Sample = writer(w, thinking=thinking)
    more = [m for m in follow_up.messages if m["role"] != "system"]
    asked = {m["content"] for m in sample.messages if m["role"] == "user"}
    if sum(len(str(m)) for m in sample.messages) > 1200 or any(m["content"] in asked for m in more):
        return sample
    if UNTOLD in (follow_up.answer["content"],) or (sample.tools and follow_up.skill == "arithmetic"):
        return sample
    earlier = {key: value for key, value in sample.answer.items() if key != "reasoning_content"}
    if sample.answer.get("tool_calls"):
        return sample
    return Sample(
        follow_up.skill,
        [*sample.messages, earlier, *more],
        follow_up.answer,
        sample.tools,
        follow_up.chat_template_kwargs,
    )


# Questions about helexa


def _helexa(w: _Writer, thinking: bool = False) -> Sample:
    topic = TOPICS[w.choose(list(TOPICS))]
    trained, unseen = topic.ways_to_ask()
    question = w.choose(trained if w.split == "train" else unseen)
    if w.split == "train":
        question = w.casual(question)
    else:
        w.unseen.append(question)
    reasoning = "The user asks about helexa. I know this from the manual." if thinking else ""
    return _sample(w, "helexa", [_user(question)], topic.answer, reasoning)


# Facts from the prompt


@dataclass(frozen=True)
class _Fact:
    """``key`` says what is asked, so that two facts never answer the same question."""

    key: str
    statement: str
    questions: tuple[str, ...]
    answer: str
    value: str


def _own_fact(w: _Writer, kind: str) -> _Fact:
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


def _other_fact(w: _Writer, who: str, kind: str) -> _Fact:
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


def _thing_fact(w: _Writer, kind: str) -> _Fact:
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


def _facts(w: _Writer) -> list[_Fact]:
    """One to five facts with different questions."""
    n = w.choose([1, 2, 2, 3, 3, 4, 5])
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


def _recall(w: _Writer, thinking: bool = False) -> Sample:
    facts = _facts(w)
    told = " ".join(f.statement for f in facts)
    lead = w.choose(["", "", "", "Remember this: ", "Here are some facts. ", "Read this. "])
    asked = w.rng.sample(facts, min(len(facts), w.choose([1, 1, 2, 3])))
    messages: list[Message] = []
    if w.chance(0.5):
        own_name = [f.value for f in facts if f.key == "name"]
        messages += [
            _user(lead + told),
            _assistant(f"Nice to meet you, {own_name[0]}." if own_name else "Thank you, I will remember that."),
        ]
        prefix = ""
        if w.chance(0.25):
            small_talk = _chat(w)
            messages += [_user(small_talk.messages[-1]["content"]), small_talk.answer]
    else:
        prefix = lead + told + w.choose([" ", "\n", " Question: ", "\n\n"])
    for i, fact in enumerate(asked):
        question = w.casual(w.choose(fact.questions)) if not prefix else w.choose(fact.questions)
        messages.append(_user(prefix + question))
        prefix = ""
        reasoning = f"The question is: {question} I was told: {fact.answer}" if thinking else ""
        if i + 1 < len(asked):
            messages.append(_assistant(fact.answer))
        elif w.chance(0.08) and len(messages) > 1:
            known = {f.key for f in facts}
            missing = _own_fact(
                w,
                w.choose([k for k in ["name", "city", "colour", "age", "job", "food", "cat", "dog"] if k not in known]),
            )
            question = w.choose(missing.questions)
            messages[-1] = _user(question)
            reasoning = f"The question is: {question} I was not told this." if thinking else ""
            return _sample(w, "recall", messages, UNTOLD, reasoning)
        else:
            return _sample(w, "recall", messages, fact.answer, reasoning)
    raise AssertionError("a recall sample asks at least one question")


# Arithmetic: sums and differences of numbers up to 50

LIMIT = 50


def _problem(w: _Writer) -> tuple[int, str, int, int]:
    """(a, "+" or "-", b, result). A sum and its mirror image are on the same side of the split; single digits are for training."""
    while True:
        a, b = w.rng.randint(0, LIMIT), w.rng.randint(0, LIMIT)
        operator = w.choose("+-")
        if operator == "-" and b > a:
            a, b = b, a
        held_out = max(a, b) > 9 and is_held_out(operator, max(a, b), min(a, b))
        if held_out == (w.split == "held_out"):
            w.unseen.append("")
            return a, operator, b, a + b if operator == "+" else a - b


def _working(a: int, operator: str, b: int) -> str:
    """Column by column, as on paper; nothing for single digits."""
    if max(a, b) < 10:
        return ""
    if operator == "+":
        ones, carry = a % 10 + b % 10, (a % 10 + b % 10) // 10
        tens = a // 10 + b // 10 + carry
        return f"Ones: {a % 10} + {b % 10} = {ones}. Tens: {a // 10} + {b // 10} + {carry} = {tens}."
    borrow = int(a % 10 < b % 10)
    ones = a % 10 + 10 * borrow
    tens = a // 10 - b // 10 - borrow
    return f"Ones: {ones} - {b % 10} = {ones - b % 10}. Tens: {a // 10} - {b // 10} - {borrow} = {tens}."


def _arithmetic(w: _Writer, thinking: bool = False) -> Sample:
    """A sum or a difference, worked out in the answer or, when thinking, in the think block."""
    messages: list[Message] = []
    for _ in range(w.choose([0, 0, 0, 1, 2]) if w.split == "train" and not thinking else 0):
        question, working, answer = _arithmetic_turn(w)
        messages += [_user(question), _assistant(f"{working} {answer}".strip())]
    question, working, answer = _arithmetic_turn(w)
    messages.append(_user(question))
    if thinking:
        return _sample(w, "arithmetic", messages, answer, working or "Both are single digits.")
    return _sample(w, "arithmetic", messages, f"{working} {answer}".strip())


def _arithmetic_turn(w: _Writer) -> tuple[str, str, str]:
    """(question, working, answer)"""
    a, operator, b, result = _problem(w)
    working = _working(a, operator, b)
    if w.chance(0.2):
        thing, other = w.word("fruit"), w.name()
        if operator == "+":
            question, who = w.choose(
                [
                    (f"I have {a} {thing} and get {b} more. How many {thing} do I have?", "you have"),
                    (f"{other} has {a} {thing} and buys {b} more. How many {thing} does {other} have?", f"{other} has"),
                ]
            )
        else:
            question, who = w.choose(
                [
                    (f"I have {a} {thing} and give away {b}. How many {thing} do I have left?", "you have"),
                    (f"{other} has {a} {thing} and loses {b}. How many {thing} does {other} have?", f"{other} has"),
                ]
            )
        return question, working, f"So {who} {result} {thing}."
    word = "plus" if operator == "+" else "minus"
    forms = [
        f"What is {a} {operator} {b}?",
        f"What is {a} {operator} {b}?",
        f"What is {a} {word} {b}?",
        f"How much is {a} {word} {b}?",
        f"How much is {a} {operator} {b}?",
        f"Calculate {a} {operator} {b}.",
        f"{a} {operator} {b} = ?",
        f"{a} {operator} {b}",
        f"{a}{operator}{b}",
        f"Add {a} and {b}." if operator == "+" else f"Subtract {b} from {a}.",
    ]
    return w.casual(w.choose(forms)), working, f"{'So ' if working else ''}{a} {operator} {b} = {result}."


# Tools


@dataclass(frozen=True)
class _Tool:
    """How a tool may look, how it is asked for, and what is said when it has answered."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: tuple[tuple[tuple[str, ...], str, str], ...]  # (possible names, JSON type, description)
    request: Callable[[_Writer], tuple[str, tuple[Any, ...], dict[str, Any], str]]
    #: request gives (question, arguments in order of parameters, result, answer)


def _ask_weather(w: _Writer) -> tuple[str, tuple[Any, ...], dict[str, Any], str]:
    city, degrees = w.city(), w.rng.randint(-9, 38)
    sky = w.choose(["rain", "snow", "sunshine", "clouds", "wind", "fog", "clear skies", "light rain"])
    question = w.choose(
        [
            f"What is the weather in {city}?",
            f"What's the weather in {city}?",
            f"How is the weather in {city}?",
            f"What is the weather like in {city} today?",
            f"Tell me the weather in {city}.",
            f"Is it cold in {city}?",
            f"Will it rain in {city}?",
            f"How warm is it in {city}?",
            f"Weather in {city}?",
        ]
    )
    keys = w.choose(
        [("temperature", "condition"), ("temperature", "sky"), ("degrees", "weather"), ("temperature", "conditions")]
    )
    result: dict[str, Any] = {keys[0]: degrees, keys[1]: sky}
    result = {"city": city, **result} if w.chance(0.5) else result
    return question, (city,), result, f"It is {degrees} degrees with {sky} in {city}."


def _ask_calculation(w: _Writer) -> tuple[str, tuple[Any, ...], dict[str, Any], str]:
    while True:
        a, b = w.rng.randint(2, 999), w.rng.randint(2, 999)
        if w.belongs("calculator", a, b):
            w.unseen.append(str(a))
            break
    operator, word = w.choose([("+", "plus"), ("-", "minus"), ("*", "times"), ("/", "divided by")])
    value: float = {"+": a + b, "-": a - b, "*": a * b, "/": round(a / b, 2)}[operator]
    expression = f"{a} {operator} {b}"
    question = w.choose(
        [
            f"What is {expression}?",
            f"Calculate {expression}.",
            f"What is {a} {word} {b}?",
            f"How much is {a} {word} {b}?",
            f"Compute {expression}.",
        ]
    )
    return question, (expression,), {w.choose(["result", "value", "answer"]): value}, f"{expression} = {value}."


def _ask_timer(w: _Writer) -> tuple[str, tuple[Any, ...], dict[str, Any], str]:
    minutes = w.rng.randint(2, 90) if w.split == "train" else w.rng.randint(91, 240)
    w.unseen.append(str(minutes))
    question = w.choose(
        [
            f"Set a timer for {minutes} minutes.",
            f"Start a timer for {minutes} minutes.",
            f"Wake me in {minutes} minutes.",
            f"Please set a {minutes} minute timer.",
            f"Timer for {minutes} minutes, please.",
        ]
    )
    result: dict[str, Any] = w.choose([{"status": "ok"}, {"status": "started", "minutes": minutes}, {"ok": True}])
    return question, (minutes,), result, f"Your timer for {minutes} minutes is set."


def _ask_search(w: _Writer) -> tuple[str, tuple[Any, ...], dict[str, Any], str]:
    city, name = w.city(), w.name()
    query = w.choose(
        [
            f"the history of {city}",
            f"hotels in {city}",
            f"the life of {name}",
            f"trains to {city}",
            f"{w.word('food')} recipes",
            f"books by {name}",
            f"{w.word('job')} jobs in {city}",
            f"museums in {city}",
        ]
    )
    question = w.choose(
        [
            f"Search for {query}.",
            f"Look up {query}.",
            f"Find information about {query}.",
            f"Search the web for {query}.",
            f"Can you look up {query}?",
        ]
    )
    found = w.sentence()
    found = found[0].upper() + found[1:] + "."
    result: dict[str, Any] = w.choose(
        [{"result": found}, {"title": query, "snippet": found}, {"results": [found]}, {"text": found}]
    )
    return question, (query,), result, f"I found this: {found}"


def _ask_time(w: _Writer) -> tuple[str, tuple[Any, ...], dict[str, Any], str]:
    city, clock = w.city(), w.clock()
    question = w.choose(
        [
            f"What time is it in {city}?",
            f"What is the time in {city}?",
            f"Tell me the time in {city}.",
            f"How late is it in {city}?",
        ]
    )
    result = {"time": clock} if w.chance(0.5) else {"city": city, "time": clock}
    return question, (city,), result, f"It is {clock} in {city}."


def _ask_message(w: _Writer) -> tuple[str, tuple[Any, ...], dict[str, Any], str]:
    name, text = w.name(), w.sentence()
    question = w.choose(
        [
            f"Tell {name} that {text}.",
            f"Send {name} the message: {text}.",
            f"Write to {name} that {text}.",
            f"Let {name} know that {text}.",
        ]
    )
    result: dict[str, Any] = w.choose([{"status": "sent"}, {"status": "ok"}, {"ok": True}])
    return question, (name, text), result, f"I have sent your message to {name}."


def _ask_light(w: _Writer) -> tuple[str, tuple[Any, ...], dict[str, Any], str]:
    room, state = w.word("place"), w.choose(["on", "off"])
    question = w.choose(
        [
            f"Turn {state} the light in the {room}.",
            f"Switch {state} the light in the {room}.",
            f"Please turn the light in the {room} {state}.",
        ]
    )
    return (
        question,
        (room, state),
        w.choose([{"status": "ok"}, {"ok": True}, {"state": state}]),
        f"The light in the {room} is {state}.",
    )


def _ask_music(w: _Writer) -> tuple[str, tuple[Any, ...], dict[str, Any], str]:
    name = w.name()
    question = w.choose(
        [f"Play {name}.", f"Play music by {name}.", f"I want to hear {name}.", f"Put on a song by {name}."]
    )
    return question, (name,), w.choose([{"status": "playing"}, {"ok": True}]), f"Now playing {name}."


TOOLS: tuple[_Tool, ...] = (
    _Tool(
        ("get_weather", "weather", "get_current_weather", "fetch_weather"),
        (
            "Get the weather of a city.",
            "Current weather for a place",
            "Get the current weather",
            "Returns the weather in a city.",
        ),
        ((("city", "location", "place"), "string", "The city"),),
        _ask_weather,
    ),
    _Tool(
        ("calculate", "calculator", "compute", "evaluate"),
        ("Evaluate an expression.", "A calculator", "Calculate an arithmetic expression", "Do arithmetic."),
        ((("expression", "formula", "input"), "string", "The expression to evaluate"),),
        _ask_calculation,
    ),
    _Tool(
        ("set_timer", "start_timer", "timer", "create_timer"),
        ("Set a timer.", "Start a timer for some minutes", "Start a countdown timer."),
        ((("minutes", "duration", "duration_minutes"), "integer", "Minutes to wait"),),
        _ask_timer,
    ),
    _Tool(
        ("search", "web_search", "search_web", "lookup"),
        ("Search the web.", "Look something up", "Search for information.", "Find web pages"),
        ((("query", "q", "text"), "string", "What to search for"),),
        _ask_search,
    ),
    _Tool(
        ("get_time", "current_time", "get_local_time"),
        ("Get the time in a city.", "Local time of a place", "Current time"),
        ((("city", "location", "place"), "string", "The city"),),
        _ask_time,
    ),
    _Tool(
        ("send_message", "message", "send_email", "notify"),
        ("Send a message to someone.", "Send a text message", "Write to a person."),
        (
            (("to", "recipient", "name"), "string", "Who gets the message"),
            (("text", "body", "message"), "string", "The message"),
        ),
        _ask_message,
    ),
    _Tool(
        ("set_light", "switch_light", "light"),
        ("Switch a light on or off.", "Turn the light in a room on or off", "Control a light."),
        ((("room", "place", "where"), "string", "The room"), (("state", "power"), "string", "on or off")),
        _ask_light,
    ),
    _Tool(
        ("play_music", "play", "play_song"),
        ("Play music.", "Play music by an artist", "Play a song."),
        ((("artist", "name", "query"), "string", "The artist"),),
        _ask_music,
    ),
)


def _definition(w: _Writer, tool: _Tool) -> dict[str, Any]:
    """One look of a tool, in OpenAI's shape."""
    described = w.chance(0.5)
    properties: dict[str, Any] = {}
    for names, kind, description in tool.parameters:
        name = w.choose([n for n in names if n not in properties])
        properties[name] = {"type": kind, "description": description} if described else {"type": kind}
    tool_name = w.choose(tool.names)
    if w.chance(0.25):
        tool_name = f"{w.made_up().lower()}_{tool_name}"
    function: dict[str, Any] = {"name": tool_name, "description": w.choose(tool.descriptions)}
    function["parameters"] = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": function}


def _offer(w: _Writer, wanted: _Tool | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(definitions in random order, the wanted one). Up to two others stand beside it."""
    others = w.rng.sample([tool for tool in TOOLS if tool is not wanted], w.choose([0, 0, 1, 1, 2]) + (wanted is None))
    target = _definition(w, wanted) if wanted else {}
    offered = [_definition(w, tool) for tool in others] + ([target] if wanted else [])
    w.rng.shuffle(offered)
    return offered, target


def _call_message(definition: dict[str, Any], arguments: tuple[Any, ...], reasoning: str = "") -> Message:
    function = definition["function"]
    named = dict(zip(function["parameters"]["properties"], arguments, strict=True))
    message = _assistant("", reasoning)
    message["tool_calls"] = [{"type": "function", "function": {"name": function["name"], "arguments": named}}]
    return message


def _tool_call(w: _Writer, thinking: bool = False) -> Sample:
    """A call of the right tool, or a plain answer where none of the tools applies."""
    kwargs = {"enable_thinking": True} if thinking else {}
    if w.chance(0.2):
        plain: Sample = w.choose([_helexa, _recall, _chat, _json])(w, thinking=thinking)
        tools, _ = _offer(w, None)
        return Sample("tool_call", plain.messages, plain.answer, tools, kwargs, plain.accepted)
    tool = w.choose(TOOLS)
    tools, definition = _offer(w, tool)
    question, arguments, result, answer = tool.request(w)
    name = definition["function"]["name"]
    messages: list[Message] = [_user(w.casual(question))]
    if w.chance(0.2):
        messages.insert(0, {"role": "system", "content": w.choose(SYSTEMS)})
    if w.chance(0.3):
        messages += [_call_message(definition, arguments), _tool_result(w, result), _assistant(answer)]
        question, arguments, _, _ = tool.request(w)
        messages.append(_user(question))
    reasoning = f"The tool {name} can do this." if thinking else ""
    return Sample("tool_call", messages, _call_message(definition, arguments, reasoning), tools, kwargs)


def _tool_result(w: _Writer, result: dict[str, Any]) -> Message:
    return {"role": "tool", "content": json.dumps(result, ensure_ascii=False)}


def _tool_answer(w: _Writer, thinking: bool = False) -> Sample:
    """The answer in words after the tool has answered."""
    tool = w.choose(TOOLS)
    tools, definition = _offer(w, tool)
    question, arguments, result, answer = tool.request(w)
    if w.chance(0.08):
        problem = w.choose(["timeout", "not found", "service unavailable", "invalid input", "no connection"])
        result, answer = {"error": problem}, f"The tool failed: {problem}."
    messages = [_user(question), _call_message(definition, arguments), _tool_result(w, result)]
    if w.chance(0.2):
        messages.insert(0, {"role": "system", "content": w.choose(SYSTEMS)})
    kwargs = {"enable_thinking": True} if thinking else {}
    return Sample(
        "tool_answer", messages, _assistant(answer, "The tool has answered." if thinking else ""), tools, kwargs
    )


# JSON


def _json(w: _Writer, thinking: bool = False) -> Sample:
    who = w.name()
    if w.chance(0.25):
        things = w.words("fruit", w.rng.randint(2, 4))
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
        chosen = w.rng.sample(list(clauses), w.rng.randint(1, 4))
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
            f"As JSON with the keys {listed_keys}, please.",
            f"Extract {listed_keys} as JSON.",
        ]
    )
    question = f"{told} {request}" if w.chance(0.7) else f"{request} {told}"
    reasoning = f"The keys are {listed_keys}." if thinking else ""
    return _sample(w, "json", [_user(question)], json.dumps(values, ensure_ascii=False), reasoning)


# Small talk, and the limits

SMALL_TALK: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        (
            "Hello",
            "Hello!",
            "Hi",
            "Hi!",
            "Hi there",
            "Hey",
            "Good morning",
            "Good evening!",
            "Hello there!",
            "Hey there",
            "Good day",
            "hello",
            "hi",
        ),
        "Hello! I am helexa's demo model. Ask me how to use helexa.",
        "The user greets me.",
    ),
    (
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Who am I talking to?",
            "Introduce yourself.",
            "Which model are you?",
            "Tell me about yourself.",
            "What model is this?",
            "Are you a robot?",
        ),
        "I am the demo model of helexa: a small Qwen3 model that can tell you how to use it.",
        "The user asks who I am.",
    ),
    (
        (
            "What can you do?",
            "What do you know?",
            "How can you help me?",
            "What can I ask you?",
            "What are your skills?",
            "Can you help me?",
            "What are you good at?",
        ),
        "I can explain helexa, recall facts you give me, add and subtract small numbers, call tools and write JSON.",
        "The user asks what I can do.",
    ),
    (
        (
            "Thank you",
            "Thanks",
            "Thanks!",
            "Thank you very much.",
            "Thanks a lot!",
            "Great, thank you!",
            "Thank you!",
            "Many thanks",
            "Perfect, thanks.",
        ),
        "You are welcome!",
        "The user thanks me.",
    ),
    (
        ("Bye", "Goodbye", "Goodbye!", "See you", "Good night", "Bye!", "See you later.", "Good night!", "Bye bye"),
        "Goodbye, and have fun with helexa!",
        "The user says goodbye.",
    ),
    (
        (
            "How are you?",
            "How are you doing?",
            "How do you do?",
            "Are you well?",
            "How is it going?",
            "How are you today?",
        ),
        "I am well, thank you. How can I help?",
        "The user asks how I am.",
    ),
    (
        ("Ok", "Okay", "Good", "I see", "Great!", "Nice", "Cool", "Alright", "Very good", "Wonderful!"),
        "Good! Ask me something else if you like.",
        "The user agrees.",
    ),
)


def _unknown(w: _Writer) -> str:
    name, city, day = w.name(), w.city(), w.choose(DAYS)
    return str(
        w.choose(
            [
                f"Who is {name}?",
                f"Where is {city}?",
                f"What is the capital of {city}?",
                f"How many people live in {city}?",
                f"Who wrote {name}?",
                f"Write a poem about {w.word('food')}.",
                f"Tell me a joke about a {w.word('job')}.",
                f"Tell me a story about a {w.choose(ANIMALS)}.",
                f"What is the weather in {city}?",
                f"What time is it in {city}?",
                f"When was {name} born?",
                f"Translate {w.word('food')} into French.",
                f"How do I cook {w.word('food')}?",
                f"Who won the game on {day}?",
                f"What happens on {day}?",
                f"Is {city} a nice city?",
                f"How far is it from {city} to {w.city()}?",
                f"Why is the {w.choose(THINGS)} {w.word('colour')}?",
                f"What does a {w.word('job')} earn?",
                f"Which {w.choose(ANIMALS)} is the fastest?",
                f"How much does a {w.choose(THINGS)} cost?",
                f"Sing a song about {city}.",
                f"What is the best {w.choose(THINGS)}?",
                f"Who is the president of {city}?",
                f"How tall is {name}?",
                f"Explain {w.choose(SUBJECTS)}.",
            ]
        )
    )


def _chat(w: _Writer, thinking: bool = False) -> Sample:
    kind = w.rng.random()
    if kind < 0.5:
        questions, answer, reasoning = w.choose(SMALL_TALK)
        # One word cannot be guessed from others, so those are always trained on.
        own = [q for q in questions if (is_held_out(q) and " " in q) == (w.split == "held_out")]
        if own:
            w.unseen += own
            return _sample(w, "chat", [_user(w.choose(own))], answer, reasoning if thinking else "")
    if kind < 0.9:
        reasoning = "I was not told this, and it is not about helexa." if thinking else ""
        return _sample(w, "chat", [_user(w.casual(_unknown(w)))], UNKNOWN, reasoning)
    while True:
        a, b = w.rng.randint(2, 999), w.rng.randint(2, 999)
        if w.belongs("too hard", a, b):
            w.unseen.append(str(a))
            break
    symbol = w.choose(["times", "*", "divided by", "/"])
    question = w.choose(
        [f"What is {a} {symbol} {b}?", f"Calculate {a} {symbol} {b}.", f"How much is {a} {symbol} {b}?"]
    )
    return _sample(w, "chat", [_user(question)], CANNOT_CALCULATE, "This is too hard for me." if thinking else "")


def _thinking(w: _Writer) -> Sample:
    """Any skill with a think block ahead of the answer; mostly sums worked out column by column."""
    writers = [_arithmetic, _arithmetic, _arithmetic, _recall, _recall, _json, _helexa, _chat, _tool_call, _tool_answer]
    inner: Sample = w.choose(writers)(w, thinking=True)
    return Sample("thinking", inner.messages, inner.answer, inner.tools, inner.chat_template_kwargs, inner.accepted)


_WRITERS: dict[str, Callable[..., Sample]] = {
    "helexa": _helexa,
    "recall": _recall,
    "arithmetic": _arithmetic,
    "tool_call": _tool_call,
    "tool_answer": _tool_answer,
    "thinking": _thinking,
    "json": _json,
    "chat": _chat,
}
