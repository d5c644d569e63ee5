"""``argmax``: the twin against numpy, the native form against the twin, place for place."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from helexa_engine.ops.argmax import reference
from helexa_engine.ops.registry import native_core

_native = native_core()
needs_native = pytest.mark.skipif(_native is None, reason="the native core is not built")

WIDTHS = (1, 7, 15, 16, 17, 4095, 4096, 4097, 8192, 20011)  # the core's lanes are 16, its blocks 4096


def _rows(width: int) -> torch.Tensor:
    """Rows [8, width]: random; with equals first, last and everywhere; with infinities, signed zeros and NaNs."""
    rows = torch.randn(8, width, generator=torch.Generator().manual_seed(width))
    rows[1] = rows[1].round()  # many equals
    rows[2] = 3.5
    rows[3, [0, -1]] = 9.0
    rows[4] = -torch.inf
    rows[5, width // 2] = torch.inf
    rows[6] = -rows[6].abs() * (torch.arange(width) % 3 > 0)  # -0.0 and 0.0 are equals
    rows[7, [width // 3, -1]] = torch.nan
    return rows


@pytest.fixture(params=[1, 2, 3])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    _native.set_num_threads(request.param)
    yield
    _native.set_num_threads(0)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_twin_takes_what_numpy_takes(width: int) -> None:
    rows = _rows(width)
    np.testing.assert_array_equal(reference.argmax(rows).numpy(), rows.numpy().argmax(axis=1))


@needs_native
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("width", WIDTHS)
def test_the_native_form_takes_the_same_places(width: int) -> None:
    from helexa_engine.ops.argmax import native

    rows = _rows(width)
    assert torch.equal(native.argmax(rows), reference.argmax(rows))
    for row in rows:
        assert torch.equal(native.argmax(row[None]), reference.argmax(row[None]))


@needs_native
def test_no_rows_are_none_and_no_columns_an_error() -> None:
    from helexa_engine.ops.argmax import native

    assert native.argmax(torch.empty(0, 5)).shape == (0,)
    with pytest.raises(ValueError, match="argmax: cols: expected at least 1, got 0"):
        _native.argmax(torch.empty(1).data_ptr(), 1, 0, torch.empty(1, dtype=torch.int64).data_ptr())
