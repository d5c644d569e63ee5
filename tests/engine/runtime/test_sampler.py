"""The sampler against a plain slow twin, statistically, and on its edges."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from helexa_engine.runtime import sampler as module
from helexa_engine.runtime.sampler import Sampler, SamplingFailed, candidates, largest, log_probabilities
from helexa_engine.sampling_params import SamplingParams


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**fields).with_defaults({})


def make(
    seed: int = 1, index: int = 0, prompt: tuple[int, ...] = (), end: tuple[int, ...] = (), **fields: Any
) -> Sampler:
    return Sampler(params(**fields), seed=seed, index=index, prompt_token_ids=prompt, end_token_ids=end)


def twin_distribution(logits: np.ndarray, p: SamplingParams, prompt: list[int], output: list[int]) -> dict[int, float]:
    """The definition, one token at a time in float64: token id -> probability of being drawn at a temperature above 0."""
    x = {i: float(v) for i, v in enumerate(logits)}
    for i, bias in (p.logit_bias or {}).items():
        x[i] += bias
    for i in set(prompt) | set(output):
        x[i] = x[i] / p.repetition_penalty if x[i] > 0 else x[i] * p.repetition_penalty
    for i in set(output):
        x[i] -= output.count(i) * p.frequency_penalty + p.presence_penalty
    peak = max(x.values())
    weight = {i: math.exp((v - peak) / p.temperature) for i, v in x.items()}
    order = sorted(weight, key=lambda i: (-x[i], i))
    if p.top_k:
        order = order[: p.top_k]
    if p.top_p < 1.0:
        total, mass, kept = sum(weight[i] for i in order), 0.0, []
        for i in order:
            kept.append(i)
            mass += weight[i]
            if mass >= p.top_p * total:
                break
        order = kept
    order = [i for i in order if weight[i] >= p.min_p * weight[order[0]]]
    total = sum(weight[i] for i in order)
    return {i: weight[i] / total for i in order}


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 5000},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8, "temperature": 0.6},
    {"top_k": 50, "min_p": 0.1},
    {"top_p": 0.9, "min_p": 0.05},
    {"top_k": 30, "top_p": 0.95, "min_p": 0.01, "temperature": 1.7},
    {"repetition_penalty": 1.3, "top_k": 40},
    {"frequency_penalty": 0.7, "presence_penalty": -0.4, "top_p": 0.7},
    {"logit_bias": {3: 4.0, 900: -100.0}, "top_k": 10},
]


@pytest.mark.parametrize("fields", FILTERS, ids=str)
@pytest.mark.parametrize("size", [40, 1000, 9001])
def test_distribution_equals_the_twin(fields: dict[str, Any], size: int) -> None:
    rng = np.random.default_rng(size)
    logits = (rng.standard_normal(size) * 3).astype(np.float32)
    if size < 900:
        fields = {k: v for k, v in fields.items() if k != "logit_bias"}
    prompt, output = [1, 2, 2, 5], [2, 7, 7, 7]
    p = params(**fields)
    expected = twin_distribution(logits, p, prompt, output)
    s = Sampler(p, seed=0, prompt_token_ids=prompt)
    for token_id in output:
        for counts in (s._output, s._seen):
            if counts is not None:
                counts.add(token_id)
    adjusted = logits.copy()
    s._adjust(adjusted)
    ids, weights = candidates(adjusted, temperature=p.temperature, top_k=p.top_k, top_p=p.top_p, min_p=p.min_p)
    assert sorted(ids) == sorted(expected)
    got = dict(zip(ids.tolist(), weights / weights.sum(), strict=True))
    assert max(abs(got[i] - expected[i]) for i in expected) < 1e-6


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000, 20000])
@pytest.mark.parametrize("ties", [False, True])
def test_largest_is_a_stable_sort(size: int, ties: bool) -> None:
    rng = np.random.default_rng(size)
    values = (rng.integers(0, 5, size) if ties else rng.standard_normal(size)).astype(np.float32)
    order = sorted(range(size), key=lambda i: (-values[i], i))
    for count in {1, min(20, size), min(300, size), size}:
        assert largest(values, count).tolist() == order[:count]


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.07, 0.03], np.float32))
    s = make(seed=123)
    n = 20000
    counts = np.bincount([s.sample(logits.copy())[0] for _ in range(n)], minlength=5)
    expected = n * np.array([0.5, 0.25, 0.15, 0.07, 0.03])
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 18.5, counts  # 4 degrees of freedom, p = 0.001


def test_uniforms_are_uniform_and_their_streams_independent() -> None:
    def stream(seed: int, index: int) -> np.ndarray:
        s = make(seed=seed, index=index)
        values = []
        for _ in range(4000):
            values.append(s._uniform())
            s.num_generated += 1
        return np.array(values)

    streams = [stream(0, 0), stream(1, 0), stream(0, 1), stream(-1, 0)]
    for values in streams:
        histogram = np.histogram(values, 20, (0.0, 1.0))[0]
        assert ((histogram - 200.0) ** 2 / 200.0).sum() < 43.8  # 19 degrees of freedom, p = 0.001
    assert np.abs(np.corrcoef(streams) - np.eye(4)).max() < 0.06


def test_same_seed_same_tokens_and_each_answer_its_own_stream() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((50, 500)).astype(np.float32)

    def run(seed: int, index: int) -> list[int]:
        s = make(seed=seed, index=index, top_k=50)
        return [s.sample(row.copy())[0] for row in rows]

    assert run(7, 0) == run(7, 0)
    assert run(7, 0) != run(8, 0)
    assert run(7, 0) != run(7, 1)


def test_greedy_takes_the_lowest_id_among_equals_and_has_no_hidden_penalty() -> None:
    logits = np.array([1.0, 3.0, 3.0, 2.0], np.float32)
    s = make(temperature=0.0, prompt=(1, 1, 1))
    assert [s.sample(logits.copy())[0] for _ in range(20)] == [1] * 20


def test_greedy_applies_the_penalties_that_were_asked_for() -> None:
    logits = np.array([1.0, 3.0, 2.9, -1.0], np.float32)
    assert make(temperature=0.0, repetition_penalty=1.1, prompt=(1,)).sample(logits.copy())[0] == 2
    s = make(temperature=0.0, frequency_penalty=0.2)
    assert [s.sample(logits.copy())[0] for _ in range(3)] == [1, 2, 1]
    s = make(temperature=0.0, presence_penalty=2.0)
    assert [s.sample(logits.copy())[0] for _ in range(4)] == [1, 2, 0, 1]


def test_negative_logits_are_multiplied_by_the_repetition_penalty() -> None:
    logits = np.array([-1.0, -1.5], np.float32)
    assert make(temperature=0.0, repetition_penalty=2.0, prompt=(0,)).sample(logits)[0] == 1


def test_min_tokens_masks_end_tokens_only_so_long() -> None:
    logits = np.array([0.0, 5.0, 4.0, 1.0], np.float32)
    s = make(temperature=0.0, min_tokens=2, end=(1, 2))
    assert [s.sample(logits.copy())[0] for _ in range(3)] == [3, 3, 1]


def test_logit_bias_forces_and_forbids() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(100).astype(np.float32)
    s = make(logit_bias={42: 100.0})
    assert {s.sample(logits.copy())[0] for _ in range(20)} == {42}
    best = int(logits.argmax())
    assert make(temperature=0.0, logit_bias={best: -100.0}).sample(logits.copy())[0] == int(np.argsort(-logits)[1])


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    rng = np.random.default_rng(3)
    logits = (rng.standard_normal(1000) * 4).astype(np.float32)
    expected = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    s = make(logprobs=4, temperature=0.2, top_k=2, logit_bias={17: 50.0})
    token_id, report = s.sample(logits.copy())
    assert token_id == 17 and report is not None
    assert report.logprob == pytest.approx(expected[17], abs=1e-5)
    order = np.argsort(-expected)[:4]
    assert [i for i, _ in report.top] == order.tolist()
    assert [p for _, p in report.top] == pytest.approx(expected[order].tolist(), abs=1e-5)
    assert make(logprobs=0).sample(logits.copy())[1].top == ()  # type: ignore[union-attr]
    assert make().sample(logits.copy())[1] is None


def test_log_probabilities_survive_large_logits() -> None:
    values = log_probabilities(np.array([1e4, 1e4 - 1, -1e4], np.float32))
    assert values[0] == pytest.approx(-math.log1p(math.exp(-1)), abs=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 0.0, "logit_bias": {3: 100.0}},
        {"temperature": 0.0, "repetition_penalty": 1.9},
        {"temperature": 0.0, "frequency_penalty": 1.5},
        {"temperature": 0.0, "min_tokens": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_the_place_of_the_largest_logit_changes_nothing(fields: dict[str, Any], bad: float | None) -> None:
    logits = np.random.default_rng(5).integers(-9, 9, 300).astype(np.float32)  # many equals
    if bad is not None:
        logits[[70, 200]] = bad
    end = (int(logits.argmax()),)  # masked by min_tokens
    told, untold = (make(prompt=(1, 2, 70), end=end, **fields) for _ in range(2))
    for _ in range(6):
        if bad is None:
            assert told.sample(logits.copy(), int(logits.argmax())) == untold.sample(logits.copy())
        else:
            with pytest.raises(SamplingFailed, match="not finite"):
                told.sample(logits.copy(), int(logits.argmax()))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"top_k": 5}, {"logprobs": 1}], ids=str)
def test_logits_that_are_not_finite_are_an_error(bad: float, fields: dict[str, Any]) -> None:
    logits = np.zeros(100, np.float32)
    logits[31] = bad
    with pytest.raises(SamplingFailed, match="not finite"):
        make(**fields).sample(logits)


class OnlyGrammar:
    """Allows a fixed set of tokens and remembers what was accepted."""

    def __init__(self, *allowed: int) -> None:
        self.allowed = list(allowed)
        self.accepted: list[int] = []

    def apply(self, logits: np.ndarray) -> None:
        keep = logits[self.allowed].copy()
        logits[:] = -np.inf
        logits[self.allowed] = keep

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)

    def is_finished(self) -> bool:
        return False


def test_grammar_masks_and_advances() -> None:
    grammar = OnlyGrammar(3, 4)
    s = Sampler(params(top_p=0.9), seed=0, grammar=grammar)
    tokens = [s.sample(np.zeros(10, np.float32))[0] for _ in range(20)]
    assert set(tokens) == {3, 4} and grammar.accepted == tokens


def test_nothing_allowed_is_an_error_of_its_own() -> None:
    with pytest.raises(SamplingFailed, match="no token is allowed"):
        Sampler(params(), seed=0, grammar=OnlyGrammar()).sample(np.zeros(10, np.float32))


def test_token_counts_grow() -> None:
    counts = module._TokenCounts()
    stream = np.random.default_rng(0).integers(0, 500, 3000).tolist()
    for token_id in stream:
        counts.add(token_id)
    ids, numbers = counts.view()
    assert dict(zip(ids.tolist(), numbers.tolist(), strict=True)) == {i: stream.count(i) for i in set(stream)}


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    logits = np.array([100.0, -100.0, 99.9], np.float32)
    for fields in ({"temperature": 1e-30}, {"temperature": 1e-30, "top_k": 2}, {"temperature": 1e-30, "top_p": 0.5}):
        assert make(**fields).sample(logits.copy())[0] == 0
