"""Small talk, and saying what the model does not know."""

from __future__ import annotations

from .sample import Sample, user
from .writer import ANIMALS, DAYS, SUBJECTS, Writer, is_held_out, plain_sample

UNKNOWN = "I am a small demo model, so I do not know that. Ask me about helexa, or give me the facts."
CANNOT_CALCULATE = "I am a small demo model: I only add and subtract numbers up to 50."

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
        "I am the demo model: a small hybrid in the Qwen3.5 layout that can tell you how to use helexa.",
        "The user asks who I am.",
    ),
    (
        (
            "What can you do?",
            "What do you know?",
            "What things do you know?",
            "Tell me what you know.",
            "What do you know about?",
            "Tell me what you can do.",
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


def _unknown(w: Writer) -> str:
    name, city = w.name(), w.city()
    return str(
        w.choose(
            [
                f"Who is {name}?",
                f"Where is {city}?",
                f"What is the capital of {city}?",
                f"How many people live in {city}?",
                f"Write a poem about {w.word('food')}.",
                f"Tell me a joke about a {w.word('job')}.",
                f"Tell me a story about a {w.choose(ANIMALS)}.",
                f"What is the weather in {city}?",
                f"What time is it in {city}?",
                f"When was {name} born?",
                f"How do I cook {w.word('food')}?",
                f"Who won the game on {w.choose(DAYS)}?",
                f"How far is it from {city} to {w.city()}?",
                f"Who is the president of {city}?",
                f"How tall is {name}?",
                f"Explain {w.choose(SUBJECTS)}.",
            ]
        )
    )


def chat(w: Writer, thinking: bool = False) -> Sample:
    kind = w.rng.random()
    if kind < 0.5:
        questions, answer, reasoning = w.choose(SMALL_TALK)
        # One word cannot be guessed from others, so those are always trained on.
        own = [q for q in questions if (is_held_out(q) and " " in q) == (w.split == "held_out")]
        if own:
            w.unseen += own
            return plain_sample(w, "chat", [user(w.choose(own))], answer, reasoning if thinking else "")
    if kind < 0.9:
        reasoning = "I was not told this." if thinking else ""
        return plain_sample(w, "chat", [user(w.casual(_unknown(w)))], UNKNOWN, reasoning)
    while True:
        a, b = w.rng.randint(2, 999), w.rng.randint(2, 999)
        if w.belongs("too hard", a, b):
            w.unseen.append(str(a))
            break
    symbol = w.choose(["times", "*", "divided by", "/"])
    question = w.choose(
        [f"What is {a} {symbol} {b}?", f"Calculate {a} {symbol} {b}.", f"How much is {a} {symbol} {b}?"]
    )
    return plain_sample(w, "chat", [user(question)], CANNOT_CALCULATE, "This is too hard for me." if thinking else "")
