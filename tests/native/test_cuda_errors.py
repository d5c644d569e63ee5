"""What a failed launch raises, and what the core says of devices on a machine without any."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from helexa_engine.ops import cuda


@pytest.fixture
def simt(simt: Any) -> Iterator[Any]:
    """The kernels, whose launches may be made to fail."""
    yield simt
    simt.fail_launches(0)


def launch(kernels: Any) -> None:
    values, rounded = np.ones(64, np.float32), np.empty(64, np.uint16)
    kernels.rms_norm(values.ctypes.data, 1, 64, 0, 0.0, rounded.ctypes.data, 0)


def test_a_failed_launch_has_the_runtimes_code(simt: Any) -> None:
    simt.fail_launches(2, after=1)
    launch(simt)
    with pytest.raises(simt.CudaError, match="rms_norm") as caught:
        launch(simt)
    assert isinstance(caught.value, RuntimeError) and caught.value.code == 2
    launch(simt)


def test_some_errors_stick(simt: Any) -> None:
    simt.fail_launches(700, sticks=True)
    for _ in range(2):
        with pytest.raises(simt.CudaError):
            launch(simt)


def test_bad_arguments_are_no_cuda_errors(simt: Any) -> None:
    with pytest.raises(ValueError, match="cols"):
        simt.rms_norm(64, 1, 3, 0, 0.0, 64, 0)


def test_the_core_answers_without_a_driver() -> None:
    kernels = cuda.kernels()
    if kernels is None:
        pytest.skip("this build has no CUDA kernels")
    assert kernels.architectures.split() and kernels.runtime_version() >= 12080
    if kernels.driver_version() == 0:
        with pytest.raises(kernels.CudaError) as caught:
            kernels.devices()
        assert caught.value.code == 35  # cudaErrorInsufficientDriver: there is none
    else:
        for name, major, _, memory in kernels.devices():
            assert name and major >= 1 and memory > 0
