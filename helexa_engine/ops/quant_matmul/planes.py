"""The planes in which a CUDA device keeps a matrix (``csrc/cuda/quant_planes.h``), as far as planning needs them: their bytes, known
without a device or the core."""

from __future__ import annotations

from ...quant.types import QuantType

#: Bytes of the fields that a type's blocks are cut into; one plane each.
FIELDS: dict[str, tuple[int, ...]] = {
    "F32": (4,), "F16": (2,), "BF16": (2,), "I8": (1,),
    "Q4_0": (2, 16), "IQ4_NL": (2, 16), "Q4_1": (4, 16), "Q5_0": (2, 4, 16), "Q5_1": (4, 4, 16), "Q8_0": (2, 32),
    "Q1_0": (2, 16), "MXFP4": (1, 16), "NVFP4": (4, 32),
    "Q2_K": (16, 64, 4), "Q3_K": (32, 64, 12, 2), "Q4_K": (16, 128), "Q5_K": (16, 32, 128), "Q6_K": (128, 64, 16, 2),
    "TQ1_0": (48, 4, 2), "TQ2_0": (64, 2), "IQ4_XS": (8, 128), "IQ3_S": (2, 64, 8, 32, 4), "IQ3_XXS": (2, 64, 32),
    "IQ2_S": (2, 32, 32, 8, 8), "IQ2_XS": (2, 64, 8), "IQ2_XXS": (2, 64), "IQ1_S": (2, 32, 16), "IQ1_M": (32, 16, 8),
}  # fmt: skip


def _round_up(value: int, to: int) -> int:
    return (value + to - 1) // to * to


def planes_bytes(quant_type: QuantType, rows: int, cols: int) -> int:
    """Bytes of the planes of a matrix [rows, cols], or of a stack of matrices with ``rows`` rows in all.

    Raises:
        ValueError: the type is none that a device keeps, or ``cols`` is not a whole number of blocks.
    """
    if quant_type.name not in FIELDS:
        raise ValueError(f"planes_bytes: quant_type: expected a type that models are stored in, got {quant_type}")
    if cols <= 0 or cols % quant_type.block_size:
        raise ValueError(
            f"planes_bytes: cols: expected a positive multiple of the {quant_type} block size {quant_type.block_size}, got {cols}"
        )
    total = 0
    for field in FIELDS[quant_type.name]:
        total = _round_up(total, 256) + rows * _round_up(cols // quant_type.block_size * field, 16)
    return total
