"""``paged_attention`` in the native core: see ``csrc/cpu/paged_attention.h``."""

from __future__ import annotations

import torch

from ..registry import require_native

_native = require_native()


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """The address of a tensor that is what it should be. Raises ValueError."""
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(
            f"paged_attention: {name}: expected contiguous {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            f"{'' if tensor.is_contiguous() else ', not contiguous'}"
        )
    return tensor.data_ptr()


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
    """See :func:`helexa_engine.ops.paged_attention.reference.paged_attention`; pages hold 64 tokens.

    Raises:
        ValueError: a tensor of another shape or dtype; a position, slot or page that is out of range or does not belong to its
            sequence. Nothing is written then.
    """
    num_pages, num_kv_heads, _, head_dim = k_cache.shape
    num_tokens, width = qkv.shape
    num_sequences, pages_per_sequence = page_tables.shape
    query_parts = 2 if gated else 1
    num_heads, rest = divmod(width - 2 * num_kv_heads * head_dim, query_parts * head_dim)
    if num_heads < 1 or rest:
        queries = "2 * Hq" if gated else "Hq"
        raise ValueError(
            f"paged_attention: qkv: expected [T, ({queries} + {2 * num_kv_heads}) * {head_dim}], got {tuple(qkv.shape)}"
        )
    cache_shape = (num_pages, num_kv_heads, 64, head_dim)
    cache_dtype = torch.float16 if k_cache.dtype == torch.float16 else torch.float32
    ctx = torch.empty((num_tokens, num_heads * head_dim), dtype=torch.float32)
    if num_tokens == 0:
        return ctx
    _native.paged_attention(
        _check("qkv", qkv, torch.float32, (num_tokens, width)),
        _check("q_norm", q_norm, torch.float32, (head_dim,)),
        _check("k_norm", k_norm, torch.float32, (head_dim,)),
        eps,
        _check("cos_sin", cos_sin, torch.float32, tuple(cos_sin.shape)),
        *cos_sin.shape,
        _check("positions", positions, torch.int64, (num_tokens,)),
        _check("slot_mapping", slot_mapping, torch.int64, (num_tokens,)),
        _check("page_tables", page_tables, torch.int32, (num_sequences, pages_per_sequence)),
        pages_per_sequence,
        _check("cu_seqlens", cu_seqlens, torch.int32, (num_sequences + 1,)),
        _check("seq_lens", seq_lens, torch.int32, (num_sequences,)),
        num_sequences,
        _check("k_cache", k_cache, cache_dtype, cache_shape),
        _check("v_cache", v_cache, cache_dtype, cache_shape),
        num_pages,
        cache_dtype == torch.float16,
        gated,
        num_heads,
        num_kv_heads,
        head_dim,
        scale,
        ctx.data_ptr(),
        num_tokens,
    )
    return ctx
