"""``paged_attention`` in the native core: see ``csrc/cpu/paged_attention.h``."""

from __future__ import annotations

import torch

from ...quant import types
from ..packed_sequences import address_of
from ..registry import require_native

OP = "paged_attention"
PAGE_SIZE = 64
_KV_TYPES = {torch.float32: types.F32, torch.float16: types.F16, torch.int8: types.Q8_0}
_native = require_native()


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
    """See :func:`helexa_engine.ops.paged_attention.reference.paged_attention`.

    Raises:
        ValueError: a tensor of another shape or dtype; a position, slot or page that is out of range or does not belong to its
            sequence. Nothing is written then.
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
    kv_type = _KV_TYPES.get(k_cache.dtype)
    if kv_type is None:
        expected = ", ".join(map(str, _KV_TYPES))
        raise ValueError(f"paged_attention: k_cache: expected one of {expected}, got {k_cache.dtype}")
    k_shape: tuple[int, ...]
    v_shape: tuple[int, ...]
    if kv_type is types.Q8_0:
        k_shape = v_shape = (num_pages, num_kv_heads, types.Q8_0.row_bytes(PAGE_SIZE * head_dim))
    else:
        k_shape = (num_pages, num_kv_heads, head_dim, PAGE_SIZE)
        v_shape = (num_pages, num_kv_heads, PAGE_SIZE, head_dim)
    ctx = torch.empty((num_tokens, num_heads * head_dim), dtype=torch.float32)
    if num_tokens == 0:
        return ctx
    _native.paged_attention(
        address_of(OP, "qkv", qkv, torch.float32, (num_tokens, width)),
        address_of(OP, "q_norm", q_norm, torch.float32, (head_dim,)),
        address_of(OP, "k_norm", k_norm, torch.float32, (head_dim,)),
        eps,
        address_of(OP, "cos_sin", cos_sin, torch.float32, tuple(cos_sin.shape)),
        *cos_sin.shape,
        address_of(OP, "positions", positions, torch.int64, (num_tokens,)),
        address_of(OP, "slot_mapping", slot_mapping, torch.int64, (num_tokens,)),
        address_of(OP, "page_tables", page_tables, torch.int32, (num_sequences, pages_per_sequence)),
        pages_per_sequence,
        address_of(OP, "cu_seqlens", cu_seqlens, torch.int32, (num_sequences + 1,)),
        address_of(OP, "seq_lens", seq_lens, torch.int32, (num_sequences,)),
        num_sequences,
        address_of(OP, "k_cache", k_cache, k_cache.dtype, k_shape),
        address_of(OP, "v_cache", v_cache, k_cache.dtype, v_shape),
        num_pages,
        kv_type.number,
        gated,
        num_heads,
        num_kv_heads,
        head_dim,
        scale,
        ctx.data_ptr(),
        num_tokens,
    )
    return ctx
