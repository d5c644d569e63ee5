"""The twin of ``quant_embedding`` in plain PyTorch."""

from __future__ import annotations

import torch

from ..quant_matmul.reference import BlockMatrix


def quant_embedding(ids: torch.Tensor, weight: BlockMatrix) -> torch.Tensor:
    """Rows ``ids`` [T] int64 of ``weight`` as float32 [T, K]. Raises ValueError for an id outside the table."""
    if ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < weight.rows):
        raise ValueError(
            f"quant_embedding: ids: expected 0 <= id < {weight.rows}, got {int(ids.min())}..{int(ids.max())}"
        )
    return weight.dequantized(ids.numpy()) * weight.scale
