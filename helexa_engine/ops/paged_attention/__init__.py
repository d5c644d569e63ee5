"""Attention of new tokens over paged keys and values, with everything between the q|k|v product and the context in one op:
per-head RMSNorm of q and k, rotary embedding (half-split, of the whole head or its first part), cache write, causal grouped-query
attention, and the sigmoid gate of the context where there is one.

``paged_attention(qkv, q_norm, k_norm, eps, cos_sin, positions, slot_mapping, page_tables, cu_seqlens, seq_lens, k_cache, v_cache,
scale, gated=False) -> ctx``; arguments as in :func:`helexa_engine.ops.paged_attention.reference.paged_attention`.
"""

from __future__ import annotations

from ..registry import Implementation, Op

paged_attention = Op(
    "paged_attention",
    "helexa_engine.ops.paged_attention.reference",
    Implementation(
        "cuda",
        "cuda",
        "helexa_engine.ops.paged_attention.cuda",
        supports=lambda facts: facts["head_dim"] % 16 == 0 and facts["head_dim"] <= 256,
        computes_in="bfloat16",
    ),
    Implementation(
        "native",
        "cpu",
        "helexa_engine.ops.paged_attention.native",
        supports=lambda facts: facts["head_dim"] % 16 == 0 and facts["head_dim"] <= 512,
    ),
)

__all__ = ["paged_attention"]
