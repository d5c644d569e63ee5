"""Questions about helexa, answered with the manual's words."""

from __future__ import annotations

from .manual import TOPICS
from .sample import Sample, user
from .writer import Writer, plain_sample


def helexa(w: Writer, thinking: bool = False) -> Sample:
    """A question about one topic of the manual, in a wording of the split."""
    topic = TOPICS[w.choose(list(TOPICS))]
    trained, unseen = topic.ways_to_ask()
    question = w.choose(trained if w.split == "train" else unseen)
    if w.split == "train":
        question = w.casual(question)
    else:
        w.unseen.append(question)
    reasoning = "I know this from the manual." if thinking else ""
    return plain_sample(w, "helexa", [user(question)], topic.answer, reasoning)
