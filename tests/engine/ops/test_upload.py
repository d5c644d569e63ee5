"""What is uploaded arrives byte for byte, whatever the size of the pieces and wherever the bytes lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helexa_engine.ops import cuda
from helexa_engine.ops import upload as module
from helexa_engine.ops.upload import Uploads, end_uploads, upload_planes
from helexa_engine.quant import types
from helexa_engine.quant.types import QuantType


@pytest.fixture
def uploads(cuda_device: torch.device) -> Uploads:
    return Uploads(cuda_device, piece_bytes=100, num_pieces=3)


def numbers(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, count, dtype=np.uint8)


def arrived(uploads: Uploads, data: np.ndarray, row_bytes: int) -> np.ndarray:
    pieces = list(uploads.pieces(data, row_bytes))
    assert all(0 < piece.numel() <= 100 and piece.numel() % row_bytes == 0 for piece in pieces)
    return torch.cat(pieces).cpu().numpy() if pieces else np.empty(0, np.uint8)


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 12, 13, 200])
def test_bytes_arrive(uploads: Uploads, rows: int) -> None:
    """More pieces than there are buffers, so that a buffer filled too early would show."""
    data = numbers(30 * rows)
    np.testing.assert_array_equal(arrived(uploads, data, 30), data)
    np.testing.assert_array_equal(arrived(uploads, data[::-1].copy(), 30), data[::-1])
    uploads.close()


def test_a_stack_whose_matrices_lie_apart(uploads: Uploads) -> None:
    data = numbers(7 * 400).reshape(7, 400)[:, 30:280]
    np.testing.assert_array_equal(arrived(uploads, data, 25), data.reshape(-1))


def test_what_cannot_be_read_is_raised_and_leaves_the_buffers(
    uploads: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("the file is gone")

    with monkeypatch.context() as patch:
        patch.setattr(np, "copyto", fail)
        with pytest.raises(OSError, match="the file is gone"):
            arrived(uploads, numbers(5000), 50)
    data = numbers(5000)
    np.testing.assert_array_equal(arrived(uploads, data, 50), data)


def test_a_row_that_no_buffer_holds(uploads: Uploads) -> None:
    with pytest.raises(ValueError, match="row_bytes: expected at most 100, got 101"):
        next(uploads.pieces(numbers(202), 101))


@pytest.mark.parametrize("quant_type", [types.Q4_K, types.Q6_K, types.Q8_0, types.BF16], ids=str)
def test_planes_have_the_blocks_of_the_file(quant_type: QuantType, cuda_device: torch.device) -> None:
    """In pieces of a few rows, and as a stack of three."""
    rows, cols = 21, 512
    row_bytes = quant_type.row_bytes(cols)
    module._uploads[cuda_device] = Uploads(cuda_device, piece_bytes=2 * row_bytes + 7, num_pieces=3)
    data = numbers(rows * row_bytes)
    for given in (data, data.reshape(3, -1)):
        planes = upload_planes(quant_type, given, rows, cols, cuda_device)
        assert planes.data_ptr() % 256 == 0
        back = torch.zeros(data.size, dtype=torch.uint8, device=cuda_device)
        cuda.require_kernels().unpack_planes(
            quant_type.number, planes.data_ptr(), 0, rows, rows, cols, back.data_ptr(), cuda.stream(back)
        )
        np.testing.assert_array_equal(back.cpu().numpy(), data)
    end_uploads()
    assert not module._uploads


def test_data_of_another_size(cuda_device: torch.device) -> None:
    with pytest.raises(ValueError, match="expected 288 bytes as uint8 for 2 x 256 Q4_K, got 144"):
        upload_planes(types.Q4_K, numbers(144), 2, 256, cuda_device)
