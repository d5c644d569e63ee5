"""The twin of ``paged_attention`` in plain PyTorch."""

from __future__ import annotations

import torch


def head_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension. Squares are summed in float64, so that every order of summing gives the same
    cached key, bit for bit."""
    inverse = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps).to(x.dtype)
    return x * inverse * weight.to(x.dtype)


def rotate(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Half-split rotary embedding of the first R dimensions: ``x`` [T, heads, D], ``cos_sin`` [T, R] (cos of R/2 angles, then
    sin)."""
    rotary_dim = cos_sin.shape[1]
    cos, sin = cos_sin.to(x.dtype)[:, None, :].chunk(2, dim=-1)
    first, second = x[..., :rotary_dim].chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., rotary_dim:]], dim=-1)


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
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Writes keys and values of the new tokens, then attends.

    Args:
        qkv: [T, (Hq + 2 Hkv) * D] float32, rows q | k | v; gated [T, (2 Hq + 2 Hkv) * D], each head's queries followed by its gate.
        q_norm, k_norm: [D] float32 weights of the per-head RMSNorm.
        cos_sin: [max_positions, R] float32; the first R dimensions of each head rotate.
        positions: [T] int64.
        slot_mapping: [T] int64, ``page * page_size + offset``.
        page_tables: [N, P] int32.
        cu_seqlens: [N+1] int32.
        seq_lens: [N] int32, lengths including the new tokens.
        k_cache, v_cache: [num_pages, Hkv, page_size, D] float16 or float32, written in place.
        gated: whether the context is multiplied by ``sigmoid(gate)``.
        compute_dtype: dtype of every step; keys and values still pass through the cache's own dtype.

    Returns:
        [T, Hq * D] in ``compute_dtype``.

    Raises:
        ValueError: a position, slot or page outside its table.
    """
    num_pages, num_kv_heads, page_size, head_dim = k_cache.shape
    num_tokens = qkv.shape[0]
    query_parts = 2 if gated else 1
    num_heads = (qkv.shape[1] // head_dim - 2 * num_kv_heads) // query_parts
    for name, value, limit in (
        ("positions", positions, cos_sin.shape[0]),
        ("slot_mapping", slot_mapping, num_pages * page_size),
    ):
        if num_tokens and not (0 <= int(value.min()) and int(value.max()) < limit):
            raise ValueError(
                f"paged_attention: {name}: expected 0 <= value < {limit}, got {int(value.min())}..{int(value.max())}"
            )

    heads = qkv.to(compute_dtype).view(num_tokens, query_parts * num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = torch.split(heads, [query_parts * num_heads, num_kv_heads, num_kv_heads], dim=1)
    gate = q[:, 1::2] if gated else None
    q = q[:, ::query_parts]
    at = cos_sin[positions]
    q = rotate(head_norm(q, q_norm, eps), at)
    k = rotate(head_norm(k, k_norm, eps), at)
    pages, offsets = slot_mapping // page_size, slot_mapping % page_size
    k_cache[pages, :, offsets] = k.to(k_cache.dtype)
    v_cache[pages, :, offsets] = v.to(v_cache.dtype)

    context = torch.empty((num_tokens, num_heads, head_dim), dtype=compute_dtype)
    group = num_heads // num_kv_heads
    for i in range(seq_lens.shape[0]):
        begin, end, length = int(cu_seqlens[i]), int(cu_seqlens[i + 1]), int(seq_lens[i])
        table = page_tables[i, : -(-length // page_size)].long()
        if length and not (0 <= int(table.min()) and int(table.max()) < num_pages):
            raise ValueError(
                f"paged_attention: page_tables[{i}]: expected 0 <= page < {num_pages}, got {table.tolist()}"
            )
        # [P, Hkv, page_size, D] -> [Hq, length, D]
        keys, values = (
            cache[table].transpose(0, 1).reshape(num_kv_heads, -1, head_dim)[:, :length].to(compute_dtype)
            for cache in (k_cache, v_cache)
        )
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        scores = (q[begin:end].transpose(0, 1) @ keys.transpose(1, 2)) * scale
        future = torch.arange(length)[None, :] > positions[begin:end, None]
        scores = scores.masked_fill(future, float("-inf"))
        context[begin:end] = (scores.softmax(-1) @ values).transpose(0, 1)
    if gate is not None:
        context *= torch.sigmoid(gate)
    return context.view(num_tokens, num_heads * head_dim)
