"""float32 to block formats: the numpy reference quantisers.

Except for Q8_0 (the format's plain definition), a quantiser tries a range of scales for each group of values, fits the
scale (or the scale and the minimum) to the resulting integers by least squares, and keeps what has the smallest squared
error. Blocks of 256 store the scales of their groups as small integers times one float: those integers are rounded, then each
is tried one step lower and higher with the values' integers chosen anew, then the float is fitted to all of it, once more.

With importances the squared error of each value is weighted by its column's importance: the mean square of the activation
that the column multiplies, which makes the weighted sum the expected error of the product.

This is the definition, to the last bit: ``csrc/cpu/quantize_kernels.h`` does the same float32 operations in the same order and
gives the same bytes. For that order to be plain, groups lie side by side: arrays are [values of a group, groups], and sums
run over the first axis from first to last.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from helexa_engine.quant import dequantize as layout
from helexa_engine.quant import iq_grids, types
from helexa_engine.quant.types import QuantType

FloatArray = npt.NDArray[np.float32]
Array = npt.NDArray[Any]
Nearest = Callable[[FloatArray], FloatArray]

_VALUES_PER_STEP = 1 << 17  # the temporaries of a step stay within a core's cache
_IQ4_VALUES = np.array(iq_grids.IQ4_VALUES, dtype=np.float32)
_IQ4_LOWEST, _IQ4_HIGHEST = float(_IQ4_VALUES[0]), float(_IQ4_VALUES[-1])
# Nearest level of a value, by twice the value rounded down, from -256 up: the midpoints between levels are halves.
_IQ4_NEAREST = np.searchsorted((_IQ4_VALUES[1:] + _IQ4_VALUES[:-1]) / 2, np.arange(-256, 256) / 2 + 0.25).astype(
    np.uint8
)
# Factors on the naive scale that are tried; 1 is the naive one itself. Where values have a sign, two naive scales are tried:
# the extreme value falls on the lowest level or on the highest.
_SIGNED_FACTORS = tuple(map(np.float32, (1.0, 0.82, 0.88, 0.94, 1.06, 1.12, 1.18)))
_LINE_FACTORS = tuple(map(np.float32, (1.0, 0.82, 0.85, 0.88, 0.91, 0.94, 0.97, 1.03, 1.06, 1.09, 1.12, 1.15, 1.18)))
#: Least weight of a column, relative to the mean of its row: a column that was never active still has to mean something.
LEAST_IMPORTANCE = 1e-4


def _divide(a: Array, b: Array) -> FloatArray:
    """a / b, and 0 where b is 0 (or so small that the quotient is infinite)."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        quotient = np.asarray(a, dtype=np.float32) / b
    return np.where(np.isfinite(quotient), quotient, np.float32(0)).astype(np.float32)


def _inverse(scale: FloatArray) -> FloatArray:
    return _divide(np.ones_like(scale), scale)


def _sum(a: FloatArray) -> FloatArray:
    """[k, ...] -> [...], from first to last."""
    total: FloatArray = a[0].copy()
    for i in range(1, len(a)):
        total += a[i]
    return total


def _f16(x: Array) -> FloatArray:
    """Rounded to what float16 can hold, as float32; never -0."""
    rounded: FloatArray = np.clip(x, -65504, 65504).astype(np.float16).astype(np.float32) + np.float32(0)
    return rounded


def _planes(q: Array, width: int) -> Array:
    """[n, ..., planes, k] small integers -> [n, ..., k] bytes, plane i in bits i * width: the reverse of reading them."""
    shifts = (np.arange(q.shape[-2]) * width).astype(np.uint8)[:, None]
    packed: Array = np.bitwise_or.reduce(q.astype(np.uint8) << shifts, axis=-2)
    return packed


def _extreme(x: FloatArray) -> FloatArray:
    """[k, m] -> [m]: the value of largest magnitude, with its sign; the first of several."""
    extreme: FloatArray = np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0)[0]
    return extreme


# --- one group: x ~ scale * q, or x ~ scale * q - minimum; w are the weights of the squared errors ---------------------


def _whole(low: int, high: int) -> Nearest:
    """The nearest integer in low..high."""

    def nearest(x: FloatArray) -> FloatArray:
        q: FloatArray = np.rint(np.clip(x, low, high))
        return q

    return nearest


