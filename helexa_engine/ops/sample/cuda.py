"""``sample`` on a CUDA device: two kernels, a third where logits are adjusted, and a copy of them where their log probabilities are
wanted besides."""

from __future__ import annotations

import torch

from .. import cuda
from .rows import ROW, SampleRows


def sample(logits: torch.Tensor, rows: SampleRows) -> torch.Tensor:
    """See :func:`helexa_engine.ops.sample.reference.sample`."""
    size, vocab_size = logits.shape
    assert logits.dtype == torch.float32 and logits.is_contiguous() and size == rows.num_rows
    assert rows.mask is None or (rows.mask.dtype == torch.int32 and rows.mask.is_contiguous())
    out = torch.empty(rows.num_words, size, dtype=torch.int64, device=logits.device)
    if size == 0:
        return out
    kernels = cuda.require_kernels()
    reports = rows.num_logprobs is not None
    raw = logits.clone() if reports and rows.adjusts else logits
    words = kernels.sample_scratch_words(size, vocab_size, reports)
    scratch = torch.empty(words, dtype=torch.int64, device=logits.device)
    kernels.sample(
        rows.table.data_ptr(),
        ROW.size,
        size,
        vocab_size,
        logits.data_ptr(),
        raw.data_ptr(),
        0 if rows.mask is None else rows.mask.data_ptr(),
        0 if rows.mask is None else rows.mask.shape[1],
        rows.adjusts,
        -1 if rows.num_logprobs is None else rows.num_logprobs,
        scratch.data_ptr(),
        out.data_ptr(),
        stream=cuda.stream(logits),
    )
    return out
