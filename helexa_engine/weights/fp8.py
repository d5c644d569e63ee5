"""Checkpoints whose matrices are 8-bit floats (e4m3) with scales, as Qwen publishes them: presented as bfloat16.

A matrix ``NAME`` [out, in] of e4m3 has a companion: ``NAME_scale_inv`` [ceil(out / b0), ceil(in / b1)], one for each block of
``weight_block_size``; or, where there is no such size, ``NAME_scale`` (compressed-tensors), one a row or one in all. Despite its
name the first is what the values are multiplied with. Source: ``FineGrainedFP8Config`` of HuggingFace transformers and the
compressed-tensors format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UnsupportedCheckpoint
from ..quant import types
from ..quant.quantize import to_bfloat16
from .raw_tensor import RawTensor

SCALE_SUFFIXES = ("_scale_inv", "_scale")
_DEFAULT_BLOCK = (128, 128)
_MAX_BLOCK = 2**24
_ROWS_AT_ONCE = 1024
_COMPRESSED_FORMATS = ("float-quantized", "naive-quantized")


def _e4m3_values() -> npt.NDArray[np.float32]:
    """float32 of the 256 codes: sign, 4 bits of exponent (bias 7), 3 of mantissa; all ones is NaN, there is no infinity."""
    codes = np.arange(128)
    exponent, mantissa = codes >> 3, codes & 7
    values = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


E4M3_VALUES = _e4m3_values()
_MAX_SCALE = np.finfo(np.float32).max / np.nanmax(E4M3_VALUES)  # beyond it the largest code becomes infinite


@dataclass(frozen=True, slots=True)
class Fp8Scheme:
    """How the matrices of a checkpoint are scaled. ``block``: (rows, columns) that share a scale; None for one a row or in all."""

    block: tuple[int, int] | None

    @classmethod
    def from_config(cls, config: Any, where: str) -> Fp8Scheme:
        """From ``quantization_config``.

        Raises:
            UnsupportedCheckpoint: another way of quantising, with what to take instead.
        """
        if not isinstance(config, Mapping):
            raise UnsupportedCheckpoint(f"quantization_config: expected an object, got {config!r:.60}", where)
        method = config.get("quant_method")
        if method is None:
            raise UnsupportedCheckpoint("quantization_config: quant_method is missing", where)
        if method == "fp8":
            kind, is_fp8 = str(config.get("fmt", "e4m3")), config.get("fmt", "e4m3") in ("e4m3", "float8_e4m3fn")
            block = config.get("weight_block_size", _DEFAULT_BLOCK)
        elif method == "compressed-tensors":
            kind, is_fp8 = str(config.get("format")), config.get("format") in _COMPRESSED_FORMATS
            groups = config.get("config_groups")
            weights = [g.get("weights") for g in groups.values()] if isinstance(groups, Mapping) else []
            structures = [w.get("block_structure") for w in weights if isinstance(w, Mapping)]
            block = next((b for b in structures if b is not None), None)
        else:
            kind, is_fp8, block = "", False, _DEFAULT_BLOCK
        if not is_fp8:
            form = f" ({kind})" if kind else ""
            raise UnsupportedCheckpoint(
                f"weights quantised by {method!r}{form} are not supported; take the original checkpoint, which helexa "
                "quantises itself, or a GGUF file",
                where,
            )
        if block is None:
            return cls(None)
        sizes = list(block) if isinstance(block, (list, tuple)) else []
        if len(sizes) != 2 or not all(type(n) is int and 0 < n <= _MAX_BLOCK for n in sizes):
            raise UnsupportedCheckpoint(f"weight_block_size: expected two positive numbers, got {block!r:.60}", where)
        return cls((sizes[0], sizes[1]))

    def dequantized(self, codes: RawTensor, scale: RawTensor, where: str) -> RawTensor:
        """The matrix (or one an expert) as bfloat16, computed when it is asked for.

        Args:
            codes: one byte a value.

        Raises:
            UnsupportedCheckpoint: the scales do not fit the matrix.
        """
        place = f"{where}: tensor {scale.name!r}"
        if len(codes.shape) < 2:
            raise UnsupportedCheckpoint(
                f"8-bit floats of shape {list(codes.shape)}; only matrices have scales",
                f"{where}: tensor {codes.name!r}",
            )
        if not scale.quant_type.is_float:
            raise UnsupportedCheckpoint("expected scales of 16, 32 or 64 bits, got 8-bit floats", place)
        *stack, rows, cols = codes.shape
        matrices = math.prod(stack)
        block = self._block_of(scale, tuple(stack), rows, cols)
        if block is None:
            way = (
                "one a row or one in all"
                if self.block is None
                else f"in blocks of {list(self.block)} (weight_block_size)"
            )
            raise UnsupportedCheckpoint(
                f"scales of shape {list(scale.shape)} do not fit a matrix of {list(codes.shape)}, {way}", place
            )
        block_rows, block_cols = block

        def compute() -> np.ndarray:
            scales = scale.values().reshape(-1, -(-rows // block_rows), -(-cols // block_cols))
            scales = np.broadcast_to(scales, (matrices, *scales.shape[1:]))
            if not (np.abs(scales) <= _MAX_SCALE).all():
                raise UnsupportedCheckpoint("scales that are NaN or too large", place)
            stored = codes.data.reshape(matrices, rows, cols)
            out = np.empty((matrices, rows, cols), np.uint16)
            for i in range(matrices):
                for start in range(0, rows, _ROWS_AT_ONCE):
                    end = min(start + _ROWS_AT_ONCE, rows)
                    each = np.repeat(scales[i][np.arange(start, end) // block_rows], block_cols, axis=1)[:, :cols]
                    out[i, start:end] = to_bfloat16(E4M3_VALUES[stored[i, start:end]] * each)
            return out.reshape(-1).view(np.uint8)

        return RawTensor(codes.name, types.BF16, codes.shape, compute, (*codes.stored_names, *scale.stored_names))

    def _block_of(self, scale: RawTensor, stack: tuple[int, ...], rows: int, cols: int) -> tuple[int, int] | None:
        """(rows, columns) that share a scale, at most the whole matrix; None when the shape of the scales is another."""
        shape = scale.shape
        if self.block is not None:
            block = min(self.block[0], rows), min(self.block[1], cols)
            return block if min(block) and shape == (*stack, -(-rows // block[0]), -(-cols // block[1])) else None
        if not rows or not cols:
            return None
        if shape in ((), (1,), stack, (*stack, 1), (*stack, 1, 1)):
            return rows, cols
        return (1, cols) if shape in ((*stack, rows), (*stack, rows, 1)) else None
