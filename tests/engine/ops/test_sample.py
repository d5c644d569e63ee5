"""``sample``: the twin against ``runtime/sampler.py``, which defines it, and the form for CUDA against the twin."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from helexa_engine.ops.sample import reference, sample
from helexa_engine.ops.sample.rows import (
    NOT_FINITE,
    NOTHING_ALLOWED,
    OK,
    Sampled,
    SampleRow,
    SampleRows,
    pack,
    read,
    unpack,
    write,
)
from helexa_engine.runtime import sampler as definition
from helexa_engine.runtime.sampler import Sampler
from helexa_engine.sampling_params import SamplingParams

#: Every filter, alone and together. The kernel's ways part at 2048 candidates and at as many strips of 128 as ``top_k`` asks for.
FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"temperature": 1e-30},
    {"temperature": 50.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 300},
    {"top_k": 2500},
    {"top_k": 10**12},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"min_p": 1e-5},
    {"top_k": 20, "top_p": 0.8, "temperature": 0.6},
    {"top_k": 2500, "top_p": 0.9, "temperature": 4.0},
    {"top_k": 2500, "min_p": 0.3, "temperature": 4.0},
    {"top_k": 50, "min_p": 0.1},
    {"top_p": 0.9, "min_p": 0.05},
    {"top_p": 0.9, "min_p": 0.4, "temperature": 20.0},
    {"top_k": 30, "top_p": 0.95, "min_p": 0.01, "temperature": 1.7},
    {"repetition_penalty": 1.3, "top_k": 40},
    {"frequency_penalty": 0.7, "presence_penalty": -0.4, "top_p": 0.7},
    {"logit_bias": {3: 4.0, 39: -100.0}, "top_k": 10},
    {"temperature": 0.0, "repetition_penalty": 0.8, "presence_penalty": 1.5, "logit_bias": {2: 3.0}, "min_tokens": 9},
]

SHAPES = {
    "narrow": (40, 3.0),
    "one": (1, 1.0),
    "wide": (3001, 3.0),
    "flat": (5000, 0.05),
}


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**fields).with_defaults({})


def sampler_of(size: int, index: int, seed: int, fields: dict[str, Any]) -> Sampler:
    """With a prompt and an answer behind it, as far as the vocabulary has their tokens."""
    ids = [i for i in (1, 2, 2, 5, 7, 30) if i < size]
    fields = {**fields, "logit_bias": {i: v for i, v in fields.get("logit_bias", {}).items() if i < size} or None}
    sampler = Sampler(params(**fields), seed=seed, index=index, prompt_token_ids=ids, end_token_ids=ids[:1])
    for token_id in [i for i in (2, 7, 7, 7, 38) if i < size]:
        sampler.accept(token_id)
    return sampler


def rows_of(rows: list[SampleRow], device: torch.device | None = None, mask: np.ndarray | None = None) -> SampleRows:
    asked = [row.num_logprobs for row in rows if row.num_logprobs is not None]
    return SampleRows(
        torch.from_numpy(pack(rows)).to(device),
        len(rows),
        adjusts=any(row.has_lists for row in rows),
        num_logprobs=max(asked, default=None),
        mask=None if mask is None else torch.from_numpy(mask).to(device),
    )


def logits_of(shape: str, count: int, seed: int) -> np.ndarray:
    """[count, V]; of every third seed with many equals."""
    size, scale = SHAPES[shape]
    values = (np.random.default_rng(seed).standard_normal((count, size)) * scale).astype(np.float32)
    return values if seed % 3 else values.round(1 if scale > 1 else 2)


def by_twin(logits: np.ndarray, rows: list[SampleRow], mask: np.ndarray | None = None) -> list[Sampled]:
    words = reference.sample(torch.from_numpy(logits.copy()), rows_of(rows, mask=mask))
    return read(words.numpy(), [row.num_logprobs for row in rows])


def by_cuda(
    device: torch.device, logits: np.ndarray, rows: list[SampleRow], mask: np.ndarray | None = None
) -> list[Sampled]:
    kernels = sample.choose("cuda")
    words = kernels.sample(torch.from_numpy(logits.copy()).to(device), rows_of(rows, device, mask))
    return read(words.cpu().numpy(), [row.num_logprobs for row in rows])


def assert_same(got: list[Sampled], expected: list[Sampled]) -> None:
    """Equal but for the last bits of log probabilities."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert (a.token_id, a.status) == (b.token_id, b.status), f"row {i}"
        assert a.peak == b.peak or math.isnan(a.peak) and math.isnan(b.peak), f"row {i}"
        assert [token_id for token_id, _ in a.top] == [token_id for token_id, _ in b.top], f"row {i}"
        assert (a.logprob is None) == (b.logprob is None)
        for x, y in zip(
            [a.logprob or 0.0, *dict(a.top).values()], [b.logprob or 0.0, *dict(b.top).values()], strict=True
        ):
            assert x == pytest.approx(y, abs=4e-6), f"row {i}"


