"""``moe_matmul`` in the native core: see ``csrc/cpu/moe_matmul.cpp``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...quant.types import F32, QuantType
from ..registry import require_native
from .experts import Experts
from .reference import check_stack

_native = require_native()


def pack_experts(
    quant_type: QuantType,
    data: np.ndarray,
    rows: int,
    cols: int,
    *,
    scales: tuple[float, ...] = (),
    mapped: bool = False,
) -> Any:
    """Repacks each expert into tiles of 16 interleaved rows; ``data`` is needed afterwards only when ``mapped``."""
    check_stack(quant_type, data, rows, cols)
    arguments = (quant_type.number, data.ctypes.data, rows, cols, data.shape[0], data.strides[0])
    return _native.map_stack(*arguments, data, scales) if mapped else _native.pack(*arguments, scales)


def pack_router(weight: torch.Tensor, shared_gate: torch.Tensor | None = None) -> Any:
    """One matrix: the shared expert's gate is the router's last row."""
    rows = weight if shared_gate is None else torch.cat([weight, shared_gate[None]])
    rows = rows.to(torch.float32).contiguous()
    return _native.pack(F32.number, rows.data_ptr(), *rows.shape)


def moe_matmul(
    x: torch.Tensor,
    router: Any,
    experts: Experts,
    shared: Experts | None = None,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    top_k: int,
    norm_topk_prob: bool = True,
) -> torch.Tensor:
    """See :mod:`helexa_engine.ops.moe_matmul`. Matrices are ``_native.PackedMatrix``."""
    if x.dtype != torch.float32 or not x.is_contiguous() or x.dim() != 2 or x.shape[1] != router.cols:
        raise ValueError(
            f"moe_matmul: x: expected contiguous float32 [T, {router.cols}], got {x.dtype} {tuple(x.shape)}"
        )
    _native.moe_matmul(
        x.data_ptr(),
        x.shape[0],
        norm_weight.data_ptr() if norm_weight is not None else 0,
        norm_eps,
        router,
        experts,
        shared or (None, None, None),
        top_k,
        norm_topk_prob,
    )
    return x
