"""The bytes that packing is planned to take are those that it takes."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from helexa_engine.ops.moe_matmul import moe_matmul
from helexa_engine.ops.packed_bytes import packed_bytes
from helexa_engine.ops.quant_matmul import quant_matmul
from helexa_engine.ops.registry import native_core
from helexa_engine.quant import types
from helexa_engine.quant.types import QuantType

TYPES = [t for t in types.QUANT_TYPES if t.is_quantised or t in (types.F32, types.F16, types.BF16)]


@pytest.mark.parametrize("rows", [1, 16, 17])
@pytest.mark.parametrize("quant_type", TYPES, ids=str)
def test_a_matrix_and_a_stack(quant_type: QuantType, rows: int) -> None:
    cols = 512 if quant_type.block_size > 1 else 509
    data = np.zeros(3 * rows * quant_type.row_bytes(cols), np.uint8)
    for name, matmul, moe in (
        ("reference", "helexa_engine.ops.quant_matmul.reference", "helexa_engine.ops.moe_matmul.reference"),
        (
            "native",
            quant_matmul.decide("cpu", in_features=cols).module,
            moe_matmul.decide("cpu", hidden_size=cols).module,
        ),
    ):
        if name == "native" and native_core() is None:
            continue
        one = importlib.import_module(matmul).pack(quant_type, data[: data.size // 3], rows, cols)
        stack = importlib.import_module(moe).pack_experts(quant_type, data.reshape(3, -1), rows, cols)
        assert packed_bytes(name, quant_type, (rows, cols)) == one.nbytes
        assert packed_bytes(name, quant_type, (3, rows, cols)) == stack.nbytes
