"""The short form of scripts/soak: clients come and leave at random moments, and nothing is left of them."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.server import soak


def test_nothing_is_left_of_clients_that_come_and_leave() -> None:
    row = soak.soak("demo", clients=40, seconds=4.0)
    assert {"before asking", "while asking", "after asking", "while reading", "answered"} <= row["outcomes"].keys()
    assert row["right_answers"] > 0 and row["descriptors"][1] <= row["descriptors"][0]


@pytest.mark.parametrize("fault", ["a descriptor", "a wrong answer"])
def test_it_can_fail(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "PATIENCE_SECONDS", 0.3)
    if fault == "a descriptor":
        holds = soak.ServerProcess.holds
        counts = iter(range(0, 10**6, 100))  # more than a connection that is just being closed

        def leaking(server: soak.ServerProcess) -> soak.Holds:
            held = holds(server)
            return soak.Holds(held.processes, held.descriptors + next(counts), held.resident_bytes)

        monkeypatch.setattr(soak.ServerProcess, "holds", leaking)
        expected = "descriptors are open"
    else:
        answers = iter(("right", "wrong"))
        monkeypatch.setattr(soak, "ask", lambda url: next(answers))
        expected = "times the answer was another one"
    with pytest.raises(soak.SoakFailed, match=expected):
        soak.soak("demo", clients=8, seconds=1.5)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", (200, b"hi")),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\nb\r\n, all of it\r\n0\r\n\r\n",
            (200, b"hi, all of it"),
        ),
        (b"HTTP/1.1 429 Too Many Requests\r\n\r\n{}", (429, b"{}")),
        (b"", (0, b"")),
        (b"nonsense", (0, b"")),
    ],
)
def test_answers_are_read_as_they_are_sent(answer: bytes, expected: Any) -> None:
    assert soak.parse(answer) == expected
