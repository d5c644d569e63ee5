"""float32 to block formats: the numpy reference quantisers.

Except for Q8_0 (the format's plain definition), a quantiser tries a range of scales for each group of values, fits the
scale to the resulting integers by least squares, and keeps what has the smallest squared error. At the end each block is
compared with its naive encoding and the better one stays.

Blocks of 256 store the scales of their groups as small integers times one float; groups are fitted first, then the scales
are rounded and the integers chosen again for the rounded scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from helexa_engine.quant import dequantize as layout
from helexa_engine.quant import iq_grids, types
from helexa_engine.quant.types import QuantType

FloatArray = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

_VALUES_PER_STEP = 1 << 17  # the temporaries of a step stay within a core's cache
_IQ4_VALUES = np.array(iq_grids.IQ4_VALUES, dtype=np.float32)
# Nearest level of a value, by twice the value rounded down, from -256 up: the midpoints between levels are halves.
_IQ4_NEAREST = np.searchsorted((_IQ4_VALUES[1:] + _IQ4_VALUES[:-1]) / 2, np.arange(-256, 256) / 2 + 0.25).astype(
    np.uint8
)
# Relative widening and narrowing of the naive scale that is tried; 0 is the naive one itself.
_STEPS = np.array([0.0, -0.12, -0.09, -0.06, -0.03, 0.03, 0.06, 0.09, 0.12], dtype=np.float32)


def _divide(a: Array, b: Array) -> FloatArray:
    """a / b, and 0 where b is 0 (or so small that the quotient is infinite)."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        quotient = np.asarray(a, dtype=np.float32) / b
    return np.where(np.isfinite(quotient), quotient, np.float32(0)).astype(np.float32)


def _dot(a: FloatArray, b: FloatArray) -> FloatArray:
    """[..., k] and [..., k] -> [...]"""
    products: FloatArray = np.einsum("...i,...i->...", a, b)
    return products


def _f16(x: Array) -> FloatArray:
    """Rounded to what float16 can hold, as float32."""
    return np.clip(x, -65504, 65504).astype(np.float16).astype(np.float32)


def _planes(q: Array, width: int) -> Array:
    """[n, ..., planes, k] small integers -> [n, ..., k] bytes, plane i in bits i * width: the reverse of reading them."""
    shifts = (np.arange(q.shape[-2]) * width).astype(np.uint8)[:, None]
    packed: Array = np.bitwise_or.reduce(q.astype(np.uint8) << shifts, axis=-2)
    return packed


def _extreme(x: FloatArray) -> FloatArray:
    """The value of largest magnitude in each group, with its sign; [..., k] -> [...]."""
    extreme: FloatArray = np.take_along_axis(x, np.abs(x).argmax(axis=-1)[..., None], axis=-1)[..., 0]
    return extreme


# --- one group: x ~ scale * q, or x ~ scale * q - minimum -------------------------------------------------------------


def _integers(x: FloatArray, scale: FloatArray, low: int, high: int) -> FloatArray:
    q: FloatArray = np.clip(np.rint(x * _divide(np.ones_like(scale), scale)[..., None]), low, high)
    return q


def _codes(x: FloatArray, scale: FloatArray) -> Array:
    """Index of the nearest IQ4 level."""
    doubled = x * (2 * _divide(np.ones_like(scale), scale))[..., None]
    index: Array = _IQ4_NEAREST[np.clip(np.floor(doubled), -256, 255).astype(np.int16) + 256]
    return index


def _levels(x: FloatArray, scale: FloatArray) -> FloatArray:
    """The nearest IQ4 level itself."""
    levels: FloatArray = _IQ4_VALUES[_codes(x, scale)]
    return levels


def _squared_error(x: FloatArray, approximation: FloatArray) -> FloatArray:
    difference = x - approximation
    return _dot(difference, difference)


