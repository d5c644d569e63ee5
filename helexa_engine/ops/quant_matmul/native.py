"""``quant_matmul`` in the native core: see ``csrc/cpu/quant_matmul.cpp``."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...quant.types import QuantType
from ..registry import require_native
from .reference import check_matrix

if TYPE_CHECKING:
    from .reference import Activation

_native = require_native()
_rows_of = operator.attrgetter("rows")


def pack(quant_type: QuantType, data: np.ndarray, rows: int, cols: int, *, scale: float = 1.0) -> Any:
    """Repacks ``data`` (uint8, as in a GGUF file) into tiles of 16 interleaved rows; ``data`` is not needed afterwards. Raises
    ValueError when it has the wrong number of bytes."""
    check_matrix(quant_type, data, rows, cols)
    data = np.ascontiguousarray(data)
    return _native.pack(quant_type.number, data.ctypes.data, rows, cols, scales=[scale])


def quant_matmul(
    x: torch.Tensor,
    parts: Sequence[Any],
    *,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    activation: Activation | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """See :func:`helexa_engine.ops.quant_matmul.reference.quant_matmul`. ``parts`` is a list of ``_native.PackedMatrix``."""
    if x.dtype != torch.float32 or not x.is_contiguous() or x.dim() != 2:
        raise ValueError(f"quant_matmul: x: expected contiguous float32 [T, K], got {x.dtype} {tuple(x.shape)}")
    num_rows, cols = x.shape
    width = sum(map(_rows_of, parts))
    if activation:
        width //= 2
    target = residual if residual is not None else out
    if target is None:
        target = torch.empty((num_rows, width), dtype=torch.float32)
    elif target.dtype != torch.float32 or target.shape != (num_rows, width) or not target.is_contiguous():
        raise ValueError(
            f"quant_matmul: output: expected contiguous float32 {(num_rows, width)}, got {target.dtype} {tuple(target.shape)}"
        )
    if cols != parts[0].cols:
        raise ValueError(f"quant_matmul: x: expected [T, {parts[0].cols}], got {tuple(x.shape)}")
    _native.quant_matmul(
        parts,
        x.data_ptr(),
        num_rows,
        target.data_ptr(),
        norm_weight.data_ptr() if norm_weight is not None else 0,
        norm_eps,
        activation == "silu_mul",
        residual is not None,
        exact,
    )
    return target
