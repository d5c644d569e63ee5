"""``argmax`` in the native core."""

from __future__ import annotations

import torch

from ..registry import require_native

_native = require_native()


def argmax(values: torch.Tensor) -> torch.Tensor:
    """See :func:`helexa_engine.ops.argmax.reference.argmax`. ``values`` is contiguous float32."""
    assert values.dtype == torch.float32 and values.is_contiguous()
    out = torch.empty(values.shape[0], dtype=torch.int64)
    _native.argmax(values.data_ptr(), *values.shape, out.data_ptr())
    return out
