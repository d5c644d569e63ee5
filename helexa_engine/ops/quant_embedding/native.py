"""``quant_embedding`` in the native core."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import require_native

_native = require_native()


def quant_embedding(ids: torch.Tensor, weight: Any) -> torch.Tensor:
    """See :func:`helexa_engine.ops.quant_embedding.reference.quant_embedding`. ``weight`` is a ``_native.PackedMatrix``."""
    ids = ids.to(torch.int64).contiguous()
    out = torch.empty((ids.numel(), weight.cols), dtype=torch.float32)
    _native.quant_embedding(weight, ids.data_ptr(), ids.numel(), out.data_ptr())
    return out
