"""Words, names and numbers for the conversations, drawn from one side of the split into training and held-out things.

Lists are split by checksum. Made-up words make the supply of both sides endless, so that copying is learnt and not a list.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Literal

from .manual import TOPICS
from .sample import Message, Sample, assistant

Split = Literal["train", "held_out"]


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
ONSETS = "b d f g k l m n p r s t v z".split()
VOWELS = "a e i o u".split()
CODAS = ["", "", "", "n", "r", "l", "s"]
#: Rarer beginnings, middles and ends, so that pieces of words which the simple syllables lack are copied too.
RARE_ONSETS = "c h j w qu br dr gr kr fl pl st tr sh ch th".split()
RARE_VOWELS = "ai ea ou oo ee y io".split()
RARE_CODAS = "m k x t d ck nt rd p ge ve ng w sh".split()

#: Words that stand in for those of the lists above in held-out samples.
UNSEEN: dict[str, list[str]] = {
    "colour": "golden crimson beige maroon".split(),
    "job": "judge poet florist barber miner surgeon".split(),
    "food": "cake stew toast lentils mushrooms omelettes".split(),
    "place": "bedroom balcony basement studio workshop".split(),
    "fruit": "lemons grapes peaches stones candles spoons".split(),
}
SEEN = {"colour": COLOURS, "job": JOBS, "food": FOODS, "place": PLACES, "fruit": FRUITS}
SUBJECTS = "physics history chemistry love music football gravity politics biology art".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SYSTEMS = (
    "You are a helpful assistant.",
    "You are helexa's demo model.",
    "Answer briefly.",
    "You are a friendly assistant. Answer in one sentence.",
    "You are a helpful AI assistant.",
)


def is_held_out(*facts: object) -> bool:
    """Whether something is kept for evaluation: true for a fixed eighth of all things, by checksum."""
    return zlib.crc32("|".join(map(str, facts)).encode()) % 8 == 0


_ORDINARY = (
    {word for topic in TOPICS.values() for word in re.findall("[A-Za-z]{4,}", topic.answer)}
    | {word for words in SEEN.values() for word in words}
    | {word for word in NAMES + CITIES if not is_held_out(word)}
)
#: What ordinary words begin and end with, each once: put together they make words that are copied in training.
BEGINNINGS = sorted({word[:n].lower() for word in _ORDINARY for n in range(1, 6)})
ENDS = sorted({word[-n:].lower() for word in _ORDINARY for n in range(2, 5)})
_REAL_UNSEEN = {form for words in UNSEEN.values() for word in words for form in (word, word.removesuffix("s"))}


class Writer:
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
            if self.chance(0.25):
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
        """Two syllables. In training, now and then the beginning of one ordinary word with the end of another instead, so that
        the pieces of ordinary words are copied too; the held-out ordinary words are made of such pieces.
        """
        while self.split == "train" and self.chance(0.5):
            word = str(self.choose(BEGINNINGS) + self.choose(ENDS))
            if word not in _REAL_UNSEEN:
                return word.capitalize()
        rare = self.chance(0.25)

        def part(usual: Sequence[str], unusual: Sequence[str]) -> str:
            return str(self.choose(unusual if rare and self.chance(0.4) else usual))

        syllables = (part(ONSETS, RARE_ONSETS) + part(VOWELS, RARE_VOWELS) + part(CODAS, RARE_CODAS) for _ in range(2))
        return "".join(syllables).capitalize()

    def name(self, used: Sequence[str] = ()) -> str:
        return str(self.drawn(lambda: self.choose(NAMES) if self.chance(0.3) else self.made_up(), used))

    def city(self, used: Sequence[str] = ()) -> str:
        return str(self.drawn(lambda: self.choose(CITIES) if self.chance(0.3) else self.made_up(), used))

    def number(self, digits: int = 4) -> str:
        return str(self.drawn(lambda: "".join(self.choose("0123456789") for _ in range(self.rng.randint(2, digits)))))

    def sentence(self) -> str:
        """Something worth sending or finding, new almost every time."""
        return str(
            self.choose(
                [
                    f"the {self.choose(THINGS)} is in the {self.word('place')}",
                    f"the {self.word('food')} is good",
                    f"the train to {self.city()} is late",
                    f"{self.name()} is here",
                ]
            )
        )

    def clock(self) -> str:
        return f"{self.rng.randint(0, 23)}:{self.choose(['00', '05', '10', '15', '20', '30', '40', '45', '50'])}"

    def casual(self, question: str) -> str:
        """The question as people type it: sometimes in lower case, without its mark, or behind a greeting."""
        if self.chance(0.06):
            question = question[:1].lower() + question[1:]
        if self.chance(0.06):
            question = question.rstrip("?.")
        if self.chance(0.03):
            question = self.choose(["Hi! ", "Hello, "]) + question
        return question


def plain_sample(
    w: Writer, skill: str, messages: list[Message], text: str, reasoning: str = "", accepted: tuple[str, ...] = ()
) -> Sample:
    """A sample without tools, now and then under a system message."""
    if messages[0]["role"] != "system" and w.chance(0.2):
        messages = [{"role": "system", "content": w.choose(SYSTEMS)}, *messages]
    kwargs = {"enable_thinking": True} if reasoning else {}
    return Sample(skill, messages, assistant(text, reasoning), [], kwargs, accepted)
