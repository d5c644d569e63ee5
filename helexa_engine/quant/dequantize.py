"""Block formats to float32: the definition that kernels and quantisers are tested against.

Each format is a numpy structured dtype (the bytes of one block, little endian, as in llama.cpp's ``ggml-common.h``) and
one function from ``n`` blocks to ``[n, block_size]`` float32. Products and sums are taken in float32 in the order of
llama.cpp's ``dequantize_row_*``, so the results are equal bit for bit to those of the gguf package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from helexa_engine.errors import UnsupportedCheckpoint
from helexa_engine.quant import iq_grids, types
from helexa_engine.quant.types import QuantType

Blocks = np.ndarray[Any, np.dtype[np.void]]
FloatArray = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

# Blocks decoded at once: the temporaries of 1024 blocks of 256 values stay within a core's cache.
_VALUES_PER_STEP = 1 << 18


def _bits(packed: Array, width: int) -> Array:
    """[n, ..., k] integers -> [n, ..., 8 * itemsize / width, k]: planes of ``width`` bits, lowest bits first."""
    shifts = np.arange(0, 8 * packed.itemsize, width, dtype=packed.dtype)[:, None]
    mask = packed.dtype.type((1 << width) - 1)
    planes: Array = (packed[..., None, :] >> shifts) & mask
    return planes


def _fields(packed: Array, width: int, count: int | None = None) -> Array:
    """[...] integers -> [..., count] fields of ``width`` bits, lowest first."""
    count = 8 * packed.itemsize // width if count is None else count
    shifts = (np.arange(count) * width).astype(packed.dtype)
    fields: Array = (packed[..., None] >> shifts) & packed.dtype.type((1 << width) - 1)
    return fields


def _f32(x: Array) -> FloatArray:
    return x.astype(np.float32)


def _signs(bits: Array) -> FloatArray:
    """[..., k] bytes -> [..., k, 8] factors: -1 where the bit is set, else 1."""
    return np.float32(1) - np.float32(2) * _f32(_fields(bits, 1))


@cache
def _grid(type_name: str) -> FloatArray:
    return np.array(iq_grids.grid(type_name), dtype=np.float32)


_IQ4_VALUES = np.array(iq_grids.IQ4_VALUES, dtype=np.float32)
_E2M1_DOUBLED = np.array(iq_grids.E2M1_DOUBLED, dtype=np.float32)
_EVEN_SIGNS = np.array(iq_grids.EVEN_SIGNS, dtype=np.uint8)

# --- blocks of 32: a nibble plane holds values 0..15 (low) and 16..31 (high) ------------------------------------------

Q4_0_BLOCK = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
Q4_1_BLOCK = np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)])
Q5_0_BLOCK = np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
Q5_1_BLOCK = np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
Q8_0_BLOCK = np.dtype([("d", "<f2"), ("qs", "i1", 32)])
IQ4_NL_BLOCK = Q4_0_BLOCK
MXFP4_BLOCK = np.dtype([("e", "u1"), ("qs", "u1", 16)])
NVFP4_BLOCK = np.dtype([("d", "u1", 4), ("qs", "u1", (4, 8))])
Q1_0_BLOCK = np.dtype([("d", "<f2"), ("qs", "u1", 16)])


def _nibbles(b: Blocks) -> Array:
    return _bits(b["qs"], 4).reshape(len(b), 32)


def _five_bits(b: Blocks) -> Array:
    values: Array = _nibbles(b) | _fields(b["qh"], 1).reshape(len(b), 32) << np.uint8(4)
    return values


def _q4_0(b: Blocks) -> FloatArray:
    return _f32(b["d"])[:, None] * (_f32(_nibbles(b)) - 8)


def _q4_1(b: Blocks) -> FloatArray:
    return _f32(b["d"])[:, None] * _f32(_nibbles(b)) + _f32(b["m"])[:, None]


def _q5_0(b: Blocks) -> FloatArray:
    return _f32(b["d"])[:, None] * (_f32(_five_bits(b)) - 16)


def _q5_1(b: Blocks) -> FloatArray:
    return _f32(b["d"])[:, None] * _f32(_five_bits(b)) + _f32(b["m"])[:, None]


def _q8_0(b: Blocks) -> FloatArray:
    return _f32(b["qs"]) * _f32(b["d"])[:, None]


def _q1_0(b: Blocks) -> FloatArray:
    """One sign bit a value (lowest bit first): set is +d, clear is -d."""
    return _f32(b["d"])[:, None] * (2 * _f32(_fields(b["qs"], 1).reshape(len(b), 128)) - 1)


def _iq4_nl(b: Blocks) -> FloatArray:
    return _f32(b["d"])[:, None] * _IQ4_VALUES[_nibbles(b)]


def _mxfp4(b: Blocks) -> FloatArray:
    """The scale is a power of two (E8M0), halved because the values are doubled; 0 and 1 make subnormals."""
    e = b["e"].astype(np.uint32)
    d = np.where(e < 2, np.uint32(0x00200000) << np.minimum(e, 1), (e - 1) << np.uint32(23)).view(np.float32)
    return d[:, None] * _E2M1_DOUBLED[_nibbles(b)]


def _nvfp4(b: Blocks) -> FloatArray:
    """Four groups of 16 values, each with an unsigned E4M3 scale (bias 7; 0x7F, a NaN there, counts as zero)."""
    code = b["d"]
    exponent, mantissa = (code >> np.uint8(3)).astype(np.int32) & 15, _f32(code & np.uint8(7))
    scale = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(1 + mantissa / 8, exponent - 7))
    d = np.where((code == 0) | (code == 0x7F), 0, scale * np.float32(0.5)).astype(np.float32)
    return (d[:, :, None] * _E2M1_DOUBLED[_bits(b["qs"], 4).reshape(-1, 4, 16)]).reshape(-1, 64)


# --- K quants: 256 values, scales of groups of 16 or 32 stored as small integers times one float ----------------------

Q2_K_BLOCK = np.dtype([("scales", "u1", 16), ("qs", "u1", (2, 32)), ("d", "<f2"), ("dmin", "<f2")])
Q3_K_BLOCK = np.dtype([("hmask", "u1", 32), ("qs", "u1", (2, 32)), ("scales", "u1", 12), ("d", "<f2")])
Q4_K_BLOCK = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", (3, 4)), ("qs", "u1", (4, 32))])
Q5_K_BLOCK = np.dtype(
    [("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", (3, 4)), ("qh", "u1", 32), ("qs", "u1", (4, 32))]
)
Q6_K_BLOCK = np.dtype([("ql", "u1", (2, 64)), ("qh", "u1", (2, 32)), ("scales", "i1", 16), ("d", "<f2")])


def _q2_k(b: Blocks) -> FloatArray:
    scale = _f32(b["d"])[:, None] * _f32(b["scales"] & np.uint8(15))
    minimum = _f32(b["dmin"])[:, None] * _f32(b["scales"] >> np.uint8(4))
    q = _f32(_bits(b["qs"], 2).reshape(-1, 16, 16))
    return (scale[..., None] * q - minimum[..., None]).reshape(-1, 256)


def _q3_k(b: Blocks) -> FloatArray:
    low = _bits(b["scales"][:, :8], 4).reshape(-1, 16)
    high = _bits(b["scales"][:, 8:], 2).reshape(-1, 16)
    scale = _f32(b["d"])[:, None] * (_f32(low | high << np.uint8(4)) - 32)
    # The mask's bit is set where the value is *not* lowered by 4.
    q = _f32(_bits(b["qs"], 2).reshape(-1, 256)) + 4 * _f32(_bits(b["hmask"], 1).reshape(-1, 256)) - 4
    return (scale[..., None] * q.reshape(-1, 16, 16)).reshape(-1, 256)


def six_bit_scales(packed: Array) -> tuple[Array, Array]:
    """[n, 3, 4] bytes of a Q4_K or Q5_K block -> (scales, minimums), each [n, 8] of 6 bits.

    The first four of each stand in the low six bits of rows 0 and 1; the last four have their low nibbles in row 2 and
    their high two bits on top of rows 0 and 1.
    """
    first, second, third = packed[:, 0], packed[:, 1], packed[:, 2]
    six, top = np.uint8(63), np.uint8(0x30)
    scales = np.concatenate([first & six, third & np.uint8(15) | first >> np.uint8(2) & top], axis=1)
    minimums = np.concatenate([second & six, third >> np.uint8(4) | second >> np.uint8(2) & top], axis=1)
    return scales, minimums


def _scale_and_minimum(b: Blocks) -> tuple[FloatArray, FloatArray]:
    scales, minimums = six_bit_scales(b["scales"])
    return _f32(b["d"])[:, None] * _f32(scales), _f32(b["dmin"])[:, None] * _f32(minimums)


def _q4_k(b: Blocks) -> FloatArray:
    scale, minimum = _scale_and_minimum(b)
    q = _f32(_bits(b["qs"], 4).reshape(-1, 8, 32))
    return (scale[..., None] * q - minimum[..., None]).reshape(-1, 256)


def _q5_k(b: Blocks) -> FloatArray:
    scale, minimum = _scale_and_minimum(b)
    q = _f32(_bits(b["qs"], 4).reshape(-1, 8, 32) | _bits(b["qh"], 1) << np.uint8(4))
    return (scale[..., None] * q - minimum[..., None]).reshape(-1, 256)


def _q6_k(b: Blocks) -> FloatArray:
    scale = _f32(b["d"])[:, None] * _f32(b["scales"])
    low = _bits(b["ql"], 4).reshape(-1, 256)
    high = _bits(b["qh"], 2).reshape(-1, 256)
    q = _f32(low | high << np.uint8(4)) - 32
    return (scale[..., None] * q.reshape(-1, 16, 16)).reshape(-1, 256)


# --- ternary ----------------------------------------------------------------------------------------------------------

TQ1_0_BLOCK = np.dtype([("qs", "u1", 48), ("qh", "u1", 4), ("d", "<f2")])
TQ2_0_BLOCK = np.dtype([("qs", "u1", (2, 32)), ("d", "<f2")])


def _tq1_0(b: Blocks) -> FloatArray:
    """Five base-3 digits a byte (four in ``qh``) as a fraction of 256: times 3^i modulo 256 brings digit i on top."""
    powers = np.array([1, 3, 9, 27, 81], dtype=np.uint8)[:, None]
    planes = [b["qs"][:, None, :32] * powers, b["qs"][:, None, 32:] * powers, b["qh"][:, None] * powers[:4]]
    digits = np.concatenate([p.reshape(len(b), -1) for p in planes], axis=1).astype(np.uint16) * np.uint16(3) >> 8
    return _f32(b["d"])[:, None] * (_f32(digits) - 1)


def _tq2_0(b: Blocks) -> FloatArray:
    return _f32(b["d"])[:, None] * (_f32(_bits(b["qs"], 2).reshape(-1, 256)) - 1)


# --- IQ: vectors of 8 (or 4) magnitudes from a grid, with signs, times the scale of a group of 32 or 16 ---------------

IQ2_XXS_BLOCK = np.dtype([("d", "<f2"), ("groups", [("index", "u1", 4), ("signs_scale", "<u4")], 8)])
IQ2_XS_BLOCK = np.dtype([("d", "<f2"), ("qs", "<u2", 32), ("scales", "u1", 8)])
IQ2_S_BLOCK = np.dtype([("d", "<f2"), ("qs", "u1", 32), ("signs", "u1", 32), ("qh", "u1", 8), ("scales", "u1", 8)])
IQ3_XXS_BLOCK = np.dtype([("d", "<f2"), ("qs", "u1", 64), ("signs_scale", "<u4", 8)])
IQ3_S_BLOCK = np.dtype([("d", "<f2"), ("qs", "u1", 64), ("qh", "u1", 8), ("signs", "u1", 32), ("scales", "u1", 4)])
IQ1_S_BLOCK = np.dtype([("d", "<f2"), ("qs", "u1", 32), ("qh", "<u2", 8)])
IQ1_M_BLOCK = np.dtype([("qs", "u1", 32), ("qh", "u1", 16), ("scales", "<u2", 4)])
IQ4_XS_BLOCK = np.dtype([("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", (8, 16))])

_IQ1_SHIFT = np.float32(0.125)


def _packed_signs(signs_scale: Array) -> FloatArray:
    """[n, 8] words of four 7-bit sign sets (the eighth sign makes their parity even) -> [n, 32, 8] factors."""
    return _signs(_EVEN_SIGNS[_fields(signs_scale, 7, 4)]).reshape(-1, 32, 8)


def _signed_vectors(scale: FloatArray, vectors: FloatArray, signs: FloatArray) -> FloatArray:
    """``scale`` [n, s], ``vectors`` and ``signs`` 256 values a block -> [n, 256]; each scale serves 256 / s values."""
    n, groups = scale.shape
    shape = (n, groups, 256 // groups)
    return (scale[..., None] * vectors.reshape(shape) * signs.reshape(shape)).reshape(n, 256)


def _iq2_xxs(b: Blocks) -> FloatArray:
    index, word = b["groups"]["index"], b["groups"]["signs_scale"]
    scale = _f32(b["d"])[:, None] * (np.float32(0.5) + _f32(word >> np.uint32(28))) * np.float32(0.25)
    return _signed_vectors(scale, _grid("IQ2_XXS")[index], _packed_signs(word))


def _iq2_xs(b: Blocks) -> FloatArray:
    scale = _f32(b["d"])[:, None] * (np.float32(0.5) + _f32(_fields(b["scales"], 4).reshape(-1, 16))) * np.float32(0.25)
    index, signs = b["qs"] & np.uint16(511), _EVEN_SIGNS[b["qs"] >> np.uint16(9)]
    return _signed_vectors(scale, _grid("IQ2_XS")[index], _signs(signs))


def _iq2_s(b: Blocks) -> FloatArray:
    scale = _f32(b["d"])[:, None] * (np.float32(0.5) + _f32(_fields(b["scales"], 4).reshape(-1, 16))) * np.float32(0.25)
    index = b["qs"].astype(np.uint16) | _fields(b["qh"], 2).reshape(-1, 32).astype(np.uint16) << 8
    return _signed_vectors(scale, _grid("IQ2_S")[index], _signs(b["signs"]))


def _iq3_xxs(b: Blocks) -> FloatArray:
    word = b["signs_scale"]
    scale = _f32(b["d"])[:, None] * (np.float32(0.5) + _f32(word >> np.uint32(28))) * np.float32(0.5)
    return _signed_vectors(scale, _grid("IQ3_XXS")[b["qs"]], _packed_signs(word))


def _iq3_s(b: Blocks) -> FloatArray:
    scale = _f32(b["d"])[:, None] * (1 + 2 * _f32(_fields(b["scales"], 4).reshape(-1, 8)))
    index = b["qs"].astype(np.uint16) | _fields(b["qh"], 1).reshape(-1, 64).astype(np.uint16) << 8
    return _signed_vectors(scale, _grid("IQ3_S")[index], _signs(b["signs"]))


def _iq1_s(b: Blocks) -> FloatArray:
    """Ternary vectors, all 32 values of a group shifted by an eighth up or down; ``qh`` has 3 index bits a vector."""
    qh = b["qh"]
    scale = _f32(b["d"])[:, None] * (2 * _f32(qh >> 12 & 7) + 1)
    shift = np.where(qh & 0x8000, -_IQ1_SHIFT, _IQ1_SHIFT)
    index = b["qs"].astype(np.uint16) | _fields(qh, 3, 4).reshape(-1, 32) << 8
    vectors = _grid("IQ1_S")[index].reshape(-1, 8, 32)
    values: FloatArray = scale[..., None] * (vectors + shift[..., None])
    return values.reshape(-1, 256)


def _iq1_m(b: Blocks) -> FloatArray:
    """As IQ1_S with a shift a vector and a scale for each two; four words' tops together make the float16 scale."""
    words = b["scales"]
    tops = words >> 12
    d = (tops[:, 0] | tops[:, 1] << 4 | tops[:, 2] << 8 | tops[:, 3] << 12).view(np.float16)
    scale = _f32(d)[:, None] * (2 * _f32(_fields(words, 3, 4).reshape(-1, 16)) + 1)
    high = _fields(b["qh"], 4).reshape(-1, 32)
    index = b["qs"].astype(np.uint16) | (high & np.uint8(7)).astype(np.uint16) << 8
    shift = np.where(high & 8, -_IQ1_SHIFT, _IQ1_SHIFT)
    vectors: FloatArray = _grid("IQ1_S")[index] + shift[..., None]
    return (scale[..., None] * vectors.reshape(-1, 16, 16)).reshape(-1, 256)


