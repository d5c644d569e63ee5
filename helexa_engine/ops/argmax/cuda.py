"""``argmax`` on a CUDA device."""

from __future__ import annotations

import torch

from .. import cuda


def argmax(values: torch.Tensor) -> torch.Tensor:
    """See :func:`helexa_engine.ops.argmax.reference.argmax`. ``values`` is contiguous float32."""
    assert values.dtype == torch.float32 and values.is_contiguous()
    kernels = cuda.require_kernels()
    scratch = torch.empty(kernels.argmax_scratch_words(*values.shape), dtype=torch.int64, device=values.device)
    out = torch.empty(values.shape[0], dtype=torch.int64, device=values.device)
    if values.shape[0]:
        kernels.argmax(values.data_ptr(), *values.shape, scratch.data_ptr(), out.data_ptr(), stream=cuda.stream(values))
    return out
