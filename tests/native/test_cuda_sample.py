"""``csrc/cuda/sample.cu`` between guarded pages and under two orders of threads; what it computes is tested in
``tests/engine/ops/test_sample.py`` too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from helexa_engine.ops.sample import reference
from helexa_engine.ops.sample.rows import ROW, Sampled, SampleRow, pack, read
from tests.engine.ops.test_sample import assert_same, rows_of


def sampled(
    core: Any, logits: np.ndarray, rows: list[SampleRow], mask: np.ndarray | None = None, shift: int = 0
) -> list[Sampled]:
    """By the kernels, the logits ``shift`` floats behind an aligned address."""
    table = rows_of(rows)
    size, width = logits.shape
    flat = np.concatenate([np.zeros(shift, np.float32), logits.reshape(-1)])
    values, raw = core.put(flat), core.put(flat)
    masks = None if mask is None else core.put(mask)
    reports = table.num_logprobs is not None
    scratch = core.put(np.full(core.kernels.sample_scratch_words(size, width, reports), -1, np.int64))
    out = core.put(np.full((table.num_words, size), -1, np.int64))
    settings = core.put(pack(rows))
    core.kernels.sample(
        core.address(settings),
        ROW.size,
        size,
        width,
        core.address(values) + 4 * shift,
        core.address(raw) + 4 * shift,
        0 if masks is None else core.address(masks),
        0 if mask is None else mask.shape[1],
        table.adjusts,
        -1 if table.num_logprobs is None else table.num_logprobs,
        core.address(scratch),
        core.address(out),
    )
    return read(core.get(out), [row.num_logprobs for row in rows])


def twin(logits: np.ndarray, rows: list[SampleRow], mask: np.ndarray | None = None) -> list[Sampled]:
    words = reference.sample(torch.from_numpy(logits.copy()), rows_of(rows, mask=mask))
    return read(words.numpy(), [row.num_logprobs for row in rows])


def all_ways(size: int) -> list[SampleRow]:
    """Every way through the kernel: greedy, by place, few and many candidates."""
    settings: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {},
        {"top_k": 20},
        {"top_k": -(-size // 128)},
        {"top_k": -(-size // 128) + 1, "top_p": 0.8},
        {"top_k": 2048, "temperature": 9.0},
        {"top_k": 2049, "temperature": 9.0},
        {"top_p": 0.95},
        {"min_p": 0.1},
        {"top_p": 0.97, "min_p": 1e-3, "temperature": 30.0},
    ]
    rng = np.random.default_rng(size)
    rows = [SampleRow(**({"temperature": 1.0} | s), uniform=rng.random()) for s in settings]
    for i, row in enumerate(rows):
        row.num_logprobs = min(size, i) if i % 2 else None
        row.masked_ids = np.array([size // 2, 0])[: i % 3]
        row.mask = i % 2 if size > 1 else None
    return rows


@pytest.mark.parametrize("size", [1, 3, 128, 2048, 2050, 2300, 2687])
def test_every_way_at_every_width(cuda_core, size: int) -> None:
    rows = all_ways(size)
    rng = np.random.default_rng(size)
    logits = (rng.standard_normal((len(rows), size)) * 2).astype(np.float32)
    mask = np.full((2, -(-size // 32)), -1, np.int32)
    mask[1, ::3] = 0x5A5A5A5A
    assert_same(sampled(cuda_core, logits, rows, mask), twin(logits, rows, mask))


def test_a_whole_vocabulary(cuda_core) -> None:
    """More strips and parts than one pass of the threads takes."""
    rows = [SampleRow(temperature=0.7, top_k=20, top_p=0.8, uniform=0.6, num_logprobs=2), SampleRow(1.0, uniform=0.8)]
    logits = (np.random.default_rng(0).standard_normal((2, 248_320)) * 3).astype(np.float32)
    assert_same(sampled(cuda_core, logits, rows), twin(logits, rows))


def test_rows_that_begin_at_odd_addresses(cuda_core) -> None:
    rows = all_ways(2048)
    for row in rows:
        row.mask = None
    logits = np.random.default_rng(0).standard_normal((len(rows), 2048)).astype(np.float32)
    assert sampled(cuda_core, logits, rows, shift=1) == sampled(cuda_core, logits, rows)


def test_ids_outside_of_the_vocabulary_touch_nothing(cuda_core) -> None:
    logits = np.zeros((2, 40), np.float32)
    rows = [
        SampleRow(masked_ids=np.array([40, 0, 2**31 - 1])),
        SampleRow(bias_ids=np.array([-1]), bias=np.ones(1, "f4")),
    ]
    assert [row.token_id for row in sampled(cuda_core, logits, rows)] == [1, 0]


def test_what_cannot_be_sampled(cuda_core) -> None:
    place = cuda_core.address(cuda_core.put(np.zeros(64, np.int64)))

    def call(**changed: int) -> None:
        arguments = {
            "table": place,
            "row_bytes": ROW.size,
            "rows": 1,
            "cols": 8,
            "logits": place,
            "raw": place,
            "mask": 0,
            "mask_words": 0,
            "adjusts": False,
            "num_top": -1,
            "scratch": place,
            "out": place,
        }
        cuda_core.kernels.sample(**{**arguments, **changed})

    for name, value, expected in (
        ("cols", 0, "1 to 262144"),
        ("cols", 2**18 + 1, "1 to 262144"),
        ("row_bytes", 8, str(ROW.size)),
        ("num_top", 2049, "-1 to 2048"),
    ):
        with pytest.raises(ValueError, match=f"sample: {name}: expected {expected}, got {value}"):
            call(**{name: value})
    with pytest.raises(ValueError, match="sample: mask_words: expected a bit for each column, got 0"):
        call(mask=place)
