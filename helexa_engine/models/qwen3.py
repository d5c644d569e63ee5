"""Qwen3, dense. Reference: HuggingFace ``Qwen3ForCausalLM``; report arXiv 2505.09388."""

from __future__ import annotations

from ..cache.spec import AttentionCacheSpec, CacheSpec, KvDtype
from ..layers.attention import Attention
from ..layers.mlp import GatedMLP
from .config import ModelConfig
from .decoder import Decoder, FeedForward, Mixer, layer_prefix


class Qwen3(Decoder):
    """Attention and a gated MLP in every layer."""

    def make_mixer(self, layer_idx: int) -> Mixer:
        config = self.config
        return Attention(
            f"{layer_prefix(layer_idx)}.self_attn",
            layer_idx,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
            rotary=self.rotary,
            device=self.device,
        )

    def make_feed_forward(self, layer_idx: int) -> FeedForward:
        config = self.config
        return GatedMLP(f"{layer_prefix(layer_idx)}.mlp", config.hidden_size, config.intermediate_size, self.device)

    @staticmethod
    def cache_specs(config: ModelConfig, kv_dtype: KvDtype) -> list[CacheSpec]:
        spec = AttentionCacheSpec(config.num_key_value_heads, config.head_dim, kv_dtype)
        return [spec] * config.num_hidden_layers
