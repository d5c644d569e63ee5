"""The twin of ``paged_attention`` in plain PyTorch."""

from __future__ import annotations

import numpy as np
import torch

from ...quant import dequantize, quantize, types

PAGE_SIZE = 64  # tokens
_BLOCK = types.Q8_0.block_size


def _split(x: torch.Tensor, *sizes: int) -> torch.Tensor:
    """A view of ``x`` with several dimensions for its last."""
    return x.view(*x.shape[:-1], *sizes)


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q8_0 of float32 [..., D]: codes int8 [..., D] and scales float16 [..., D/32]. Of a block that is not finite the codes are
    0 and the scale is NaN, so that it shows."""
    finite = _split(x, -1, _BLOCK).isfinite().all(-1)
    clean = torch.where(finite[..., None], _split(x, -1, _BLOCK), 0.0).flatten(-2)
    blocks = quantize.quantize(clean.numpy(), types.Q8_0).view(dequantize.Q8_0_BLOCK)
    scales = torch.from_numpy(blocks["d"].astype(np.float16).reshape(finite.shape))
    codes = torch.from_numpy(blocks["qs"].astype(np.int8).reshape(x.shape))
    return codes, torch.where(finite, scales, float("nan"))


def quantised_query(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is left of queries [..., D] float32 that meet Q8_0 keys: codes as of Q8_0, scales that stay float32."""
    codes, _ = quantise(x)
    blocks = _split(x, -1, _BLOCK)
    scales = blocks.abs().amax(-1, keepdim=True) / 127 + (0 * blocks).sum(-1, keepdim=True)  # not finite: NaN
    return (_split(codes, -1, _BLOCK).to(dtype) * scales.to(dtype)).flatten(-2)


def is_cuda_layout(k_cache: torch.Tensor) -> bool:
    """Whether pages are laid out as the CUDA kernels read them."""
    return k_cache.dtype == torch.bfloat16 or (k_cache.dtype == torch.int8 and k_cache.ndim == 4)