def iq4_xs_scales(b: Blocks) -> Array:
    """Blocks of IQ4_XS -> [n, 8] signed group scales, -32..31."""
    low = _fields(b["scales_l"], 4).reshape(-1, 8)
    high = _fields(b["scales_h"], 2).astype(np.uint8)
    scales: Array = (low | high << np.uint8(4)).astype(np.int8) - np.int8(32)
    return scales


def _iq4_xs(b: Blocks) -> FloatArray:
    scale = _f32(b["d"])[:, None] * _f32(iq4_xs_scales(b))
    return (scale[..., None] * _IQ4_VALUES[_bits(b["qs"], 4).reshape(-1, 8, 32)]).reshape(-1, 256)


_DECODERS: dict[str, tuple[np.dtype[Any], Callable[[Blocks], FloatArray]]] = {
    "Q4_0": (Q4_0_BLOCK, _q4_0),
    "Q4_1": (Q4_1_BLOCK, _q4_1),
    "Q5_0": (Q5_0_BLOCK, _q5_0),
    "Q5_1": (Q5_1_BLOCK, _q5_1),
    "Q8_0": (Q8_0_BLOCK, _q8_0),
    "Q1_0": (Q1_0_BLOCK, _q1_0),
    "Q2_K": (Q2_K_BLOCK, _q2_k),
    "Q3_K": (Q3_K_BLOCK, _q3_k),
    "Q4_K": (Q4_K_BLOCK, _q4_k),
    "Q5_K": (Q5_K_BLOCK, _q5_k),
    "Q6_K": (Q6_K_BLOCK, _q6_k),
    "TQ1_0": (TQ1_0_BLOCK, _tq1_0),
    "TQ2_0": (TQ2_0_BLOCK, _tq2_0),
    "IQ1_S": (IQ1_S_BLOCK, _iq1_s),
    "IQ1_M": (IQ1_M_BLOCK, _iq1_m),
    "IQ2_XXS": (IQ2_XXS_BLOCK, _iq2_xxs),
    "IQ2_XS": (IQ2_XS_BLOCK, _iq2_xs),
    "IQ2_S": (IQ2_S_BLOCK, _iq2_s),
    "IQ3_XXS": (IQ3_XXS_BLOCK, _iq3_xxs),
    "IQ3_S": (IQ3_S_BLOCK, _iq3_s),
    "IQ4_NL": (IQ4_NL_BLOCK, _iq4_nl),
    "IQ4_XS": (IQ4_XS_BLOCK, _iq4_xs),
    "MXFP4": (MXFP4_BLOCK, _mxfp4),
    "NVFP4": (NVFP4_BLOCK, _nvfp4),
}

