"""The twin of ``quant_matmul`` in plain PyTorch: dequantise, multiply. Nothing is cached, so memory stays the file's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ...quant.dequantize import dequantize
from ...quant.types import QuantType

Activation = Literal["silu_mul"]


@dataclass(frozen=True)
class BlockMatrix:
    """A matrix [rows, cols] as the file stores it: ``data`` uint8, ``rows * quant_type.row_bytes(cols)`` bytes.

    ``scale`` multiplies the products: NVFP4 files have one beside the blocks.
    """

    quant_type: QuantType
    data: np.ndarray
    rows: int
    cols: int
    scale: float = 1.0

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)

    def dequantized(self, rows: np.ndarray | slice = slice(None)) -> torch.Tensor:
        """Rows as float32 [n, cols], without the scale."""
        blocks = self.data.reshape(self.rows, -1)[rows]
        return torch.from_numpy(dequantize(self.quant_type, blocks.reshape(-1), (blocks.shape[0], self.cols)))


def check_matrix(quant_type: QuantType, data: np.ndarray, rows: int, cols: int) -> None:
    """Raises ValueError unless ``data`` holds a matrix [rows, cols] of this type."""
    expected = rows * quant_type.row_bytes(cols)
    if data.dtype != np.uint8 or data.nbytes != expected:
        raise ValueError(
            f"pack: data: expected {expected} bytes as uint8 for {rows} x {cols} {quant_type}, got {data.nbytes}"
        )


def pack(quant_type: QuantType, data: np.ndarray, rows: int, cols: int, *, scale: float = 1.0) -> BlockMatrix:
    """Keeps the blocks as they are. Raises ValueError when ``data`` has the wrong number of bytes."""
    check_matrix(quant_type, data, rows, cols)
    return BlockMatrix(quant_type, np.array(data, copy=True), rows, cols, scale)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``w * x / sqrt(mean(x^2) + eps)`` over the last dimension (Zhang and Sennrich, 2019)."""
    return weight.to(x.dtype) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def quant_matmul(
    x: torch.Tensor,
    parts: Sequence[BlockMatrix],
    *,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    activation: Activation | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    exact: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """See :mod:`helexa_engine.ops.quant_matmul`.

    Args:
        x: [T, K] float32.
        parts: matrices [N_i, K].
        norm_weight: [K] float32; RMSNorm of ``x`` in front.
        activation: ``"silu_mul"`` splits the product [T, 2F] into gate and up and gives ``silu(gate) * up`` [T, F].
        residual: [T, N] float32, added to *in place* and returned.
        out: [T, N] float32 to write to.
        exact: BF16 weights meet activations as they are. Implementations may round them to bfloat16 otherwise
            (:func:`bfloat16_activations`); here they never are.
        compute_dtype: dtype of every step; float64 makes this the truth of tests.
    """
    value = x.to(compute_dtype)
    if norm_weight is not None:
        value = rms_norm(value, norm_weight, norm_eps)
    value = torch.cat([value @ part.dequantized().to(compute_dtype).T * part.scale for part in parts], dim=-1)
    if activation == "silu_mul":
        gate, up = value.chunk(2, dim=-1)
        value = torch.nn.functional.silu(gate) * up
    elif activation is not None:
        raise ValueError(f"quant_matmul: activation: expected None or 'silu_mul', got {activation!r}")
    if residual is not None:
        return (
            residual.add_(value.to(residual.dtype))
            if compute_dtype == residual.dtype
            else residual.to(compute_dtype) + value
        )
    if out is not None:
        return out.copy_(value)
    return value


def quantized_activations(x: torch.Tensor) -> torch.Tensor:
    """``x`` [T, K] float32 as the integer kernels see it: int8 times one float32 scale for each 32 values; -> [T, K] float64.

    ``quant_matmul`` of this in float64 is the integer twin: the kernels differ from it by float32 rounding only.
    """
    groups = x.reshape(x.shape[0], -1, 32)
    largest = groups.abs().amax(-1, keepdim=True)
    # torch computes 127 / x as 127 * (1 / x).
    inverse = torch.where(largest > 1e-30, torch.full_like(largest, 127) / largest, 0.0)
    codes = torch.round(groups * inverse)
    return (codes.double() * (largest / 127.0).double()).reshape(x.shape)


def bfloat16_activations(x: torch.Tensor) -> torch.Tensor:
    """``x`` [T, K] float32 as bfloat16 weights meet it: rounded to bfloat16; -> [T, K] float64. Such a product is exact in float32."""
    return x.bfloat16().double()
