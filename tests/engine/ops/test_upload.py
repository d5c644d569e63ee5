"""What is uploaded arrives byte for byte, whatever the size of the pieces and wherever the bytes lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helexa_engine.ops import upload as module
from helexa_engine.ops.upload import Uploads, end_uploads, upload


@pytest.fixture
def uploads(cuda_device: torch.device) -> Uploads:
    return Uploads(cuda_device, piece_bytes=100, num_pieces=3)


def numbers(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, count, dtype=np.uint8)


@pytest.mark.parametrize("count", [0, 1, 99, 100, 101, 300, 301, 4567])
def test_bytes_arrive(uploads: Uploads, count: int, cuda_device: torch.device) -> None:
    """More pieces than there are buffers, so that a buffer filled too early would show."""
    data = numbers(count)
    tensor = uploads.upload(data)
    assert tensor.device.type == cuda_device.type and tensor.dtype == torch.uint8
    np.testing.assert_array_equal(tensor.cpu().numpy(), data)
    again = uploads.upload(data[::-1].copy())
    np.testing.assert_array_equal(again.cpu().numpy(), data[::-1])
    uploads.close()


def test_rows_of_a_wider_table(uploads: Uploads) -> None:
    """The experts of a stack may lie apart."""
    data = numbers(7 * 400).reshape(7, 400)[:, 30:280]
    np.testing.assert_array_equal(uploads.upload(data).cpu().numpy(), data.reshape(-1))


def test_what_cannot_be_read_is_raised_and_leaves_the_buffers(
    uploads: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("the file is gone")

    with monkeypatch.context() as patch:
        patch.setattr(np, "copyto", fail)
        with pytest.raises(OSError, match="the file is gone"):
            uploads.upload(numbers(5000))
    data = numbers(5000)
    np.testing.assert_array_equal(uploads.upload(data).cpu().numpy(), data)


def test_the_buffers_are_kept_until_the_model_is_loaded(
    cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 64)
    upload(numbers(10), cuda_device)
    kept = dict(module._uploads)
    upload(numbers(10), cuda_device)
    assert module._uploads == kept and len(kept) == 1
    end_uploads()
    assert not module._uploads
