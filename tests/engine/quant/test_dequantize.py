"""Every block format against the gguf package, bit for bit, on random blocks with finite scales."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from helexa_engine.errors import UnsupportedCheckpoint
from helexa_engine.quant import iq_grids, types
from helexa_engine.quant.dequantize import _DECODERS, dequantize
from helexa_engine.quant.types import QuantType

ORACLE = [t for t in types.QUANT_TYPES if gguf.GGMLQuantizationType(t.number) in gguf.quants._type_traits]


def random_blocks(quant_type: QuantType, count: int, seed: int = 0) -> np.ndarray:
    """Random bytes whose float16 fields are finite (also zero, negative and subnormal), [count, block_bytes] uint8."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, quant_type.block_bytes), dtype=np.uint8)
    if quant_type is types.BF16:
        return rng.standard_normal((count, 1)).astype(np.float32).view(np.uint16)[:, 1:].copy().view(np.uint8)
    layout = _DECODERS[quant_type.name][0]
    assert layout.itemsize == quant_type.block_bytes
    view = blocks.reshape(-1).view(layout)
    for field, (dtype, _) in layout.fields.items():
        if dtype == np.float16:
            view[field] = np.ldexp(rng.standard_normal(count), rng.integers(-26, 4, count)).astype(np.float16)
            view[field][:2] = 0.0, -0.0
    if quant_type is types.MXFP4:
        view["e"] %= 250
    if quant_type is types.IQ1_M:  # the float16 is spread over the tops of four words: keep its exponent below infinity
        view["scales"][:, 3] &= 0xBFFF
    return blocks


@pytest.mark.parametrize("quant_type", ORACLE, ids=str)
def test_equals_the_gguf_package_bit_for_bit(quant_type: QuantType) -> None:
    rows, blocks_per_row = 37, 64
    data = random_blocks(quant_type, rows * blocks_per_row).reshape(rows, -1)
    shape = (rows, blocks_per_row * quant_type.block_size)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(quant_type.number))
    actual = dequantize(quant_type, data, shape)
    assert actual.dtype == np.float32 and actual.shape == shape
    np.testing.assert_array_equal(actual.view(np.uint32) << 1, expected.reshape(shape).view(np.uint32) << 1)  # -0 == 0
    np.testing.assert_array_equal(actual, expected.reshape(shape))
    assert np.isfinite(actual).all() and np.count_nonzero(actual) > actual.size // 10


@pytest.mark.parametrize("quant_type", [types.MXFP4, types.NVFP4], ids=str)
def test_every_scale_byte(quant_type: QuantType) -> None:
    data = np.tile(random_blocks(quant_type, 1), (256, 1))
    data[:, 0] = np.arange(256)
    with np.errstate(over="ignore"):
        expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(quant_type.number))
    np.testing.assert_array_equal(dequantize(quant_type, data, (256, quant_type.block_size)), expected)


def test_q1_0_is_a_sign_bit_times_the_scale() -> None:
    """The gguf package cannot decode it. Definition: llama.cpp ``dequantize_row_q1_0``."""
    block = np.zeros(18, dtype=np.uint8)
    block[:2] = np.array([0.5], dtype=np.float16).view(np.uint8)
    block[2], block[17] = 0b00000101, 0b10000000
    values = dequantize(types.Q1_0, block, (1, 128))[0]
    assert set(np.flatnonzero(values == 0.5)) == {0, 2, 127}
    assert np.count_nonzero(values == -0.5) == 125


@pytest.mark.parametrize("name, dtype", [("F32", "f4"), ("F16", "f2"), ("F64", "f8"), ("I8", "i1"), ("I64", "i8")])
def test_plain_types(name: str, dtype: str) -> None:
    values = np.arange(-6, 6).astype(dtype).reshape(3, 4)
    quant_type = types.by_name(name)
    assert quant_type is not None
    np.testing.assert_array_equal(dequantize(quant_type, values.view(np.uint8), (3, 4)), values)


def test_every_type_decodes_or_is_refused_by_name() -> None:
    for quant_type in types.QUANT_TYPES:
        data = np.zeros(quant_type.block_bytes, dtype=np.uint8)
        if quant_type.kind == "activation":
            with pytest.raises(UnsupportedCheckpoint, match=quant_type.name):
                dequantize(quant_type, data, (1, quant_type.block_size))
        else:
            assert dequantize(quant_type, data, (1, quant_type.block_size)).shape == (1, quant_type.block_size)


def test_a_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match="144 bytes are not a Q4_K tensor of shape \\(2, 256\\)"):
        dequantize(types.Q4_K, np.zeros(144, dtype=np.uint8), (2, 256))
    with pytest.raises(ValueError, match="not a Q4_K tensor"):
        dequantize(types.Q4_K, np.zeros(144, dtype=np.uint8), (2, 128))


@pytest.mark.parametrize("name", ["IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_grids_equal_those_of_the_gguf_package(name: str) -> None:
    quant = getattr(gguf.quants, name)
    quant.init_grid()
    np.testing.assert_array_equal(np.array(iq_grids.grid(name)), quant.grid.reshape(quant.grid_shape))


def test_the_header_is_written_without_third_party_imports(tmp_path: Path) -> None:
    out = tmp_path / "iq_grids.h"
    subprocess.run([sys.executable, "-S", iq_grids.__file__, "--header", str(out)], check=True)
    text = out.read_text()
    assert text == iq_grids.cpp_header()
    assert "uint64_t kIq1SGrid[2048]" in text and "uint32_t kIq3SGrid[512]" in text
    first = iq_grids.grid("IQ2_S")[1]  # one word, first component in the lowest byte
    assert f"0x{int.from_bytes(bytes(first), 'little'):016x}" in text
