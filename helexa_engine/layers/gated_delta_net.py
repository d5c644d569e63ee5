"""Gated DeltaNet: linear attention with a recurrent state (Yang, Kautz, Hatamizadeh, arXiv 2412.06464), as Qwen3-Next has it."""

from __future__ import annotations

import torch

from ..batch import Batch
from ..cache.spec import StateCache
from ..ops.causal_conv1d import causal_conv1d
from ..ops.gated_delta_rule import gated_delta_rule
from .linear import Linear
from .norm import RMSNorm
from .weight import FloatParameter, ParameterSlot


class GatedDeltaNet:
    """``x + out(delta_rule(conv(q|k|v), z, b, a))`` of one layer, with ``q|k|v``, ``z``, ``b``, ``a`` one product of ``norm(x)``.

    Args:
        prefix: HuggingFace parameter prefix, ``model.layers.0.linear_attn``.
        layer_idx: which of ``batch.caches`` is this layer's.
        tiled: value head ``j`` belongs to key head ``j % num_k_heads``, else to ``j // (num_v_heads / num_k_heads)``.
    """

    def __init__(
        self,
        prefix: str,
        layer_idx: int,
        *,
        hidden_size: int,
        num_k_heads: int,
        num_v_heads: int,
        head_k_dim: int,
        head_v_dim: int,
        conv_kernel: int,
        eps: float,
        tiled: bool,
        device: str = "cpu",
    ) -> None:
        self._layer_idx = layer_idx
        self._heads = {"num_k_heads": num_k_heads, "num_v_heads": num_v_heads, "tiled": tiled}
        value_dim = num_v_heads * head_v_dim
        channels = 2 * num_k_heads * head_k_dim + value_dim
        self._sizes = [channels, value_dim, num_v_heads, num_v_heads]
        names = [f"{prefix}.in_proj_{part}.weight" for part in ("qkv", "z", "b", "a")]
        self._in = Linear(list(zip(names, self._sizes, strict=True)), hidden_size, device)
        self._conv_weight = FloatParameter((channels, conv_kernel), device)
        self._a_coefficient = FloatParameter((num_v_heads,), device)
        self._dt_bias = FloatParameter((num_v_heads,), device)
        self._norm = RMSNorm(f"{prefix}.norm.weight", head_v_dim, eps, device)
        self._out = Linear([(f"{prefix}.out_proj.weight", hidden_size)], value_dim, device)
        self._own = {
            f"{prefix}.conv1d.weight": self._conv_weight,
            f"{prefix}.a_coefficient": self._a_coefficient,
            f"{prefix}.dt_bias": self._dt_bias,
        }
        self._conv = causal_conv1d.choose(device, kernel_size=conv_kernel)
        self._delta_rule = gated_delta_rule.choose(device, head_k_dim=head_k_dim, head_v_dim=head_v_dim)
        # Both in one call, where there is such a form and its convolution is the chosen one.
        fused = getattr(self._delta_rule, "CONVOLUTION", None) is self._conv
        self._step = self._delta_rule.gated_delta_step if fused else None

    def slots(self) -> dict[str, ParameterSlot]:
        return self._in.slots() | self._own | self._norm.slots() | self._out.slots()

    def __call__(self, x: torch.Tensor, norm: RMSNorm, batch: Batch) -> torch.Tensor:
        """Adds the block's output to ``x`` [T, hidden_size] in place and returns it; the states of the batch's slots advance."""
        cache = batch.caches[self._layer_idx]
        assert isinstance(cache, StateCache)
        qkv, z, b, a = self._in(x, norm=norm).split_with_sizes(self._sizes, 1)  # torch.split is Python around this
        convolution = (self._conv_weight.get(), cache.conv_state)
        states = (cache.recurrent_state, batch.state_slots, batch.cu_seqlens)
        gates = (self._a_coefficient.get(), self._dt_bias.get(), self._norm.weight, self._norm.eps)
        if self._step is not None and batch.num_tokens == batch.num_sequences:
            values = self._step(qkv, *convolution, z, b, a, *gates, *states, **self._heads)
        else:
            qkv = self._conv.causal_conv1d(qkv, *convolution, *states[1:])
            values = self._delta_rule.gated_delta_rule(qkv, z, b, a, *gates, *states, **self._heads)
        return self._out(values, residual=x)