def _codes(x: FloatArray) -> Array:
    """Index of the nearest IQ4 level."""
    index: Array = _IQ4_NEAREST[np.clip(np.floor(2 * x), -256, 255).astype(np.int16) + 256]
    return index


def _levels(x: FloatArray) -> FloatArray:
    """The nearest IQ4 level itself."""
    levels: FloatArray = _IQ4_VALUES[_codes(x)]
    return levels


def _error(x: FloatArray, w: FloatArray, scale: FloatArray, minimum: FloatArray | None, nearest: Nearest) -> FloatArray:
    """[k, m], scale [m] -> [m]: squared error with the nearest integers for this scale (and minimum)."""
    raised = x if minimum is None else x + minimum
    residual = raised - scale * nearest(raised * _inverse(scale))
    return _sum(w * residual * residual)


def _fit_scale(x: FloatArray, w: FloatArray, lowest: float, highest: float, nearest: Nearest) -> FloatArray:
    """The best scale [m] of [k, m] values for ``nearest``, whose levels go from ``lowest`` to ``highest``.

    For integers q the best scale is x.q / q.q, and the squared error is then x.x - (x.q)^2 / q.q. The last attempt starts at
    the best scale found.
    """
    extreme = _extreme(x)
    naive = (extreme / np.float32(lowest), extreme / np.float32(highest))
    best, best_gain = naive[0], np.full(extreme.shape, -1, dtype=np.float32)
    attempts = [scale * factor for scale in naive for factor in _SIGNED_FACTORS]
    for attempt in range(len(attempts) + 1):
        q = nearest(x * _inverse(attempts[attempt] if attempt < len(attempts) else best))
        weighted = w * q
        product, square = _sum(weighted * x), _sum(weighted * q)
        scale = _divide(product, square)
        gain = product * scale
        better = gain > best_gain
        best, best_gain = np.where(better, scale, best), np.where(better, gain, best_gain)
    return best


def _fit_line(
    x: FloatArray, w: FloatArray, naive: FloatArray, naive_minimum: FloatArray, high: int, *, negative_only: bool
) -> tuple[FloatArray, FloatArray]:
    """x ~ scale * q - minimum with q in 0..high -> (scale, minimum), each [m].

    For integers q the best line is the regression of x on q. ``negative_only``: the format stores ``minimum`` as a number
    not below zero; where the regression wants another, the best line goes through zero. The last attempt starts at the best
    line found.
    """
    nearest = _whole(0, high)
    sum_w, sum_x, square_x = _sum(w), _sum(w * x), _sum(w * x * x)
    mean_x = sum_x / sum_w
    spread_x = square_x - sum_x * mean_x
    best, best_minimum = naive, naive_minimum
    best_error = np.full(naive.shape, np.inf, dtype=np.float32)
    for attempt in range(len(_LINE_FACTORS) + 1):
        scale, minimum = best, best_minimum
        if attempt < len(_LINE_FACTORS):
            scale, minimum = naive * _LINE_FACTORS[attempt], naive_minimum
        q = nearest((x + minimum) * _inverse(scale))
        weighted = w * q
        sum_q, square_q, product = _sum(weighted), _sum(weighted * q), _sum(weighted * x)
        mean_q = sum_q / sum_w
        covariance = product - sum_q * mean_x
        slope = np.maximum(_divide(covariance, square_q - sum_q * mean_q), np.float32(0))
        minimum = slope * mean_q - mean_x
        error = spread_x - slope * covariance
        if negative_only:
            through_zero = np.maximum(_divide(product, square_q), np.float32(0))
            clamped = minimum < 0
            slope = np.where(clamped, through_zero, slope)
            minimum = np.where(clamped, np.float32(0), minimum)
            error = np.where(clamped, square_x - through_zero * product, error)
        better = error < best_error
        best, best_minimum = np.where(better, slope, best), np.where(better, minimum, best_minimum)
        best_error = np.where(better, error, best_error)
    return best, best_minimum


# --- blocks of 32: [32, n] ---------------------------------------------------------------------------------------------