def _fit_scale(x: FloatArray, naive: FloatArray, nearest: Callable[[FloatArray, FloatArray], FloatArray]) -> FloatArray:
    """[..., k] values and the naive scale [...] -> the best scale [...] for ``nearest(x, scale)`` as integers.

    For integers q the best scale is x.q / q.q, and the squared error is then x.x - (x.q)^2 / q.q.
    """
    best, best_gain = naive, np.full(naive.shape, -1, dtype=np.float32)
    for step in _STEPS:
        q = nearest(x, naive * (1 + step))
        product, square = _dot(x, q), _dot(q, q)
        scale = _divide(product, square)
        gain = product * scale
        better = gain > best_gain
        best, best_gain = np.where(better, scale, best), np.where(better, gain, best_gain)
    return best


def _fit_scale_and_minimum(x: FloatArray, high: int, *, negative_only: bool) -> tuple[FloatArray, FloatArray]:
    """x ~ scale * q - minimum with q in 0..high -> (scale, minimum), each [...].

    For integers q the best line is the regression of x on q. ``negative_only``: the format stores ``minimum`` as a number
    not below zero; where the regression wants another, the best line goes through zero.
    """
    lowest = np.minimum(x.min(axis=-1), 0) if negative_only else x.min(axis=-1)
    naive = ((x.max(axis=-1) - lowest) / np.float32(high)).astype(np.float32)
    raised = x - lowest[..., None]
    mean_x, square_x, k = x.mean(axis=-1), _dot(x, x), np.float32(x.shape[-1])
    best = (naive, -lowest)
    best_error = np.full(naive.shape, np.inf, dtype=np.float32)
    for step in _STEPS:
        q = _integers(raised, naive * (1 + step), 0, high)
        mean_q, square_q, product = q.mean(axis=-1), _dot(q, q), _dot(x, q)
        covariance = product - k * mean_x * mean_q
        slope = np.maximum(_divide(covariance, square_q - k * mean_q * mean_q), 0)
        minimum = slope * mean_q - mean_x
        error = square_x - k * mean_x * mean_x - slope * covariance
        if negative_only:
            through_zero = np.maximum(_divide(product, square_q), 0)
            clamped = minimum < 0
            slope = np.where(clamped, through_zero, slope)
            minimum = np.maximum(minimum, 0)
            error = np.where(clamped, square_x - through_zero * product, error)
        better = error < best_error
        best = (np.where(better, slope, best[0]), np.where(better, minimum, best[1]))
        best_error = np.where(better, error, best_error)
    return best


def _better(x: FloatArray, first: Array, second: Array, quant_type: QuantType) -> Array:
    """Of two encodings of the blocks ``x``, each block's better one."""

    def error(blocks: Array) -> FloatArray:
        return _squared_error(x, layout.dequantize(quant_type, blocks.view(np.uint8), x.shape))

    return np.where(error(second) < error(first), second, first)


# --- blocks of 32 -----------------------------------------------------------------------------------------------------


def _q8_0(x: FloatArray) -> Array:
    out = np.empty(len(x), dtype=layout.Q8_0_BLOCK)
    d = np.abs(x).max(axis=1) / np.float32(127)
    scaled = x * _divide(np.ones_like(d), d)[:, None]
    out["d"] = _f16(d)
    out["qs"] = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))  # halves away from zero, as ggml rounds
    return out


def _symmetric(x: FloatArray, quant_type: QuantType, block: np.dtype[Any], half: int) -> Array:
    def encode(d: FloatArray) -> Array:
        d = _f16(d)
        q = (_integers(x, d, -half, half - 1) + half).astype(np.uint8)
        out = np.empty(len(x), dtype=block)
        out["d"] = d
        out["qs"] = _planes((q & 15).reshape(-1, 2, 16), 4)
        if half == 16:
            out["qh"] = np.packbits(q >> 4, axis=1, bitorder="little")
        return out

    naive = _extreme(x) / np.float32(-half)
    fitted = _fit_scale(x, naive, lambda values, scale: _integers(values, scale, -half, half - 1))
    return _better(x, encode(naive), encode(fitted), quant_type)


