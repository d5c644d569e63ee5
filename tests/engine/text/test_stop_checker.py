"""Stop strings: found across chunk borders, held back no longer than needed."""

from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from helexa_engine.text.stop_checker import StopChecker


def test_across_chunks():
    checker = StopChecker(["STOP", "\n\n"])
    assert [checker.push(chunk) for chunk in ("a S", "TO", "x\n", "y ST", "OP z", "more")] == [
        "a ",
        "",
        "STOx",
        "\ny ",
        "",
        "",
    ]
    assert checker.hit == "STOP" and checker.flush() == ""


def test_flush_gives_what_was_held():
    checker = StopChecker(["END"])
    assert (checker.push("the EN"), checker.flush(), checker.hit) == ("the ", "EN", None)


def test_first_completed_wins_and_then_the_longer():
    checker = StopChecker(["b", "abc"])
    assert (checker.push("xabc"), checker.hit) == ("xa", "b")
    checker = StopChecker(["c", "bc"])
    assert (checker.push("abc"), checker.hit) == ("a", "bc")


def test_no_stop_strings():
    checker = StopChecker([])
    assert (checker.push("abc"), checker.flush(), checker.hit) == ("abc", "", None)


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            hit = max(found, key=len)
            return text[: end - len(hit)], hit
    return text, None


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=4), st.lists(st.text("abc", max_size=5), max_size=8))
def test_any_chunking_equals_the_definition(stops, chunks):
    checker, out, text = StopChecker(stops), "", ""
    for chunk in chunks:
        out += checker.push(chunk)
        text += chunk
        expected, hit = naive(text, stops)
        assert expected.startswith(out) and checker.hit == hit
        if hit is None:  # what is held back may still become a stop string
            held = expected[len(out) :]
            assert any(stop.startswith(held) for stop in stops) or not held
    assert (out + checker.flush(), checker.hit) == naive(text, stops)


def test_the_largest_allowed_request_is_cheap():
    checker = StopChecker(["a" * 4095 + chr(0x4E00 + i) for i in range(64)])
    start = time.perf_counter()
    for _ in range(100):
        checker.push("aaaa")
    assert time.perf_counter() - start < 2.0