def _one_scale(
    x: FloatArray, w: FloatArray, lowest: float, highest: float, nearest: Nearest
) -> tuple[FloatArray, FloatArray]:
    """(d [n], q [32, n]): the better of the naive scale, which puts the extreme value on ``lowest``, and the fitted one."""
    naive = _f16(_extreme(x) / np.float32(lowest))
    fitted = _f16(_fit_scale(x, w, lowest, highest, nearest))
    better = _error(x, w, fitted, None, nearest) < _error(x, w, naive, None, nearest)
    d = np.where(better, fitted, naive)
    return d, nearest(x * _inverse(d))


def _q8_0(x: FloatArray, w: FloatArray) -> Array:
    out = np.empty(x.shape[1], dtype=layout.Q8_0_BLOCK)
    d = np.abs(x).max(axis=0) / np.float32(127)
    scaled = (x * _inverse(d)).T
    out["d"] = _f16(d)
    out["qs"] = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))  # halves away from zero, as ggml rounds
    return out


def _store_codes(out: Array, q: Array) -> None:
    """[n, 32] codes into the nibbles of ``out`` and, where the format has one, the fifth bit."""
    out["qs"] = _planes((q & 15).reshape(-1, 2, 16), 4)
    if "qh" in (out.dtype.names or ()):
        out["qh"] = np.packbits(q >> 4, axis=1, bitorder="little")


def _symmetric(x: FloatArray, w: FloatArray, block: np.dtype[Any], half: int) -> Array:
    out = np.empty(x.shape[1], dtype=block)
    out["d"], q = _one_scale(x, w, -half, half - 1, _whole(-half, half - 1))
    _store_codes(out, (q + half).astype(np.uint8).T)
    return out


def _iq4_nl(x: FloatArray, w: FloatArray) -> Array:
    out = np.empty(x.shape[1], dtype=layout.IQ4_NL_BLOCK)
    out["d"], q = _one_scale(x, w, _IQ4_LOWEST, _IQ4_HIGHEST, _levels)
    _store_codes(out, np.searchsorted(_IQ4_VALUES, q.T).astype(np.uint8))
    return out


def _affine(x: FloatArray, w: FloatArray, block: np.dtype[Any], high: int) -> Array:
    lowest = x.min(axis=0)
    naive = (x.max(axis=0) - lowest) / np.float32(high)
    d, minimum = (_f16(v) for v in _fit_line(x, w, naive, -lowest, high, negative_only=False))
    naive, naive_minimum = _f16(naive), _f16(-lowest)
    nearest = _whole(0, high)
    better = _error(x, w, d, minimum, nearest) < _error(x, w, naive, naive_minimum, nearest)
    d, minimum = np.where(better, d, naive), np.where(better, minimum, naive_minimum)
    out = np.empty(x.shape[1], dtype=block)
    out["d"], out["m"] = d, np.float32(0) - minimum
    _store_codes(out, nearest((x + minimum) * _inverse(d)).astype(np.uint8).T)
    return out


# --- blocks of 256: [size of a group, n * groups]; per group arrays are [n, groups] in memory --------------------------


def _per_block(a: FloatArray, groups: int) -> FloatArray:
    """[n * groups] -> [n], summed from the first group to the last."""
    return _sum(np.ascontiguousarray(a.reshape(-1, groups).T))


def _each_group(per_block: FloatArray, groups: int) -> FloatArray:
    """[n] -> [n * groups]"""
    return np.repeat(per_block, groups)


