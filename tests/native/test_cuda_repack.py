"""Planes: the bytes they take, and that blocks survive the way there and back (``csrc/cuda/repack.cu``)."""

from __future__ import annotations

import numpy as np
import pytest

from helexa_engine.ops.quant_matmul import planes
from helexa_engine.quant import dequantize, types
from helexa_engine.quant.types import QuantType

TYPES = [t for t in types.QUANT_TYPES if t.name in planes.FIELDS]


def random_bytes(quant_type: QuantType, rows: int, cols: int) -> np.ndarray:
    rng = np.random.default_rng([quant_type.number, rows, cols])
    return rng.integers(0, 256, rows * quant_type.row_bytes(cols), dtype=np.uint8)


def planes_of(quant_type: QuantType, data: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """The same cut with numpy; what lies between planes stays 0xff."""
    out = np.full(planes.planes_bytes(quant_type, rows, cols), 0xFF, np.uint8)
    blocks = data.reshape(rows, -1, quant_type.block_bytes)
    begin = offset = 0
    for field in planes.FIELDS[quant_type.name]:
        width = blocks.shape[1] * field
        pitch = (width + 15) // 16 * 16
        plane = np.zeros((rows, pitch), np.uint8)
        plane[:, :width] = blocks[:, :, offset : offset + field].reshape(rows, -1)
        begin = (begin + 255) // 256 * 256
        out[begin : begin + plane.size] = plane.reshape(-1)
        begin, offset = begin + plane.size, offset + field
    return out


def test_every_type_that_models_are_stored_in_is_kept_in_planes() -> None:
    assert {t for t in types.QUANT_TYPES if t.is_quantised} <= set(TYPES)


@pytest.mark.parametrize("quant_type", TYPES, ids=str)
def test_fields_are_those_of_the_block(quant_type: QuantType) -> None:
    """Each begins where a member of the decoders' layout does."""
    fields = planes.FIELDS[quant_type.name]
    assert sum(fields) == quant_type.block_bytes
    if quant_type.is_quantised:
        layout, _ = dequantize._DECODERS[quant_type.name]
        starts = {layout.fields[name][1] for name in layout.names}
        assert {sum(fields[:i]) for i in range(len(fields))} <= starts


@pytest.mark.parametrize("quant_type", TYPES, ids=str)
def test_there_and_back(cuda_core, quant_type: QuantType) -> None:
    for rows, blocks in ((1, 1), (3, 5), (70, 2)):
        cols = blocks * quant_type.block_size
        data = random_bytes(quant_type, rows, cols)
        expected = planes_of(quant_type, data, rows, cols)
        size = cuda_core.kernels.planes_bytes(quant_type.number, rows, cols)
        assert size == planes.planes_bytes(quant_type, rows, cols)
        packed = cuda_core.put(np.full(size, 0xFF, np.uint8))
        source = cuda_core.put(data)
        address = cuda_core.address(packed)
        cuda_core.kernels.repack_planes(quant_type.number, cuda_core.address(source), 0, rows, rows, cols, address)
        np.testing.assert_array_equal(cuda_core.get(packed), expected)
        back = cuda_core.put(np.zeros_like(data))
        cuda_core.kernels.unpack_planes(quant_type.number, address, 0, rows, rows, cols, cuda_core.address(back))
        np.testing.assert_array_equal(cuda_core.get(back), data)


@pytest.mark.parametrize("quant_type", [types.Q4_K, types.Q6_K, types.F16], ids=str)
def test_piece_by_piece(cuda_core, quant_type: QuantType) -> None:
    """As a loader does whose buffer holds a few rows."""
    rows, cols = 7, 2 * quant_type.block_size
    data = random_bytes(quant_type, rows, cols).reshape(rows, -1)
    packed = cuda_core.put(np.full(planes.planes_bytes(quant_type, rows, cols), 0xFF, np.uint8))
    back = cuda_core.put(np.zeros_like(data[2:6]))
    for first, last in ((0, 3), (3, 4), (4, 4), (4, 7)):
        piece = cuda_core.put(data[first:last] if last > first else np.zeros(1, np.uint8))
        arguments = (first, last - first, rows, cols, cuda_core.address(packed))
        cuda_core.kernels.repack_planes(quant_type.number, cuda_core.address(piece), *arguments)
    np.testing.assert_array_equal(cuda_core.get(packed), planes_of(quant_type, data.reshape(-1), rows, cols))
    arguments = (cuda_core.address(packed), 2, 4, rows, cols, cuda_core.address(back))
    cuda_core.kernels.unpack_planes(quant_type.number, *arguments)
    np.testing.assert_array_equal(cuda_core.get(back), data[2:6])


def test_bad_arguments_are_named(cuda_core) -> None:
    place = cuda_core.address(cuda_core.put(np.zeros(4096, dtype=np.uint8)))
    kernels = cuda_core.kernels
    with pytest.raises(ValueError, match=r"planes_bytes: quant_type: expected .* got 15"):
        kernels.planes_bytes(types.Q8_K.number, 1, 256)
    with pytest.raises(
        ValueError, match=r"repack_planes: cols: expected a positive multiple of the block size 256, got 32"
    ):
        kernels.repack_planes(types.Q4_K.number, place, 0, 1, 1, 32, place)
    with pytest.raises(ValueError, match=r"repack_planes: num_rows: expected 0 to 2, got 3"):
        kernels.repack_planes(types.Q8_0.number, place, 2, 3, 4, 32, place)
    with pytest.raises(ValueError, match=r"unpack_planes: first_row: expected at least 0, got -1"):
        kernels.unpack_planes(types.Q8_0.number, place, -1, 1, 4, 32, place)
    with pytest.raises(ValueError, match=r"unpack_planes: out: expected the address of a tensor"):
        kernels.unpack_planes(types.Q8_0.number, place, 0, 1, 4, 32, 0)
    with pytest.raises(ValueError, match="planes_bytes: quant_type: expected .* got Q8_K"):
        planes.planes_bytes(types.Q8_K, 1, 256)
    with pytest.raises(ValueError, match="planes_bytes: cols: expected .* block size 256, got 32"):
        planes.planes_bytes(types.Q4_K, 1, 32)
