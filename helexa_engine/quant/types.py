"""The table of tensor types: one row a type, with everything that does not depend on how its bits are laid out.

Names and numbers are ggml's, spelled as in a GGUF file (``Q4_K``, 12). A *block* is the smallest unit that can be
decoded alone: ``block_size`` consecutive values of one row stored in ``block_bytes`` bytes. A row is a whole number of
blocks.

Source: ``ggml.h`` (``enum ggml_type``) and ``ggml-common.h`` (block structs) of llama.cpp. The bit layouts are in
:mod:`helexa_engine.quant.dequantize` and, for the kernels, in ``csrc/quant_blocks.h``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["float", "integer", "quantised", "activation"]

# Normalised mean square error of a matmul against the dequantised weights in float64, by the precision that the
# activations are brought to. Seeded normal inputs; int8 with one scale per 32 values costs 2.3e-5, bfloat16 2.4e-6 (its
# rounding is uniform in +-2^-8 of the power of two below a number: (2^-8)^2 / 3 of about 2.1 times its square).
_EXACT = 1e-11
_ACTIVATIONS_BF16 = 5e-6
_ACTIVATIONS_INT8 = 5e-5


@dataclass(frozen=True, slots=True)
class QuantType:
    """One tensor type.

    Attributes:
        name: as in the file, for example ``Q4_K``.
        number: ggml's number, the one stored in a GGUF tensor record.
        block_size: values in a block.
        block_bytes: bytes of a block.
        kind: ``float`` and ``integer`` store plain numbers; ``quantised`` are block formats for weights; ``activation``
            are formats that ggml uses only at run time and that no model file holds.
        matmul_nmse_bound: largest allowed normalised mean square error of ``quant_matmul`` against the dequantised
            weights in float64, on seeded normal inputs. It measures what quantising the *activations* costs.
    """

    name: str
    number: int
    block_size: int
    block_bytes: int
    kind: Kind
    matmul_nmse_bound: float

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def is_quantised(self) -> bool:
        return self.kind == "quantised"

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_size

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of ``cols`` values. Raises ValueError unless ``cols`` is a multiple of the block size."""
        if cols % self.block_size:
            raise ValueError(
                f"a row of {cols} values is not a multiple of the {self.name} block size {self.block_size}"
            )
        return cols // self.block_size * self.block_bytes

    def __str__(self) -> str:
        return self.name


F32 = QuantType("F32", 0, 1, 4, "float", _EXACT)
F16 = QuantType("F16", 1, 1, 2, "float", _EXACT)
Q4_0 = QuantType("Q4_0", 2, 32, 18, "quantised", _ACTIVATIONS_INT8)
Q4_1 = QuantType("Q4_1", 3, 32, 20, "quantised", _ACTIVATIONS_INT8)
Q5_0 = QuantType("Q5_0", 6, 32, 22, "quantised", _ACTIVATIONS_INT8)
Q5_1 = QuantType("Q5_1", 7, 32, 24, "quantised", _ACTIVATIONS_INT8)
Q8_0 = QuantType("Q8_0", 8, 32, 34, "quantised", _ACTIVATIONS_INT8)
Q8_1 = QuantType("Q8_1", 9, 32, 40, "activation", _EXACT)
Q2_K = QuantType("Q2_K", 10, 256, 84, "quantised", _ACTIVATIONS_INT8)
Q3_K = QuantType("Q3_K", 11, 256, 110, "quantised", _ACTIVATIONS_INT8)
Q4_K = QuantType("Q4_K", 12, 256, 144, "quantised", _ACTIVATIONS_INT8)
Q5_K = QuantType("Q5_K", 13, 256, 176, "quantised", _ACTIVATIONS_INT8)
Q6_K = QuantType("Q6_K", 14, 256, 210, "quantised", _ACTIVATIONS_INT8)
Q8_K = QuantType("Q8_K", 15, 256, 292, "activation", _EXACT)
IQ2_XXS = QuantType("IQ2_XXS", 16, 256, 66, "quantised", _ACTIVATIONS_INT8)
IQ2_XS = QuantType("IQ2_XS", 17, 256, 74, "quantised", _ACTIVATIONS_INT8)
IQ3_XXS = QuantType("IQ3_XXS", 18, 256, 98, "quantised", _ACTIVATIONS_INT8)
IQ1_S = QuantType("IQ1_S", 19, 256, 50, "quantised", _ACTIVATIONS_INT8)
IQ4_NL = QuantType("IQ4_NL", 20, 32, 18, "quantised", _ACTIVATIONS_INT8)
IQ3_S = QuantType("IQ3_S", 21, 256, 110, "quantised", _ACTIVATIONS_INT8)
IQ2_S = QuantType("IQ2_S", 22, 256, 82, "quantised", _ACTIVATIONS_INT8)
IQ4_XS = QuantType("IQ4_XS", 23, 256, 136, "quantised", _ACTIVATIONS_INT8)
I8 = QuantType("I8", 24, 1, 1, "integer", _EXACT)
I16 = QuantType("I16", 25, 1, 2, "integer", _EXACT)
I32 = QuantType("I32", 26, 1, 4, "integer", _EXACT)
I64 = QuantType("I64", 27, 1, 8, "integer", _EXACT)
F64 = QuantType("F64", 28, 1, 8, "float", _EXACT)
IQ1_M = QuantType("IQ1_M", 29, 256, 56, "quantised", _ACTIVATIONS_INT8)
BF16 = QuantType("BF16", 30, 1, 2, "float", _ACTIVATIONS_BF16)
TQ1_0 = QuantType("TQ1_0", 34, 256, 54, "quantised", _ACTIVATIONS_INT8)
TQ2_0 = QuantType("TQ2_0", 35, 256, 66, "quantised", _ACTIVATIONS_INT8)
MXFP4 = QuantType("MXFP4", 39, 32, 17, "quantised", _ACTIVATIONS_INT8)
NVFP4 = QuantType("NVFP4", 40, 64, 36, "quantised", _ACTIVATIONS_INT8)
Q1_0 = QuantType("Q1_0", 41, 128, 18, "quantised", _ACTIVATIONS_INT8)

QUANT_TYPES: tuple[QuantType, ...] = (
    F32, F16, BF16, F64, I8, I16, I32, I64,
    Q8_0, Q5_1, Q5_0, Q4_1, Q4_0, Q1_0,
    Q6_K, Q5_K, Q4_K, Q3_K, Q2_K,
    IQ4_XS, IQ4_NL, IQ3_S, IQ3_XXS, IQ2_S, IQ2_XS, IQ2_XXS, IQ1_M, IQ1_S,
    TQ2_0, TQ1_0, MXFP4, NVFP4,
    Q8_1, Q8_K,
)  # fmt: skip

_BY_NUMBER = {t.number: t for t in QUANT_TYPES}
_BY_NAME = {t.name: t for t in QUANT_TYPES}


def by_number(number: int) -> QuantType | None:
    """The type that ggml numbers so, or None: an unknown type is the caller's to report with its place in the file."""
    return _BY_NUMBER.get(number)


def by_name(name: str) -> QuantType | None:
    """The type of this name (any case), or None."""
    return _BY_NAME.get(name.upper())
