"""Rows of planes against ``quant/dequantize.py``, bit for bit: every type's units and segments as kernels read them
(``csrc/cuda/quant_planes.cuh``)."""

from __future__ import annotations

import numpy as np
import pytest

from helexa_engine.quant import types
from helexa_engine.quant.dequantize import dequantize
from helexa_engine.quant.types import QuantType
from tests.engine.ops.test_quant_matmul import raw_weights
from tests.engine.quant.test_dequantize import random_blocks
from tests.native.test_cuda_repack import TYPES, planes_of


def rows_of(core, quant_type: QuantType, data: np.ndarray, rows: int, cols: int, ids: list[int], scale: float = 1.0):
    packed = core.put(planes_of(quant_type, data, rows, cols))
    wanted, out = core.put(np.array(ids, np.int64)), core.put(np.full((len(ids), cols), np.nan, np.float32))
    arguments = (quant_type.number, core.address(packed), rows, cols, scale, core.address(wanted), len(ids))
    core.kernels.quant_embedding(*arguments, core.address(out))
    return core.get(out)


@pytest.mark.parametrize("quant_type", TYPES, ids=str)
def test_rows_are_exact(cuda_core, quant_type: QuantType) -> None:
    rows, cols = 5, 3 * quant_type.block_size if quant_type.is_quantised else 77
    ids = [4, 0, 2, 2]
    if quant_type.is_quantised:
        data = random_blocks(quant_type, 15)
    else:
        data = raw_weights(quant_type, rows, cols)
    expected = dequantize(quant_type, data, (rows, cols))[ids]
    np.testing.assert_array_equal(rows_of(cuda_core, quant_type, data, rows, cols, ids), expected)


@pytest.mark.parametrize("quant_type", [types.NVFP4, types.F16], ids=str)
def test_a_scale_multiplies_them(cuda_core, quant_type: QuantType) -> None:
    rows, cols = 3, 128
    data = raw_weights(quant_type, rows, cols)
    expected = dequantize(quant_type, data, (rows, cols)) * np.float32(0.37)
    np.testing.assert_array_equal(rows_of(cuda_core, quant_type, data, rows, cols, [0, 1, 2], 0.37), expected)


def test_an_id_outside_of_the_table_is_not_hidden(cuda_core) -> None:
    data = raw_weights(types.Q8_0, 3, 64)
    out = rows_of(cuda_core, types.Q8_0, data, 3, 64, [-1, 1, 3])
    assert np.isnan(out[[0, 2]]).all() and np.isfinite(out[1]).all()


def test_bad_arguments_are_named(cuda_core) -> None:
    place = cuda_core.address(cuda_core.put(np.zeros(64, dtype=np.float32)))
    with pytest.raises(ValueError, match=r"quant_embedding: quant_type: expected .* got 15"):
        cuda_core.kernels.quant_embedding(types.Q8_K.number, place, 1, 256, 1.0, place, 1, place)
    with pytest.raises(ValueError, match=r"quant_embedding: cols: expected .* block size 32, got 33"):
        cuda_core.kernels.quant_embedding(types.Q8_0.number, place, 1, 33, 1.0, place, 1, place)
    with pytest.raises(ValueError, match=r"quant_embedding: ids: expected the address of a tensor"):
        cuda_core.kernels.quant_embedding(types.Q8_0.number, place, 1, 32, 1.0, 0, 1, place)
