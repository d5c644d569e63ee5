"""The conversations the demo model is trained and judged on, written by a seeded generator.

Every sample states the question, the answer and what counts as right, so the same objects train the model, fill the accuracy
table and test the engine end to end. Training and held-out samples never share an arithmetic problem, a name, a city or a
made-up word, nor a wording of a question about helexa: membership is a checksum of the thing itself (:func:`.writer.is_held_out`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from random import Random

from .about_helexa import helexa
from .arithmetic import arithmetic
from .facts import UNTOLD, json_object, recall
from .sample import Sample
from .small_talk import chat
from .tool_use import tool_answer, tool_call
from .writer import Writer

#: Share of the training conversations that each skill leads.
SKILLS: dict[str, float] = {
    "helexa": 0.14,
    "recall": 0.22,
    "arithmetic": 0.04,
    "tool_call": 0.20,
    "tool_answer": 0.16,
    "thinking": 0.09,
    "json": 0.10,
    "chat": 0.05,
}

#: Skills that the shipped file answers rightly on at least 90 % of held-out samples, over HTTP too: what may be promised and tested.
CLAIMED: tuple[str, ...] = ("helexa", "recall", "arithmetic", "tool_call", "tool_answer", "thinking", "json")


def held_out(skill: str, n: int, seed: int = 0) -> list[Sample]:
    """``n`` samples of a skill, each about something that no training conversation contains. Raises KeyError for an unknown skill."""
    rng = Random(f"held out {skill} {seed}")
    samples: list[Sample] = []
    while len(samples) < n:
        writer = Writer(rng, "held_out")
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
        writer = Writer(rng, "train")
        sample = _WRITERS[rng.choices(list(shares), list(shares.values()))[0]](writer)
        while rng.random() < 0.4:
            sample = _continue(writer, sample)
        yield sample


def thinking_first(w: Writer) -> Sample:
    """Any skill with a think block ahead of the answer; mostly sums worked out column by column."""
    writers = [arithmetic, arithmetic, recall, recall, json_object, helexa, chat, tool_call]
    inner: Sample = w.choose(writers)(w, thinking=True)
    return Sample("thinking", inner.messages, inner.answer, inner.tools, inner.chat_template_kwargs, inner.accepted)


def _continue(w: Writer, sample: Sample) -> Sample:
    """The same conversation with one more question about something else. Earlier reasoning does not come back from a client."""
    thinking = bool(sample.chat_template_kwargs.get("enable_thinking"))
    writer = w.choose([helexa, recall, arithmetic, json_object, chat])
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


_WRITERS: dict[str, Callable[..., Sample]] = {
    "helexa": helexa,
    "recall": recall,
    "arithmetic": arithmetic,
    "tool_call": tool_call,
    "tool_answer": tool_answer,
    "thinking": thinking_first,
    "json": json_object,
    "chat": chat,
}