def _q4_0(x: FloatArray) -> Array:
    return _symmetric(x, types.Q4_0, layout.Q4_0_BLOCK, 8)


def _q5_0(x: FloatArray) -> Array:
    return _symmetric(x, types.Q5_0, layout.Q5_0_BLOCK, 16)


def _affine(x: FloatArray, quant_type: QuantType, block: np.dtype[Any], high: int) -> Array:
    def encode(d: FloatArray, minimum: FloatArray) -> Array:
        d, m = _f16(d), _f16(-minimum)
        q = _integers(x - m[:, None], d, 0, high).astype(np.uint8)
        out = np.empty(len(x), dtype=block)
        out["d"], out["m"] = d, m
        out["qs"] = _planes((q & 15).reshape(-1, 2, 16), 4)
        if high == 31:
            out["qh"] = np.packbits(q >> 4, axis=1, bitorder="little")
        return out

    naive = encode((x.max(axis=1) - x.min(axis=1)) / np.float32(high), -x.min(axis=1))
    return _better(x, naive, encode(*_fit_scale_and_minimum(x, high, negative_only=False)), quant_type)


def _q4_1(x: FloatArray) -> Array:
    return _affine(x, types.Q4_1, layout.Q4_1_BLOCK, 15)


def _q5_1(x: FloatArray) -> Array:
    return _affine(x, types.Q5_1, layout.Q5_1_BLOCK, 31)


def _iq4_nl(x: FloatArray) -> Array:
    def encode(d: FloatArray) -> Array:
        d = _f16(d)
        out = np.empty(len(x), dtype=layout.IQ4_NL_BLOCK)
        out["d"] = d
        out["qs"] = _planes(_codes(x, d).reshape(-1, 2, 16), 4)
        return out

    naive = _extreme(x) / _IQ4_VALUES[0]
    return _better(x, encode(naive), encode(_fit_scale(x, naive, _levels)), types.IQ4_NL)


# --- blocks of 256 ----------------------------------------------------------------------------------------------------


def _rounded_scales(scale: FloatArray, highest: int) -> tuple[FloatArray, FloatArray]:
    """[n, groups] scales not below zero -> (d [n], integers 0..highest)."""
    d = _f16(scale.max(axis=1) / np.float32(highest))
    return d, _integers(scale, d, 0, highest)


def _rounded_signed_scales(scale: FloatArray, half: int) -> tuple[FloatArray, FloatArray]:
    """[n, groups] scales of any sign -> (d [n], integers -half..half-1), the largest at -half."""
    d = _f16(_extreme(scale) / np.float32(-half))
    return d, _integers(scale, d, -half, half - 1)


def _affine_groups(x: FloatArray, size: int, high: int, highest_scale: int) -> list[tuple[FloatArray, ...]]:
    """Naive and fitted (d, dmin, scales, minimums, q [n, groups, size]) of blocks ``x``."""
    groups = x.reshape(len(x), -1, size)
    naive_minimum = np.maximum(-groups.min(axis=-1), 0)
    naive = ((groups.max(axis=-1) + naive_minimum) / np.float32(high), naive_minimum)
    results: list[tuple[FloatArray, ...]] = []
    for scale, minimum in (naive, _fit_scale_and_minimum(groups, high, negative_only=True)):
        d, scales = _rounded_scales(np.maximum(scale, 0), highest_scale)
        dmin, minimums = _rounded_scales(minimum, highest_scale)
        q = _integers(groups + (dmin[:, None] * minimums)[..., None], d[:, None] * scales, 0, high)
        results.append((d, dmin, scales, minimums, q))
    return results


def _q2_k(x: FloatArray) -> Array:
    def encode(d: FloatArray, dmin: FloatArray, scales: FloatArray, minimums: FloatArray, q: FloatArray) -> Array:
        out = np.empty(len(x), dtype=layout.Q2_K_BLOCK)
        out["d"], out["dmin"] = d, dmin
        out["scales"] = scales.astype(np.uint8) | minimums.astype(np.uint8) << 4
        out["qs"] = _planes(q.reshape(-1, 2, 4, 32), 2)
        return out

    naive, fitted = _affine_groups(x, 16, 3, 15)
    return _better(x, encode(*naive), encode(*fitted), types.Q2_K)


