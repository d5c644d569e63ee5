"""How much memory a matrix takes once an implementation has packed it: known without the matrix."""

from __future__ import annotations

import math

from ..quant.types import QuantType
from .quant_matmul.planes import planes_bytes
from .registry import require_native


def packed_bytes(implementation: str, quant_type: QuantType, shape: tuple[int, ...]) -> int:
    """Bytes that ``pack`` of ``quant_matmul``, or ``pack_experts`` and ``pack_router`` of ``moe_matmul``, hold of a matrix [rows, cols]
    or a stack [matrices, rows, cols].

    Args:
        implementation: ``native``, whose tiles pad rows to sixteen and K quants' scales to whole bytes; ``cuda``, whose planes pad
            rows to sixteen bytes; ``reference`` keeps the file's blocks.
    """
    if implementation == "reference":
        return math.prod(shape[:-1]) * quant_type.row_bytes(shape[-1])
    *stack, rows, cols = shape
    if implementation == "cuda":
        return planes_bytes(quant_type, math.prod(stack) * rows, cols)
    return int(require_native().packed_bytes(quant_type.number, rows, cols, math.prod(stack)))
