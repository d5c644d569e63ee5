"""Sums and differences of numbers up to 50, worked out column by column."""

from __future__ import annotations

from .sample import Message, Sample, assistant, user
from .writer import Writer, is_held_out, plain_sample

LIMIT = 50


def _problem(w: Writer) -> tuple[int, str, int, int]:
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
        return f"Ones: {a % 10}+{b % 10}={ones}. Tens: {a // 10}+{b // 10}+{carry}={tens}."
    borrow = int(a % 10 < b % 10)
    ones = a % 10 + 10 * borrow
    tens = a // 10 - b // 10 - borrow
    return f"Ones: {ones}-{b % 10}={ones - b % 10}. Tens: {a // 10}-{b // 10}-{borrow}={tens}."


def arithmetic(w: Writer, thinking: bool = False) -> Sample:
    """A sum or a difference, worked out in the answer or, when thinking, in the think block."""
    messages: list[Message] = []
    for _ in range(w.choose([0, 0, 1, 2, 3]) if w.split == "train" and not thinking else 0):
        question, working, answer = _arithmetic_turn(w)
        messages += [user(question), assistant(f"{working} {answer}".strip())]
    question, working, answer = _arithmetic_turn(w)
    messages.append(user(question))
    if thinking:
        return plain_sample(w, "arithmetic", messages, answer, working or "Both are single digits.")
    return plain_sample(w, "arithmetic", messages, f"{working} {answer}".strip())


def _arithmetic_turn(w: Writer) -> tuple[str, str, str]:
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
        f"Add {a} and {b}." if operator == "+" else f"Subtract {b} from {a}.",
    ]
    return w.casual(w.choose(forms)), working, f"{'So ' if working else ''}{a} {operator} {b} = {result}."
