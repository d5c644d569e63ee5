"""``paged_attention`` on CUDA: see ``csrc/cuda/paged_attention.h``.

Which kernels run depends on shapes alone, and lengths and tables are read on the device, so a step may be captured in a graph.
Queries and weights of the softmax are rounded to bfloat16 where they are multiplied; keys and values are as they are stored.
"""

from __future__ import annotations

import torch

from .. import cuda
from ..packed_sequences import address_of

OP = "paged_attention"
PAGE_SIZE = 64
_kernels = cuda.require_kernels


def paged_attention(
    qkv: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    page_tables: torch.Tensor,
    cu_seqlens: torch.Tensor,
    seq_lens: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scale: float,
    gated: bool = False,
) -> torch.Tensor:
    """See :func:`helexa_engine.ops.paged_attention.reference.paged_attention`; pages as they are on CUDA.

    Each sequence has at least one new token, and its new tokens are its last ones. One whose length is 0 only fills a batch up: its
    context is 0, and nothing of it is written.

    A sequence's context does not depend on what it is batched with, bit for bit.

    Raises:
        ValueError: a tensor of another shape or dtype. Positions, slots, pages and lengths are not looked at.
    """
    num_pages, num_kv_heads = k_cache.shape[:2]
    (head_dim,) = q_norm.shape
    num_tokens, width = qkv.shape
    num_sequences, pages_per_sequence = page_tables.shape
    query_parts = 2 if gated else 1
    num_heads, rest = divmod(width - 2 * num_kv_heads * head_dim, query_parts * head_dim)
    if num_heads < 1 or rest:
        queries = "2 * Hq" if gated else "Hq"
        raise ValueError(
            f"paged_attention: qkv: expected [T, ({queries} + {2 * num_kv_heads}) * {head_dim}], got {tuple(qkv.shape)}"
        )
    if k_cache.dtype not in (torch.bfloat16, torch.int8):
        raise ValueError(f"paged_attention: k_cache: expected torch.bfloat16 or torch.int8, got {k_cache.dtype}")
    quantised = k_cache.dtype == torch.int8
    rows = PAGE_SIZE // 16 * 17 if quantised else PAGE_SIZE
    page_shape = (num_pages, num_kv_heads, rows, head_dim)
    ctx = torch.empty((num_tokens, num_heads * head_dim), dtype=torch.float32, device=qkv.device)
    if num_tokens == 0:
        return ctx
    kernels = _kernels()
    workspace_bytes = kernels.paged_attention_workspace_bytes(
        num_tokens, num_sequences, pages_per_sequence, num_heads, num_kv_heads, head_dim
    )
    workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=qkv.device)
    kernels.paged_attention(
        address_of(OP, "qkv", qkv, torch.float32, (num_tokens, width)),
        address_of(OP, "q_norm", q_norm, torch.float32, (head_dim,)),
        address_of(OP, "k_norm", k_norm, torch.float32, (head_dim,)),
        eps,
        address_of(OP, "cos_sin", cos_sin, torch.float32, tuple(cos_sin.shape)),
        cos_sin.shape[1],
        address_of(OP, "positions", positions, torch.int64, (num_tokens,)),
        address_of(OP, "slot_mapping", slot_mapping, torch.int64, (num_tokens,)),
        address_of(OP, "page_tables", page_tables, torch.int32, (num_sequences, pages_per_sequence)),
        pages_per_sequence,
        address_of(OP, "cu_seqlens", cu_seqlens, torch.int32, (num_sequences + 1,)),
        address_of(OP, "seq_lens", seq_lens, torch.int32, (num_sequences,)),
        num_sequences,
        address_of(OP, "k_cache", k_cache, k_cache.dtype, page_shape),
        address_of(OP, "v_cache", v_cache, k_cache.dtype, page_shape),
        quantised,
        gated,
        num_heads,
        num_kv_heads,
        head_dim,
        scale,
        ctx.data_ptr(),
        num_tokens,
        workspace.data_ptr(),
        cuda.stream(qkv),
    )
    return ctx