@pytest.mark.parametrize("shape", SHAPES)
def test_the_twin_keeps_and_draws_what_the_sampler_does(shape: str) -> None:
    for seed in range(12):
        logits = logits_of(shape, len(FILTERS), seed)
        samplers = [sampler_of(logits.shape[1], i, seed, fields) for i, fields in enumerate(FILTERS)]
        rows = [sampler.row() for sampler in samplers]
        got = by_twin(logits, rows)
        for i, (sampler, row) in enumerate(zip(samplers, rows, strict=True)):
            adjusted = logits[i].copy()
            sampler._adjust(adjusted)
            mine = torch.from_numpy(logits[i].copy())
            reference.adjust(mine, row)
            np.testing.assert_array_equal(mine.numpy(), adjusted)
            if row.temperature > 0.0:
                settings = {name: getattr(row, name) for name in ("temperature", "top_k", "top_p", "min_p")}
                ids, probabilities = definition.candidates(adjusted, **settings)
                my_ids, my_probabilities = reference.candidates(mine, row)
                np.testing.assert_array_equal(my_ids.numpy(), ids)
                np.testing.assert_allclose(my_probabilities.numpy(), probabilities, rtol=1e-5, atol=1e-12)
            assert got[i] == Sampled(sampler.sample(logits[i].copy())[0]), FILTERS[i]


@pytest.mark.parametrize("shape", SHAPES)
def test_cuda_draws_what_the_twin_does(cuda_device: torch.device, shape: str) -> None:
    for seed in range(4):
        logits = logits_of(shape, len(FILTERS), seed)
        rows = [sampler_of(logits.shape[1], i, seed, fields).row() for i, fields in enumerate(FILTERS)]
        assert_same(by_cuda(cuda_device, logits, rows), by_twin(logits, rows))


def test_every_draw_of_a_small_vocabulary(cuda_device: torch.device) -> None:
    """Uniforms from end to end, on both sides of each border between two tokens."""
    logits = np.random.default_rng(0).standard_normal(9).astype(np.float32)
    for settings in ({}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}):
        row = SampleRow(temperature=0.7, **settings)
        _, probabilities = reference.candidates(torch.from_numpy(logits), row)
        borders = (probabilities.cumsum(0) / probabilities.sum()).tolist()[:-1]
        draws = [0.0, 1.0 - 2.0**-53, *(border + shift for border in borders for shift in (-1e-6, 1e-6))]
        rows = [SampleRow(temperature=0.7, uniform=draw, **settings) for draw in draws]
        many = np.repeat(logits[None], len(rows), axis=0)
        expected = by_twin(many, rows)
        assert len({row.token_id for row in expected}) == len(probabilities)
        assert_same(by_cuda(cuda_device, many, rows), expected)