class FloatPages:
    """Keys and values as numbers: bfloat16 on CUDA, both [num_pages, Hkv, 64, D]; float16 or float32 on the CPU, keys
    [num_pages, Hkv, D, 64], so that a page's scores are sums of rows."""

    def __init__(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        self._k = k_cache if k_cache.dtype == torch.bfloat16 else k_cache.transpose(2, 3)
        self._v = v_cache

    def write(self, pages: torch.Tensor, offsets: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Keys and values [T, Hkv, D] of tokens at ``offsets`` [T] of ``pages`` [T]."""
        self._k[pages, :, offsets] = k.to(self._k.dtype)
        self._v[pages, :, offsets] = v.to(self._v.dtype)

    def read(self, pages: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [P, Hkv, 64, D] of ``pages`` [P]."""
        return self._k[pages].to(dtype), self._v[pages].to(dtype)


class QuantisedPages:
    """Q8_0 along D, int8: first the codes, then the scales in float16.

    On CUDA [num_pages, Hkv, 64 + 4, D]: the codes of each token are a row, and the scales [64, D / 32] fill the last four.
    On the CPU [num_pages, Hkv, 64 * D / 32 * 34]. A vector of the processor takes the same dimensions of as many keys as fit, four
    of each, which is what its integer products add up: codes of keys lie [D / 4, 64, 4]. Those of values lie [64, D], and the
    scales of both [D / 32, 64].
    """

    def __init__(self, k_cache: torch.Tensor, v_cache: torch.Tensor, head_dim: int) -> None:
        if is_cuda_layout(k_cache):
            self._k = _split(k_cache[:, :, :PAGE_SIZE], head_dim // 4, 4)
            self._v = v_cache[:, :, :PAGE_SIZE]
            flat = (*k_cache.shape[:2], -1)
            self._k_scales, self._v_scales = (
                _split(cache[:, :, PAGE_SIZE:].view(flat).view(torch.float16), PAGE_SIZE, head_dim // _BLOCK)
                for cache in (k_cache, v_cache)
            )
            return
        size = PAGE_SIZE * head_dim
        self._k = _split(k_cache[..., :size], head_dim // 4, PAGE_SIZE, 4).transpose(2, 3)
        self._v = _split(v_cache[..., :size], PAGE_SIZE, head_dim)
        self._k_scales, self._v_scales = (
            _split(cache[..., size:].view(torch.float16), head_dim // _BLOCK, PAGE_SIZE).transpose(2, 3)
            for cache in (k_cache, v_cache)
        )

    def write(self, pages: torch.Tensor, offsets: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """As :meth:`FloatPages.write`, float32."""
        codes, self._k_scales[pages, :, offsets] = quantise(k)
        self._k[pages, :, offsets] = _split(codes, -1, 4)
        self._v[pages, :, offsets], self._v_scales[pages, :, offsets] = quantise(v)

    def read(self, pages: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`FloatPages.read`."""

        def values(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
            return codes.to(dtype) * scales.to(dtype).repeat_interleave(_BLOCK, -1)

        return (
            values(self._k[pages].flatten(-2), self._k_scales[pages]),
            values(self._v[pages], self._v_scales[pages]),
        )


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
        k_cache, v_cache: pages of 64 tokens, written in place; bfloat16, float16 or float32 as :class:`FloatPages` has them, or
            Q8_0 as :class:`QuantisedPages` does.
        gated: whether the context is multiplied by ``sigmoid(gate)``.
        compute_dtype: dtype of every step; keys and values still pass through the cache's own dtype. With Q8_0 pages keys (on the
            CPU queries too) are float32 until they are quantised, and scores are products of what is left of them.

    Returns:
        [T, Hq * D] in ``compute_dtype``.

    Raises:
        ValueError: a position, slot or page outside its table.
    """
    num_pages, num_kv_heads = k_cache.shape[:2]
    (head_dim,) = q_norm.shape
    quantised = k_cache.dtype == torch.int8
    cache = QuantisedPages(k_cache, v_cache, head_dim) if quantised else FloatPages(k_cache, v_cache)
    num_tokens = qkv.shape[0]
    query_parts = 2 if gated else 1
    num_heads = (qkv.shape[1] // head_dim - 2 * num_kv_heads) // query_parts
    for name, value, limit in (
        ("positions", positions, cos_sin.shape[0]),
        ("slot_mapping", slot_mapping, num_pages * PAGE_SIZE),
    ):
        if num_tokens and not (0 <= int(value.min()) and int(value.max()) < limit):
            raise ValueError(
                f"paged_attention: {name}: expected 0 <= value < {limit}, got {int(value.min())}..{int(value.max())}"
            )

    heads = qkv.to(torch.float32 if quantised else compute_dtype).view(
        num_tokens, query_parts * num_heads + 2 * num_kv_heads, head_dim
    )
    q, k, v = torch.split(heads, [query_parts * num_heads, num_kv_heads, num_kv_heads], dim=1)
    gate = q[:, 1::2] if gated else None
    q = q[:, ::query_parts]
    at = cos_sin[positions]
    q = rotate(head_norm(q, q_norm, eps), at)
    k = rotate(head_norm(k, k_norm, eps), at)
    cache.write(slot_mapping // PAGE_SIZE, slot_mapping % PAGE_SIZE, k, v)
    q = q * scale
    if quantised:
        q = q.to(compute_dtype) if is_cuda_layout(k_cache) else quantised_query(q, compute_dtype)

    context = torch.empty((num_tokens, num_heads, head_dim), dtype=compute_dtype)
    group = num_heads // num_kv_heads
    for i in range(seq_lens.shape[0]):
        begin, end, length = int(cu_seqlens[i]), int(cu_seqlens[i + 1]), int(seq_lens[i])
        table = page_tables[i, : -(-length // PAGE_SIZE)].long()
        if length and not (0 <= int(table.min()) and int(table.max()) < num_pages):
            raise ValueError(
                f"paged_attention: page_tables[{i}]: expected 0 <= page < {num_pages}, got {table.tolist()}"
            )
        # [P, Hkv, 64, D] -> [Hq, length, D]
        keys, values = (
            rows.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)[:, :length]
            for rows in cache.read(table, compute_dtype)
        )
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        scores = q[begin:end].transpose(0, 1) @ keys.transpose(1, 2)
        future = torch.arange(length)[None, :] > positions[begin:end, None]
        scores = scores.masked_fill(future, float("-inf"))
        context[begin:end] = (scores.softmax(-1) @ values).transpose(0, 1)
    if gate is not None:
        context *= torch.sigmoid(gate.to(compute_dtype))
    return context.view(num_tokens, num_heads * head_dim)
