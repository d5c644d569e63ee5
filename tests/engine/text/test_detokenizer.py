"""Detokenizer: bytes, not tokens."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helexa_engine.text.detokenizer import Detokenizer


class Bytes:
    """One token a byte; 256 is a control token."""

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b"<|im_end|>"

    def is_special(self, token_id: int) -> bool:
        return token_id == 256


def test_emoji_over_four_tokens():
    detokenizer = Detokenizer(Bytes())
    assert [detokenizer.push(byte) for byte in "a🦙b".encode()] == ["a", "", "", "", "🦙", "b"]
    assert detokenizer.flush() == ""


def test_bytes_that_can_no_longer_become_a_character():
    detokenizer = Detokenizer(Bytes())
    assert [detokenizer.push(byte) for byte in b"\xf0\x9fA\xffB"] == ["", "", "\ufffdA", "\ufffd", "B"]
    assert (detokenizer.push(0xE4), detokenizer.flush()) == ("", "\ufffd")


def test_control_tokens_are_skipped():
    assert Detokenizer(Bytes()).push(256) == ""
    assert Detokenizer(Bytes(), skip_special_tokens=False).push(256) == "<|im_end|>"


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.integers(0, 800), max_size=40))
def test_streamed_equals_whole(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == tokenizer.decode(ids, skip_special_tokens=True)
