"""Measured rates: what a bound on a step's seconds becomes in tokens."""

from __future__ import annotations

import pytest

from helexa_engine.runtime.step_pace import StepPace


def test_nothing_is_known_before_it_was_measured() -> None:
    pace = StepPace()
    assert (pace.prompt_tokens_per_second, pace.decode_tokens_per_second) == (0.0, 0.0)
    assert pace.prompt_tokens_within(10.0) == 0
    pace.observe(0, 4, 0.0)  # a clock that stood still
    assert pace.decode_tokens_per_second == 0.0


def test_rates_of_steps_of_one_kind() -> None:
    pace = StepPace()
    pace.observe(512, 0, 4.0)
    pace.observe(0, 4, 0.1)
    assert pace.prompt_tokens_per_second == pytest.approx(128)
    assert pace.decode_tokens_per_second == pytest.approx(40)
    assert pace.prompt_tokens_within(0.5) == 51  # 0.4 s beside the decoding
    assert pace.prompt_tokens_within(0.05) == 0


def test_short_prompts_weigh_little_and_old_ones_less() -> None:
    pace = StepPace()
    pace.observe(512, 0, 1.0)
    pace.observe(8, 0, 0.5)  # the weights are read for few tokens
    assert 330 < pace.prompt_tokens_per_second < 512
    for _ in range(40):
        pace.observe(512, 0, 2.0)
    assert pace.prompt_tokens_per_second == pytest.approx(256, rel=0.02)


@pytest.mark.parametrize("decode_seconds", [0.02, 0.2])
@pytest.mark.parametrize("seconds_per_token", [0.0005, 0.004])
@pytest.mark.parametrize("stale", [0.2, 5.0], ids=["decodes were faster", "decodes were slower"])
def test_steps_come_to_their_bound_whatever_their_parts_cost(
    decode_seconds: float, seconds_per_token: float, stale: float
) -> None:
    """The steps are measured as they come: an estimate of the decoding alone that is out of date does no lasting harm."""
    pace, bound, page = StepPace(), 0.5, 8
    pace.observe(512, 0, 512 * seconds_per_token)
    pace.observe(0, 1, stale * decode_seconds)
    seconds = 0.0
    for _ in range(200):
        tokens = max(page, pace.prompt_tokens_within(bound))
        seconds = decode_seconds + tokens * seconds_per_token
        pace.observe(tokens, 1, seconds)
    assert 0.8 * bound < seconds <= 1.05 * bound