@pytest.mark.parametrize("size", [127, 128, 129, 2047, 2048, 2049, 4100])
def test_equal_logits_at_every_border(cuda_device: torch.device, size: int) -> None:
    """All equal, or a step of equals: who is kept is a question of ids alone."""
    logits = np.zeros((12, size), np.float32)
    logits[6:, size // 3 :] = -0.5
    rows = [
        SampleRow(temperature=1.0, uniform=0.93, num_logprobs=3, **settings)
        for settings in 2
        * (
            {"top_k": 2},
            {"top_k": size - 1},
            {"top_p": 0.9},
            {"top_k": size * 2 // 3, "top_p": 0.5},
            {"min_p": 0.7},
            {"top_k": size * 2 // 3, "min_p": 0.7},
        )
    ]
    expected = by_twin(logits, rows)
    assert_same(by_cuda(cuda_device, logits, rows), expected)
    assert expected[0].token_id == 1 and expected[0].top[2][0] == 2


@pytest.mark.parametrize("size", [5, 64, 300, 2500, 5000])
def test_log_probabilities(cuda_device: torch.device, size: int) -> None:
    """Of the logits before anything is done to them; of as many as each row asks for."""
    rng = np.random.default_rng(size)
    logits = (rng.standard_normal((6, size)) * 3).astype(np.float32)
    logits[3] = logits[3].round()
    logits[4] = 1.0
    rows = [
        SampleRow(temperature=1.0, uniform=0.4, num_logprobs=count, bias_ids=np.array([2]), bias=np.float32([bias]))
        for count, bias in ((0, 0.0), (min(5, size), 30.0), (None, 0.0), (min(64, size), -5.0), (3, 0.0), (1, 9.0))
    ]
    expected = by_twin(logits, rows)
    got = by_cuda(cuda_device, logits, rows)
    assert_same(got, expected)
    truth = torch.from_numpy(logits).double().log_softmax(1)
    for i, row in enumerate(got):
        if row.logprob is not None:
            assert row.logprob == pytest.approx(float(truth[i, row.token_id]), abs=1e-5)
            assert len(row.top) == rows[i].num_logprobs
    assert got[1].token_id == 2 and got[4].top[:2] == ((0, got[4].top[0][1]), (1, got[4].top[0][1]))


def test_what_cannot_be_sampled_is_said_of_its_row_alone(cuda_device: torch.device) -> None:
    logits = np.random.default_rng(1).standard_normal((9, 700)).astype(np.float32)
    logits[0, 650] = np.nan
    logits[1, 3] = np.inf
    logits[2] = -np.inf
    logits[3, [4, 690]] = [np.inf, np.nan]
    logits[4, 17] = -np.inf
    logits[5] = -np.inf
    logits[6, 3] = logits[7, 3] = np.nan
    mask = np.full((1, 22), -1, np.int32)
    mask[0, 0] = ~(1 << 3)
    rows = [SampleRow(temperature=i % 2, top_k=5 * (i % 3), uniform=0.5) for i in range(9)]
    rows[5].num_logprobs = 2
    rows[6].mask = 0  # hides the NaN
    rows[7].mask, rows[7].num_logprobs = 0, 0  # of which the log probabilities know
    expected = by_twin(logits, rows, mask)
    got = by_cuda(cuda_device, logits, rows, mask)
    assert_same(got, expected)
    assert [row.status for row in got] == [NOT_FINITE] * 2 + [NOTHING_ALLOWED, NOT_FINITE, OK, NOTHING_ALLOWED] + [
        OK,
        NOT_FINITE,
        OK,
    ]
    assert math.isnan(got[0].peak) and got[1].peak == math.inf and math.isnan(got[3].peak)
    assert [row.token_id for row in got if row.status] == [0] * 6


@pytest.mark.parametrize("size", [31, 32, 33, 2500])
def test_masks_and_forced_tokens(cuda_device: torch.device, size: int) -> None:
    rng = np.random.default_rng(size)
    logits = np.repeat((rng.standard_normal((1, size)) * 2).astype(np.float32), 8, axis=0)
    words = -(-size // 32)
    mask = rng.integers(-(2**31), 2**31, (3, words), dtype=np.int64).astype(np.int32)
    mask[2] = 0
    rows = [SampleRow(temperature=float(i % 2), uniform=0.99, mask=i // 2 % 2, num_logprobs=1) for i in range(4)]
    rows += [SampleRow(temperature=1.0, top_p=0.9, uniform=0.5, mask=0), SampleRow(mask=2)]
    rows += [SampleRow(temperature=1.0, forced=30, num_logprobs=2), SampleRow(forced=7, masked_ids=np.array([7]))]
    expected = by_twin(logits, rows, mask)
    got = by_cuda(cuda_device, logits, rows, mask)
    assert_same(got, expected)
    for row, result in zip(rows[:5], got, strict=False):
        assert mask[row.mask, result.token_id // 32] >> (result.token_id % 32) & 1
    assert got[5].status == NOTHING_ALLOWED and (got[6].token_id, got[7].token_id) == (30, 7)


def test_a_batch_is_its_rows_alone(cuda_device: torch.device) -> None:
    """Bit for bit, and twice the same."""
    fields = [{**settings, "logprobs": 2} for settings in FILTERS]
    logits = logits_of("wide", len(fields), 5)
    rows = [sampler_of(logits.shape[1], i, 5, settings).row() for i, settings in enumerate(fields)]
    together = by_cuda(cuda_device, logits, rows)
    assert by_cuda(cuda_device, logits, rows) == together
    for i in range(0, len(rows), 3):
        assert by_cuda(cuda_device, logits[i : i + 1], rows[i : i + 1]) == together[i : i + 1]


def test_no_rows() -> None:
    assert reference.sample(torch.empty(0, 7), rows_of([])).shape == (2, 0)


def test_no_rows_on_cuda(cuda_device: torch.device) -> None:
    assert by_cuda(cuda_device, np.empty((0, 7), np.float32), []) == []


def test_numbers_beyond_the_table_s_are_its_largest() -> None:
    [row] = unpack(pack([SampleRow(top_k=10**30, repetition_penalty=1e300)]), 1)
    assert row.top_k == 2**31 - 1 and row.repetition_penalty == float(np.finfo(np.float32).max)


def test_tables_and_results_are_read_as_they_were_written() -> None:
    rows = [
        SampleRow(),
        SampleRow(
            temperature=0.1,
            top_k=3,
            top_p=0.2,
            min_p=0.3,
            uniform=1 - 2.0**-53,
            repetition_penalty=1.5,
            frequency_penalty=-0.5,
            presence_penalty=0.25,
            bias_ids=np.array([9, 4]),
            bias=np.float32([-1, 2]),
            seen_ids=np.array([1]),
            output_ids=np.array([5, 6, 7]),
            output_counts=np.float32([1, 2, 3]),
            masked_ids=np.array([8, 2]),
            mask=1,
            forced=0,
            num_logprobs=0,
        ),
        SampleRow(masked_ids=np.array([3]), num_logprobs=64),
    ]
    assert list(map(str, unpack(pack(rows), 3))) == list(map(str, rows))
    sampled = [
        Sampled(248_319),
        Sampled(5, logprob=-0.5, top=((5, -0.5), (248_319, -1.25), (0, -math.inf))),
        Sampled(0, NOT_FINITE, math.inf),
        Sampled(0, NOTHING_ALLOWED, -math.inf),
    ]
    assert read(write(sampled, 6), [None, 3, None, 3]) == sampled