def _scaled_groups(
    x: FloatArray, w: FloatArray, lowest: float, highest: float, half: int, nearest: Nearest
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """x ~ d * scale * q -> (d [n], scales [n, groups] as integers -half..half-1, q [k, n * groups])."""
    groups = 256 // len(x)
    fitted = _fit_scale(x, w, lowest, highest, nearest)
    d = _f16(_extreme(np.ascontiguousarray(fitted.reshape(-1, groups).T)) / np.float32(-half))
    each_d = _each_group(d, groups)
    signed = _whole(-half, half - 1)
    scales = signed(fitted * _inverse(each_d))
    error = _error(x, w, each_d * scales, None, nearest)

    def step(scales: FloatArray, error: FloatArray) -> tuple[FloatArray, FloatArray]:
        centre = scales
        for change in (np.float32(-1), np.float32(1)):
            tried = signed(centre + change)
            tried_error = _error(x, w, each_d * tried, None, nearest)
            better = tried_error < error
            scales, error = np.where(better, tried, scales), np.where(better, tried_error, error)
        return scales, error

    scales, error = step(scales, error)
    y = scales * nearest(x * _inverse(each_d * scales))
    weighted = w * y
    tried_d = _f16(_divide(_per_block(_sum(weighted * x), groups), _per_block(_sum(weighted * y), groups)))
    tried_error = _error(x, w, _each_group(tried_d, groups) * scales, None, nearest)
    better = _per_block(tried_error, groups) < _per_block(error, groups)
    d = np.where(better, tried_d, d)
    each_d, error = _each_group(d, groups), np.where(np.repeat(better, groups), tried_error, error)
    scales, error = step(scales, error)
    return d, scales.reshape(-1, groups), nearest(x * _inverse(each_d * scales))


def _affine_groups(
    x: FloatArray, w: FloatArray, high: int, highest: int
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]:
    """x ~ d * scale * q - dmin * minimum -> (d [n], dmin [n], scales and minimums [n, groups] as integers 0..highest,
    q [k, n * groups] in 0..high).
    """
    groups = 256 // len(x)
    nearest, unsigned = _whole(0, high), _whole(0, highest)
    naive_minimum = np.float32(0) - np.minimum(x.min(axis=0), np.float32(0))
    naive = (x.max(axis=0) + naive_minimum) / np.float32(high)
    fitted, fitted_minimum = _fit_line(x, w, naive, naive_minimum, high, negative_only=True)
    d = _f16(fitted.reshape(-1, groups).max(axis=1) / np.float32(highest))
    dmin = _f16(fitted_minimum.reshape(-1, groups).max(axis=1) / np.float32(highest))
    each_d, each_dmin = _each_group(d, groups), _each_group(dmin, groups)
    scales, minimums = unsigned(fitted * _inverse(each_d)), unsigned(fitted_minimum * _inverse(each_dmin))
    error = _error(x, w, each_d * scales, each_dmin * minimums, nearest)
    sum_w, sum_x = _sum(w), _sum(w * x)
    mean_x = sum_x / sum_w

    def step(scales: FloatArray, minimums: FloatArray, error: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Tries the scale's neighbours, each with the best minimum for its integers."""
        centre, centre_minimum = scales, each_dmin * minimums
        for change in (np.float32(0), np.float32(-1), np.float32(1)):
            tried = unsigned(centre + change)
            scale = each_d * tried
            mean_q = _sum(w * nearest((x + centre_minimum) * _inverse(scale))) / sum_w
            tried_minimums = unsigned((scale * mean_q - mean_x) * _inverse(each_dmin))
            tried_error = _error(x, w, scale, each_dmin * tried_minimums, nearest)
            better = tried_error < error
            scales, minimums = np.where(better, tried, scales), np.where(better, tried_minimums, minimums)
            error = np.where(better, tried_error, error)
        return scales, minimums, error

    scales, minimums, error = step(scales, minimums, error)
    # The least squares problem for (d, dmin), two equations a block.
    y = scales * nearest((x + each_dmin * minimums) * _inverse(each_d * scales))
    weighted = w * y
    yy, yx = _per_block(_sum(weighted * y), groups), _per_block(_sum(weighted * x), groups)
    ym, mm = _per_block(_sum(weighted) * minimums, groups), _per_block(sum_w * minimums * minimums, groups)
    xm = _per_block(sum_x * minimums, groups)
    determinant = yy * mm - ym * ym
    tried_d = _f16(_divide(yx * mm - xm * ym, determinant))
    tried_dmin = _f16(_divide(yx * ym - xm * yy, determinant))
    tried_error = _error(
        x, w, _each_group(tried_d, groups) * scales, _each_group(tried_dmin, groups) * minimums, nearest
    )
    better = (_per_block(tried_error, groups) < _per_block(error, groups)) & (tried_d > 0) & (tried_dmin >= 0)
    d, dmin = np.where(better, tried_d, d), np.where(better, tried_dmin, dmin)
    each_d, each_dmin = _each_group(d, groups), _each_group(dmin, groups)
    error = np.where(np.repeat(better, groups), tried_error, error)
    scales, minimums, error = step(scales, minimums, error)
    q = nearest((x + each_dmin * minimums) * _inverse(each_d * scales))
    return d, dmin, scales.reshape(-1, groups), minimums.reshape(-1, groups), q


def _in_order(q: FloatArray) -> FloatArray:
    """[k, n * groups] -> [n, 256]"""
    return q.T.reshape(-1, 256)


def _q2_k(x: FloatArray, w: FloatArray) -> Array:
    d, dmin, scales, minimums, q = _affine_groups(x, w, 3, 15)
    out = np.empty(len(d), dtype=layout.Q2_K_BLOCK)
    out["d"], out["dmin"] = d, dmin
    out["scales"] = scales.astype(np.uint8) | minimums.astype(np.uint8) << 4
    out["qs"] = _planes(_in_order(q).reshape(-1, 2, 4, 32), 2)
    return out


def _pack_six_bits(scales: FloatArray, minimums: FloatArray) -> Array:
    """Two [n, 8] of 6 bits -> [n, 3, 4] bytes, the reverse of ``six_bit_scales``."""
    s, m = scales.astype(np.uint8), minimums.astype(np.uint8)
    rows = [
        s[:, :4] | (s[:, 4:] >> 4) << 6,
        m[:, :4] | (m[:, 4:] >> 4) << 6,
        (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4,
    ]
    return np.stack(rows, axis=1)


def _q4_k(x: FloatArray, w: FloatArray) -> Array:
    d, dmin, scales, minimums, q = _affine_groups(x, w, 15, 63)
    out = np.empty(len(d), dtype=layout.Q4_K_BLOCK)
    out["d"], out["dmin"] = d, dmin
    out["scales"] = _pack_six_bits(scales, minimums)
    out["qs"] = _planes(_in_order(q).reshape(-1, 4, 2, 32), 4)
    return out


def _q5_k(x: FloatArray, w: FloatArray) -> Array:
    d, dmin, scales, minimums, q = _affine_groups(x, w, 31, 63)
    out = np.empty(len(d), dtype=layout.Q5_K_BLOCK)
    whole = _in_order(q).astype(np.uint8)
    out["d"], out["dmin"] = d, dmin
    out["scales"] = _pack_six_bits(scales, minimums)
    out["qs"] = _planes((whole & 15).reshape(-1, 4, 2, 32), 4)
    out["qh"] = _planes((whole >> 4).reshape(-1, 8, 32), 1)
    return out


def _q3_k(x: FloatArray, w: FloatArray) -> Array:
    d, scales, q = _scaled_groups(x, w, -4, 3, 32, _whole(-4, 3))
    out = np.empty(len(d), dtype=layout.Q3_K_BLOCK)
    raised, six_bits = (_in_order(q) + 4).astype(np.uint8), (scales + 32).astype(np.uint8)
    out["d"] = d
    out["qs"] = _planes((raised & 3).reshape(-1, 2, 4, 32), 2)
    out["hmask"] = _planes((raised >> 2).reshape(-1, 8, 32), 1)
    out["scales"][:, :8] = _planes((six_bits & 15).reshape(-1, 2, 8), 4)
    out["scales"][:, 8:] = _planes((six_bits >> 4).reshape(-1, 4, 4), 2)
    return out


def _q6_k(x: FloatArray, w: FloatArray) -> Array:
    d, scales, q = _scaled_groups(x, w, -32, 31, 128, _whole(-32, 31))
    out = np.empty(len(d), dtype=layout.Q6_K_BLOCK)
    raised = (_in_order(q) + 32).astype(np.uint8)
    out["d"], out["scales"] = d, scales
    out["ql"] = _planes((raised & 15).reshape(-1, 2, 2, 64), 4)
    out["qh"] = _planes((raised >> 4).reshape(-1, 2, 4, 32), 2)
    return out


def _iq4_xs(x: FloatArray, w: FloatArray) -> Array:
    d, scales, levels = _scaled_groups(x, w, _IQ4_LOWEST, _IQ4_HIGHEST, 32, _levels)
    out = np.empty(len(d), dtype=layout.IQ4_XS_BLOCK)
    six_bits = (scales + 32).astype(np.uint8)
    out["d"] = d
    out["scales_l"] = (six_bits[:, 0::2] & 15) | (six_bits[:, 1::2] & 15) << 4
    high = (six_bits >> 4).astype(np.uint16) << (2 * np.arange(8)).astype(np.uint16)
    out["scales_h"] = np.bitwise_or.reduce(high, axis=1)
    out["qs"] = _planes(np.searchsorted(_IQ4_VALUES, _in_order(levels)).reshape(-1, 8, 2, 16), 4)
    return out


# --- all --------------------------------------------------------------------------------------------------------------


def to_bfloat16(values: FloatArray) -> npt.NDArray[np.uint16]:
    """float32 -> the bits of bfloat16, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    is_nan = bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000)
    quiet = bits >> np.uint32(16) | np.uint32(0x40)
    return np.where(is_nan, quiet, rounded).astype(np.uint16)


#: type -> (values of a group, encoder of groups [k, m] with weights of the same shape)
_ENCODERS: dict[QuantType, tuple[int, Callable[[FloatArray, FloatArray], Array]]] = {
    types.Q8_0: (32, _q8_0),
    types.Q4_0: (32, partial(_symmetric, block=layout.Q4_0_BLOCK, half=8)),
    types.Q4_1: (32, partial(_affine, block=layout.Q4_1_BLOCK, high=15)),
    types.Q5_0: (32, partial(_symmetric, block=layout.Q5_0_BLOCK, half=16)),
    types.Q5_1: (32, partial(_affine, block=layout.Q5_1_BLOCK, high=31)),
    types.Q2_K: (16, _q2_k),
    types.Q3_K: (16, _q3_k),
    types.Q4_K: (32, _q4_k),
    types.Q5_K: (32, _q5_k),
    types.Q6_K: (16, _q6_k),
    types.IQ4_NL: (32, _iq4_nl),
    types.IQ4_XS: (32, _iq4_xs),
}

QUANTISABLE: tuple[QuantType, ...] = (types.F32, types.F16, types.BF16, *_ENCODERS)


def column_weights(importance: Array | None, cols: int) -> FloatArray:
    """Weights [cols] of squared errors: importances over their mean, at least ``LEAST_IMPORTANCE``; ones where there are none
    (None, or all zero: an expert that was never chosen).

    Raises:
        ValueError: not one finite number, zero or more, for each column.
    """
    if importance is None:
        return np.ones(cols, dtype=np.float32)
    values = np.asarray(importance, dtype=np.float64)
    if values.shape != (cols,) or not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"expected {cols} importances, finite and not below zero, got shape {values.shape}")
    mean = values.mean()
    if mean == 0:
        return np.ones(cols, dtype=np.float32)
    weights: FloatArray = np.maximum(values / mean, LEAST_IMPORTANCE).astype(np.float32)
    return weights


def quantize(values: FloatArray, quant_type: QuantType, importance: Array | None = None) -> npt.NDArray[np.uint8]:
    """Encode finite values.

    Args:
        values: float32 [..., cols], cols a multiple of the type's block size.
        quant_type: one of ``QUANTISABLE``.
        importance: [cols], the mean square of the activation that each column multiplies, up to a factor; None: all alike.

    Returns:
        uint8 [..., row bytes].

    Raises:
        ValueError: the type has no quantiser, the columns do not fill its blocks, or the importances do not fit.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    cols = values.shape[-1]
    shape = (*values.shape[:-1], quant_type.row_bytes(cols))
    if quant_type is types.F32:
        return values.view(np.uint8).reshape(shape)
    if quant_type is types.F16:
        return values.astype(np.float16).view(np.uint8).reshape(shape)
    if quant_type is types.BF16:
        return to_bfloat16(values).view(np.uint8).reshape(shape)
    if quant_type not in _ENCODERS:
        raise ValueError(f"there is no quantiser for {quant_type}")
    size, encode = _ENCODERS[quant_type]
    block_size = quant_type.block_size
    blocks = values.reshape(-1, block_size)
    weights = column_weights(importance, cols).reshape(-1, block_size)
    out = np.empty((len(blocks), quant_type.block_bytes), dtype=np.uint8)
    step = _VALUES_PER_STEP // block_size
    for start in range(0, len(blocks), step):
        part = blocks[start : start + step]
        chosen = weights[np.arange(start, start + len(part)) % len(weights)]
        x, w = (np.ascontiguousarray(a.reshape(-1, size).T) for a in (part, chosen))
        out[start : start + step] = encode(x, w).view(np.uint8).reshape(-1, quant_type.block_bytes)
    return out.reshape(shape)
