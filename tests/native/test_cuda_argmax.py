"""``csrc/cuda/argmax.cu`` and the op over it: the places that numpy takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helexa_engine.ops.argmax import argmax
from helexa_engine.testing.cuda_core import emulated_cuda, emulation

PART = 2048  # values a block looks at
WIDTHS = (
    1,
    3,
    4,
    127,
    PART - 1,
    PART,
    PART + 1,
    32 * PART + 5,
    34 * PART,
)  # a warp takes the best of 32 parts at a time


def rows_of(width: int) -> np.ndarray:
    """Rows [9, width]: random; with equals first, last and everywhere; with infinities, signed zeros and NaNs; all NaN."""
    rows = np.random.default_rng(width).standard_normal((9, width)).astype(np.float32)
    rows[1] = rows[1].round()  # many equals
    rows[2] = 3.5
    rows[3, [0, -1]] = 9.0
    rows[4] = -np.inf
    rows[5, width // 2] = np.inf
    rows[6] = -np.abs(rows[6]) * (np.arange(width) % 3 > 0)  # -0.0 and 0.0 are equals
    rows[7, [width // 3, -1]] = [np.nan, -np.nan]
    rows[8] = np.nan
    return rows


@pytest.mark.parametrize("width", WIDTHS)
def test_takes_the_places_that_numpy_takes(cuda_core, width: int) -> None:
    rows = rows_of(width)
    values = cuda_core.put(rows)
    scratch = cuda_core.put(np.full(cuda_core.kernels.argmax_scratch_words(*rows.shape), -1, np.int64))
    out = cuda_core.put(np.full(len(rows), -1, np.int64))
    cuda_core.kernels.argmax(*map(cuda_core.address, [values]), *rows.shape, *map(cuda_core.address, [scratch, out]))
    np.testing.assert_array_equal(cuda_core.get(out), rows.argmax(axis=1))


def test_rows_that_begin_at_odd_addresses(cuda_core) -> None:
    rows = np.random.default_rng(0).standard_normal((3, 4096)).astype(np.float32)
    values = cuda_core.put(np.concatenate([[0], rows.reshape(-1)]).astype(np.float32))
    scratch, out = cuda_core.put(np.zeros(6, np.int64)), cuda_core.put(np.full(3, -1, np.int64))
    places = [cuda_core.address(values) + 4, *rows.shape, cuda_core.address(scratch), cuda_core.address(out)]
    cuda_core.kernels.argmax(*places)
    np.testing.assert_array_equal(cuda_core.get(out), rows.argmax(axis=1))


def test_no_columns_are_an_error(cuda_core) -> None:
    place = cuda_core.address(cuda_core.put(np.zeros(4, np.float32)))
    with pytest.raises(ValueError, match=r"argmax: cols: expected at least 1 .* got 0"):
        cuda_core.kernels.argmax(place, 1, 0, place, place)


@pytest.mark.skipif(emulation() is None, reason="the emulation is not built")
def test_the_op_is_the_kernel() -> None:
    rows = torch.from_numpy(rows_of(300))
    with emulated_cuda():
        kernels = argmax.choose("cuda")
        assert kernels.__name__.endswith("cuda")
        assert kernels.argmax(rows).tolist() == rows.numpy().argmax(axis=1).tolist()
        assert kernels.argmax(rows[:0]).shape == (0,)
