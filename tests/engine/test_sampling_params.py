"""SamplingParams: every bad value is refused by name, and defaults come in their order."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from helexa_engine.errors import InvalidRequest
from helexa_engine.sampling_params import NEUTRAL, SamplingParams, StructuredOutput


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "warm"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("max_tokens", 0),
        ("max_tokens", 2.0),
        ("min_tokens", -1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("seed", 2**64),
        ("logprobs", 65),
        ("prompt_logprobs", -1),
    ],
)
def test_bad_values_name_their_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.path == field
    assert repr(value)[:20] in caught.value.message


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"stop": ["x"] * 10_000}, "stop"),
        ({"stop": ["ok", ""]}, "stop[1]"),
        ({"stop": ["x" * 5000]}, "stop[0]"),
        ({"stop": [3]}, "stop[0]"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids[1]"),
        ({"stop_token_ids": [True]}, "stop_token_ids[0]"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias['a']"),
        ({"logit_bias": {5: 101}}, "logit_bias[5]"),
        ({"logit_bias": {5: math.nan}}, "logit_bias[5]"),
        ({"logit_bias": {-1: 0.0}}, "logit_bias[-1]"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens"),
    ],
)
def test_bad_collections_name_the_place(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**fields)
    assert caught.value.path == path
    assert len(caught.value.message) < 300


def test_accepted_spellings_are_normalised() -> None:
    params = SamplingParams(stop="END", stop_token_ids=[3], logit_bias={"7": 2}, top_k=-1, temperature=1)
    assert params.stop == ("END",) and params.stop_token_ids == (3,)
    assert params.logit_bias == {7: 2.0} and params.top_k == 0 and isinstance(params.temperature, float)
    assert SamplingParams(stop=None).stop == ()  # type: ignore[arg-type]


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 1.0  # type: ignore[misc]


def test_defaults_are_the_call_then_the_model_then_neutral() -> None:
    filled = SamplingParams(temperature=0.1).with_defaults({"temperature": 0.6, "top_k": 20, "unknown": 1})
    assert (filled.temperature, filled.top_k, filled.top_p) == (0.1, 20, 1.0)
    neutral = SamplingParams().with_defaults({})
    assert {name: getattr(neutral, name) for name in NEUTRAL} == NEUTRAL


def test_do_sample_false_is_greedy_unless_the_call_says_otherwise() -> None:
    config = {"do_sample": False, "temperature": 0.6}
    assert SamplingParams().with_defaults(config).temperature == 0.0
    assert SamplingParams(temperature=0.5).with_defaults(config).temperature == 0.5


@pytest.mark.parametrize("fields", [{}, {"json_object": True, "regex": "a"}])
def test_a_structured_output_is_exactly_one_thing(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="exactly one"):
        StructuredOutput(**fields)
