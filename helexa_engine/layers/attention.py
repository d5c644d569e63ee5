"""Grouped-query attention over a paged cache, with per-head RMSNorm of queries and keys, gated or not."""

from __future__ import annotations

import torch

from ..batch import Batch
from ..cache.spec import AttentionCache
from ..ops.paged_attention import paged_attention
from .linear import Linear
from .norm import RMSNorm
from .weight import ParameterSlot


class Attention:
    """``x + o(attention(rope(norm(q)), rope(norm(k)), v))`` of one layer; gated, the context is multiplied by ``sigmoid(gate)`` first.

    Qwen3.5's interleaved M-RoPE gives each pair of dimensions one of three positions (time, height, width). For text they are one
    and the same, so that it equals the plain partial embedding that is computed here.

    Args:
        prefix: HuggingFace parameter prefix, ``model.layers.0.self_attn``.
        layer_idx: which of ``batch.caches`` is this layer's.
        rotary: [max_positions, rotary_dim] float32, shared by all layers (see :func:`rotary_table`).
        gated: the query projection has as many rows again for the gates: ``head_dim`` of queries, then of gates, head by head.
    """

    def __init__(
        self,
        prefix: str,
        layer_idx: int,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
        rotary: torch.Tensor,
        gated: bool = False,
        device: str = "cpu",
    ) -> None:
        self._layer_idx = layer_idx
        self._rotary = rotary
        self._gated = gated
        self._scale = head_dim**-0.5
        self._qkv = Linear(
            [
                (f"{prefix}.q_proj.weight", num_heads * head_dim * (2 if gated else 1)),
                (f"{prefix}.k_proj.weight", num_kv_heads * head_dim),
                (f"{prefix}.v_proj.weight", num_kv_heads * head_dim),
            ],
            hidden_size,
            device,
        )
        self._q_norm = RMSNorm(f"{prefix}.q_norm.weight", head_dim, eps, device)
        self._k_norm = RMSNorm(f"{prefix}.k_norm.weight", head_dim, eps, device)
        self._out = Linear([(f"{prefix}.o_proj.weight", hidden_size)], num_heads * head_dim, device)
        self._attention = paged_attention.choose(device, head_dim=head_dim)

    def slots(self) -> dict[str, ParameterSlot]:
        return self._qkv.slots() | self._q_norm.slots() | self._k_norm.slots() | self._out.slots()

    def __call__(self, x: torch.Tensor, norm: RMSNorm, batch: Batch) -> torch.Tensor:
        """Adds the block's output to ``x`` [T, hidden_size] in place and returns it; writes the new keys and values."""
        cache = batch.caches[self._layer_idx]
        assert isinstance(cache, AttentionCache)
        context = self._attention.paged_attention(
            self._qkv(x, norm=norm),
            self._q_norm.weight,
            self._k_norm.weight,
            self._q_norm.eps,
            self._rotary,
            batch.positions,
            batch.slot_mapping,
            batch.page_tables,
            batch.cu_seqlens,
            batch.seq_lens,
            cache.k,
            cache.v,
            self._scale,
            self._gated,
        )
        return self._out(context, residual=x)
