"""``quantize`` in the native core, on all its threads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ...quant import types
from ...quant.quantize import QUANTISABLE, column_weights
from ...quant.types import QuantType
from ..registry import require_native

_native = require_native()


def quantize(
    values: npt.NDArray[np.float32], quant_type: QuantType, importance: npt.NDArray[Any] | None = None
) -> npt.NDArray[np.uint8]:
    """See :func:`helexa_engine.quant.quantize.quantize`."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    cols = values.shape[-1]
    shape = (*values.shape[:-1], quant_type.row_bytes(cols))
    if quant_type not in QUANTISABLE:
        raise ValueError(f"there is no quantiser for {quant_type}")
    if quant_type is types.F32:
        return values.view(np.uint8).reshape(shape)
    weights = None if importance is None else column_weights(importance, cols)
    out = np.empty(shape, dtype=np.uint8)
    if out.size:
        _native.quantize(
            quant_type.number,
            values.ctypes.data,
            math.prod(values.shape[:-1]),
            cols,
            0 if weights is None else weights.ctypes.data,
            out.ctypes.data,
        )
    return out
