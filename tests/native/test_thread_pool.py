"""The native core's threads: their number, life across fork, and the probes that run on them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest

from helexa_engine.ops.registry import native_core

_native = native_core()
pytestmark = pytest.mark.skipif(_native is None, reason="the native core is not built")


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    yield
    _native.set_num_threads(0)


def _dequantized() -> np.ndarray:
    """A computation long enough to be shared among threads."""
    source = np.arange(1 << 20, dtype=np.float16)
    out = np.full(source.size, np.nan, dtype=np.float32)
    _native.dequantize(1, source.ctypes.data, source.size, out.ctypes.data)
    return out


def test_the_default_is_at_most_the_cores_we_may_use() -> None:
    assert 1 <= _native.num_threads() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_every_number_of_threads_covers_the_work(threads: int) -> None:
    _native.set_num_threads(threads)
    assert _native.num_threads() == threads
    with np.errstate(over="ignore"):
        expected = np.arange(1 << 20, dtype=np.float16).astype(np.float32)
    np.testing.assert_array_equal(_dequantized(), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_gets_threads_of_its_own() -> None:
    _native.set_num_threads(2)
    expected = _dequantized()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a hang ends as a failure
        os._exit(0 if np.array_equal(_dequantized(), expected, equal_nan=True) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_probes_give_positive_rates() -> None:
    assert _native.read_bandwidth(8 << 20, 1, 1) > 1e8
    assert _native.int8_rate() > 1e8 and _native.float_rate() > 1e8
    with pytest.raises(ValueError, match="read_bandwidth: nbytes: expected at least 1 MiB, got 1"):
        _native.read_bandwidth(1)
