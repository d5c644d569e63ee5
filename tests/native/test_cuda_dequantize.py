"""``csrc/cuda/dequantize.cu`` against ``quant/dequantize.py``, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from helexa_engine.quant import types
from helexa_engine.quant.dequantize import dequantize
from helexa_engine.quant.types import QuantType
from tests.engine.quant.test_dequantize import random_blocks

BLOCKS = [t for t in types.QUANT_TYPES if t.is_quantised]
NUMBERS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1"}


def values_of(core, quant_type: QuantType, data: np.ndarray, *, bfloat16: bool = False) -> np.ndarray:
    size = data.size // quant_type.block_bytes * quant_type.block_size
    out = core.put(np.full(size, 0xFFFF if bfloat16 else np.nan, dtype=np.uint16 if bfloat16 else np.float32))
    source = core.put(data)
    core.kernels.dequantize(quant_type.number, core.address(source), size, core.address(out), bfloat16)
    return core.get(out)


@pytest.mark.parametrize("count", [2, 3, 70])
@pytest.mark.parametrize("quant_type", BLOCKS, ids=str)
def test_every_block_type(cuda_core, quant_type: QuantType, count: int) -> None:
    data = random_blocks(quant_type, count)
    expected = dequantize(quant_type, data, (1, count * quant_type.block_size))[0]
    np.testing.assert_array_equal(values_of(cuda_core, quant_type, data), expected)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_any_count(cuda_core, name: str) -> None:
    quant_type = types.by_name(name)
    assert quant_type is not None
    values = np.random.default_rng(0).standard_normal(777).astype(np.float32) * 50
    data = values.view(np.uint32) >> 16 if name == "BF16" else values
    data = data.astype(NUMBERS[name]).view(np.uint8)
    np.testing.assert_array_equal(values_of(cuda_core, quant_type, data), dequantize(quant_type, data, (777,)))


def test_bfloat16_is_rounded_to_the_nearest(cuda_core) -> None:
    """Halves to even, NaN to NaN, beyond the range to infinity: as torch does."""
    import torch

    special = [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800001, 0xFF800000, 0x00000001, 0x80000000]
    values = np.array(special, dtype=np.uint32).view(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    actual = values_of(cuda_core, types.F32, values.view(np.uint8), bfloat16=True)
    is_nan = np.isnan(values)
    np.testing.assert_array_equal(actual[~is_nan], expected[~is_nan])
    assert ((actual[is_nan] & 0x7FFF) > 0x7F80).all()


@pytest.mark.parametrize("quant_type", [types.Q4_K, types.Q8_0, types.IQ3_S], ids=str)
def test_blocks_as_bfloat16(cuda_core, quant_type: QuantType) -> None:
    import torch

    data = random_blocks(quant_type, 5)
    values = dequantize(quant_type, data, (5 * quant_type.block_size,))
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(values_of(cuda_core, quant_type, data, bfloat16=True), expected)


def test_what_cannot_be_dequantised(cuda_core) -> None:
    place = cuda_core.address(cuda_core.put(np.zeros(64, dtype=np.float32)))
    with pytest.raises(ValueError, match=r"dequantize: n: expected a multiple of the block size 256, got 32"):
        cuda_core.kernels.dequantize(types.Q4_K.number, place, 32, place, False)
    with pytest.raises(ValueError, match=r"dequantize: quant_type: expected .* got 15"):
        cuda_core.kernels.dequantize(types.Q8_K.number, place, 256, place, False)
    with pytest.raises(ValueError, match=r"dequantize: out: expected the address of a tensor"):
        cuda_core.kernels.dequantize(types.Q8_0.number, place, 32, 0, False)