def _pack_six_bits(scales: FloatArray, minimums: FloatArray) -> Array:
    """Two [n, 8] of 6 bits -> [n, 3, 4] bytes, the reverse of ``six_bit_scales``."""
    s, m = scales.astype(np.uint8), minimums.astype(np.uint8)
    rows = [
        s[:, :4] | (s[:, 4:] >> 4) << 6,
        m[:, :4] | (m[:, 4:] >> 4) << 6,
        (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4,
    ]
    return np.stack(rows, axis=1)


def _q4_k(x: FloatArray) -> Array:
    def encode(d: FloatArray, dmin: FloatArray, scales: FloatArray, minimums: FloatArray, q: FloatArray) -> Array:
        out = np.empty(len(x), dtype=layout.Q4_K_BLOCK)
        out["d"], out["dmin"] = d, dmin
        out["scales"] = _pack_six_bits(scales, minimums)
        out["qs"] = _planes(q.reshape(-1, 4, 2, 32), 4)
        return out

    naive, fitted = _affine_groups(x, 32, 15, 63)
    return _better(x, encode(*naive), encode(*fitted), types.Q4_K)


def _q5_k(x: FloatArray) -> Array:
    def encode(d: FloatArray, dmin: FloatArray, scales: FloatArray, minimums: FloatArray, q: FloatArray) -> Array:
        out = np.empty(len(x), dtype=layout.Q5_K_BLOCK)
        whole = q.astype(np.uint8)
        out["d"], out["dmin"] = d, dmin
        out["scales"] = _pack_six_bits(scales, minimums)
        out["qs"] = _planes((whole & 15).reshape(-1, 4, 2, 32), 4)
        out["qh"] = _planes(whole >> 4, 1)
        return out

    naive, fitted = _affine_groups(x, 32, 31, 63)
    return _better(x, encode(*naive), encode(*fitted), types.Q5_K)


def _signed_groups(
    x: FloatArray, size: int, nearest: Callable[[FloatArray, FloatArray], FloatArray], lowest: float, half: int
) -> list[tuple[FloatArray, FloatArray, FloatArray]]:
    """Naive and fitted (d, scales, q [n, groups, size]); the extreme value of a group falls on ``lowest`` when naive."""
    groups = x.reshape(len(x), -1, size)
    naive = _extreme(groups) / np.float32(lowest)
    results = []
    for scale in (naive, _fit_scale(groups, naive, nearest)):
        d, scales = _rounded_signed_scales(scale, half)
        results.append((d, scales, nearest(groups, d[:, None] * scales)))
    return results


def _q3_k(x: FloatArray) -> Array:
    def encode(d: FloatArray, scales: FloatArray, q: FloatArray) -> Array:
        out = np.empty(len(x), dtype=layout.Q3_K_BLOCK)
        raised, six_bits = (q + 4).astype(np.uint8), (scales + 32).astype(np.uint8)
        out["d"] = d
        out["qs"] = _planes((raised & 3).reshape(-1, 2, 4, 32), 2)
        out["hmask"] = _planes((raised >> 2).reshape(-1, 8, 32), 1)
        out["scales"][:, :8] = _planes((six_bits & 15).reshape(-1, 2, 8), 4)
        out["scales"][:, 8:] = _planes((six_bits >> 4).reshape(-1, 4, 4), 2)
        return out

    naive, fitted = _signed_groups(x, 16, lambda values, scale: _integers(values, scale, -4, 3), -4, 32)
    return _better(x, encode(*naive), encode(*fitted), types.Q3_K)


def _q6_k(x: FloatArray) -> Array:
    def encode(d: FloatArray, scales: FloatArray, q: FloatArray) -> Array:
        out = np.empty(len(x), dtype=layout.Q6_K_BLOCK)
        raised = (q + 32).astype(np.uint8).reshape(len(x), 256)
        out["d"], out["scales"] = d, scales
        out["ql"] = _planes((raised & 15).reshape(-1, 2, 2, 64), 4)
        out["qh"] = _planes((raised >> 4).reshape(-1, 2, 4, 32), 2)
        return out

    naive, fitted = _signed_groups(x, 16, lambda values, scale: _integers(values, scale, -32, 31), -32, 128)
    return _better(x, encode(*naive), encode(*fitted), types.Q6_K)


def _iq4_xs(x: FloatArray) -> Array:
    def encode(d: FloatArray, scales: FloatArray, levels: FloatArray) -> Array:
        out = np.empty(len(x), dtype=layout.IQ4_XS_BLOCK)
        six_bits = (scales + 32).astype(np.uint8)
        out["d"] = d
        out["scales_l"] = (six_bits[:, 0::2] & 15) | (six_bits[:, 1::2] & 15) << 4
        high = (six_bits >> 4).astype(np.uint16) << (2 * np.arange(8)).astype(np.uint16)
        out["scales_h"] = np.bitwise_or.reduce(high, axis=1)
        out["qs"] = _planes(np.searchsorted(_IQ4_VALUES, levels).reshape(-1, 8, 2, 16), 4)
        return out

    naive, fitted = _signed_groups(x, 32, _levels, float(_IQ4_VALUES[0]), 32)
    return _better(x, encode(*naive), encode(*fitted), types.IQ4_XS)


# --- all --------------------------------------------------------------------------------------------------------------


def to_bfloat16(values: FloatArray) -> npt.NDArray[np.uint16]:
    """float32 -> the bits of bfloat16, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    is_nan = bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000)
    quiet = bits >> np.uint32(16) | np.uint32(0x40)
    return np.where(is_nan, quiet, rounded).astype(np.uint16)


_ENCODERS: dict[QuantType, Callable[[FloatArray], Array]] = {
    types.Q8_0: _q8_0,
    types.Q4_0: _q4_0,
    types.Q4_1: _q4_1,
    types.Q5_0: _q5_0,
    types.Q5_1: _q5_1,
    types.Q2_K: _q2_k,
    types.Q3_K: _q3_k,
    types.Q4_K: _q4_k,
    types.Q5_K: _q5_k,
    types.Q6_K: _q6_k,
    types.IQ4_NL: _iq4_nl,
    types.IQ4_XS: _iq4_xs,
}

QUANTISABLE: tuple[QuantType, ...] = (types.F32, types.F16, types.BF16, *_ENCODERS)


def quantize(values: FloatArray, quant_type: QuantType) -> npt.NDArray[np.uint8]:
    """Encode finite values.

    Args:
        values: float32 [..., cols], cols a multiple of the type's block size.
        quant_type: one of ``QUANTISABLE``.

    Returns:
        uint8 [..., row bytes].

    Raises:
        ValueError: the type has no quantiser, or the columns do not fill its blocks.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    shape = (*values.shape[:-1], quant_type.row_bytes(values.shape[-1]))
    if quant_type is types.F32:
        return values.view(np.uint8).reshape(shape)
    if quant_type is types.F16:
        return values.astype(np.float16).view(np.uint8).reshape(shape)
    if quant_type is types.BF16:
        return to_bfloat16(values).view(np.uint8).reshape(shape)
    if quant_type not in _ENCODERS:
        raise ValueError(f"there is no quantiser for {quant_type}")
    blocks = values.reshape(-1, quant_type.block_size)
    out = np.empty((len(blocks), quant_type.block_bytes), dtype=np.uint8)
    step = _VALUES_PER_STEP // quant_type.block_size
    for start in range(0, len(blocks), step):
        encoded = _ENCODERS[quant_type](blocks[start : start + step])
        out[start : start + step] = encoded.view(np.uint8).reshape(-1, quant_type.block_bytes)
    return out.reshape(shape)
