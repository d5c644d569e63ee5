"""``quant_embedding`` on a CUDA device: see ``csrc/cuda/quant_embedding.cu``."""

from __future__ import annotations

import torch

from .. import cuda
from ..quant_matmul.cuda import PlanarMatrix


def quant_embedding(ids: torch.Tensor, weight: PlanarMatrix) -> torch.Tensor:
    """Rows ``ids`` [T] int64 of ``weight`` as float32 [T, K]. The ids stay on the device: one outside the table gives a row of NaN."""
    ids = ids.to(torch.int64).contiguous()
    out = torch.empty((ids.numel(), weight.cols), dtype=torch.float32, device=ids.device)
    if ids.numel():
        cuda.require_kernels().quant_embedding(
            weight.quant_type.number,
            weight.planes.data_ptr(),
            weight.rows,
            weight.cols,
            weight.scale,
            ids.data_ptr(),
            ids.numel(),
            out.data_ptr(),
            cuda.stream(ids),
        )
    return out
