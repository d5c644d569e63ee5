"""Qwen3, dense. Reference: HuggingFace ``Qwen3ForCausalLM``; report arXiv 2505.09388."""

from __future__ import annotations

import torch

from ..layers.attention import Attention
from ..layers.mlp import GatedMLP
from .config import ModelConfig
from .decoder import Decoder, FeedForward, Mixer, layer_prefix


class Qwen3(Decoder):
    """Attention and a gated MLP in every layer."""

    def make_mixer(self, layer_idx: int) -> Mixer:
        return attention(self.config, layer_idx, self.rotary, self.device)

    def make_feed_forward(self, layer_idx: int) -> FeedForward:
        return gated_mlp(self.config, layer_idx, self.device)


def attention(config: ModelConfig, layer_idx: int, rotary: torch.Tensor, device: str) -> Attention:
    """A layer's attention as the config has it; the hybrids' is the same block, gated. ``rotary``: see :class:`Attention`."""
    return Attention(
        f"{layer_prefix(layer_idx)}.self_attn",
        layer_idx,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        eps=config.rms_norm_eps,
        rotary=rotary,
        gated=config.attn_output_gate,
        device=device,
    )


def gated_mlp(config: ModelConfig, layer_idx: int, device: str) -> GatedMLP:
    """A layer's dense feed-forward as the config has it."""
    return GatedMLP(f"{layer_prefix(layer_idx)}.mlp", config.hidden_size, config.intermediate_size, device)
