"""``quant_matmul`` on a CUDA device: see ``csrc/cuda/quant_matvec.cu`` for up to eight rows of activations, and :mod:`.cuda_matmul`
for more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...quant.types import QuantType
from .. import cuda
from ..upload import upload_planes
from .cuda_matmul import quant_matmul_many, supports

if TYPE_CHECKING:
    from .reference import Activation

_kernels = cuda.require_kernels

#: Rows of activations up to which weights are multiplied as they stream by.
MATVEC_ROWS = 8


@dataclass(frozen=True, slots=True)
class PlanarMatrix:
    """A matrix [rows, cols] in planes (``csrc/cuda/quant_planes.h``) on a device.

    Attributes:
        quant_type: how its values are stored; no bit of them is changed.
        planes: [nbytes] uint8.
        scale: what its products are multiplied with.
    """

    quant_type: QuantType
    planes: torch.Tensor
    rows: int
    cols: int
    scale: float = 1.0

    @property
    def nbytes(self) -> int:
        return self.planes.numel()


def pack(quant_type: QuantType, data: np.ndarray, rows: int, cols: int, *, scale: float = 1.0) -> PlanarMatrix:
    """Uploads ``data`` (uint8, as in a GGUF file), which is repacked on the device and not needed afterwards.

    Raises:
        ValueError: ``data`` has the wrong number of bytes, or the type is none that a device keeps.
    """
    return PlanarMatrix(quant_type, upload_planes(quant_type, data, rows, cols), rows, cols, scale)


def unpack(matrix: PlanarMatrix) -> torch.Tensor:
    """The bytes that were packed, uint8 on the device."""
    quant_type = matrix.quant_type
    size = matrix.rows * quant_type.row_bytes(matrix.cols)
    out = torch.empty(size, dtype=torch.uint8, device=matrix.planes.device)
    if size:
        _kernels().unpack_planes(
            quant_type.number,
            matrix.planes.data_ptr(),
            0,
            matrix.rows,
            matrix.rows,
            matrix.cols,
            out.data_ptr(),
            cuda.stream(out),
        )
    return out


def quant_matmul(
    x: torch.Tensor,
    parts: Sequence[PlanarMatrix],
    *,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    activation: Activation | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """See :func:`helexa_engine.ops.quant_matmul.reference.quant_matmul`. Nothing waits for the device."""
    if x.dtype != torch.float32 or not x.is_contiguous() or x.dim() != 2:
        raise ValueError(f"quant_matmul: x: expected contiguous float32 [T, K], got {x.dtype} {tuple(x.shape)}")
    num_rows, cols = x.shape
    for part in parts:
        if part.cols != cols:
            raise ValueError(f"quant_matmul: parts: expected matrices of {cols} columns, as x has, got {part.cols}")
    gated = activation == "silu_mul"
    if activation is not None and not gated:
        raise ValueError(f"quant_matmul: activation: expected None or 'silu_mul', got {activation!r}")
    if gated and residual is not None:
        raise ValueError("quant_matmul: residual: expected none with silu_mul, got a tensor")
    width = sum(part.rows for part in parts) // (2 if gated else 1)
    target = residual if residual is not None else out
    if target is None:
        target = torch.empty((num_rows, width), dtype=torch.float32, device=x.device)
    elif target.dtype != torch.float32 or target.shape != (num_rows, width) or not target.is_contiguous():
        raise ValueError(
            f"quant_matmul: output: expected contiguous float32 {(num_rows, width)}, got {target.dtype} {tuple(target.shape)}"
        )
    half = len(parts) // 2
    if num_rows > MATVEC_ROWS and supports(parts):
        if gated and [p.rows for p in parts[:half]] != [p.rows for p in parts[half:]]:
            raise ValueError("quant_matmul: parts: expected gates and as many ups of the same rows")
        return quant_matmul_many(
            x,
            parts,
            norm_weight=norm_weight,
            norm_eps=norm_eps,
            gated=gated,
            add=residual is not None,
            out=target,
            exact=exact,
        )
    if gated and any(gate.quant_type != up.quant_type for gate, up in zip(parts[:half], parts[half:], strict=False)):
        # A gate and an up of two types are not multiplied by one warp.
        products = quant_matmul(x, parts, norm_weight=norm_weight, norm_eps=norm_eps, exact=exact)
        gate, up = products.chunk(2, dim=-1)
        return torch.mul(torch.nn.functional.silu(gate), up, out=target)
    kernels = _kernels()
    described = [(p.quant_type.number, p.planes.data_ptr(), p.rows, p.scale) for p in parts]
    for first in range(0, num_rows, MATVEC_ROWS):
        some = x[first : first + MATVEC_ROWS]
        needed = kernels.quant_matvec_workspace(some.shape[0], cols)
        workspace = torch.empty(needed, dtype=torch.uint8, device=x.device) if needed else None
        kernels.quant_matvec(
            described,
            cols,
            some.data_ptr(),
            some.shape[0],
            norm_weight.data_ptr() if norm_weight is not None else 0,
            norm_eps,
            gated,
            residual is not None,
            exact,
            target[first : first + MATVEC_ROWS].data_ptr(),
            workspace.data_ptr() if workspace is not None else 0,
            cuda.stream(x),
        )
    return target