_PLAIN: dict[str, npt.DTypeLike] = {
    "F32": "<f4",
    "F16": "<f2",
    "F64": "<f8",
    "I8": "i1",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
}


def dequantize(quant_type: QuantType, data: npt.NDArray[np.uint8], shape: Sequence[int]) -> FloatArray:
    """The values of a tensor.

    Args:
        quant_type: a row of :mod:`helexa_engine.quant.types`.
        data: the tensor's bytes, uint8 of any contiguous shape.
        shape: torch order, last dimension contiguous and a multiple of the block size.

    Returns:
        float32 of ``shape``; a fresh array except for F32, which is a view.

    Raises:
        UnsupportedCheckpoint: the type is a run-time format (Q8_1, Q8_K) that no file should hold.
        ValueError: ``data`` has another size than ``shape`` needs.
    """
    raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    size = int(np.prod(shape, dtype=np.int64))
    if (
        shape and shape[-1] % quant_type.block_size
    ) or raw.size != size // quant_type.block_size * quant_type.block_bytes:
        raise ValueError(f"{raw.size} bytes are not a {quant_type.name} tensor of shape {tuple(shape)}")
    if quant_type.name in _PLAIN:
        return raw.view(_PLAIN[quant_type.name]).astype(np.float32, copy=False).reshape(shape)
    if quant_type is types.BF16:
        return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(shape)
    if quant_type.name not in _DECODERS:
        raise UnsupportedCheckpoint(
            f"{quant_type.name} is a format for activations at run time, not for stored weights",
            f"shape {tuple(shape)}",
        )
    layout, decode = _DECODERS[quant_type.name]
    blocks = raw.view(layout)
    out = np.empty((len(blocks), quant_type.block_size), dtype=np.float32)
    step = _VALUES_PER_STEP // quant_type.block_size
    with np.errstate(over="ignore", invalid="ignore"):  # what a broken scale gives is the caller's to notice
        for start in range(0, len(blocks), step):
            out[start : start + step] = decode(blocks[start : start + step])
    return out.reshape(shape)
