"""The stack of the hybrids: gated delta nets and, in some layers, gated attention. What follows them is each architecture's own."""

from __future__ import annotations

from ..cache.spec import AttentionCacheSpec, CacheSpec, KvDtype, StateCacheSpec
from ..layers.gated_delta_net import GatedDeltaNet
from .config import ModelConfig
from .decoder import Decoder, Mixer, layer_prefix
from .qwen3 import attention


class HybridDecoder(Decoder):
    """A decoder whose mixers are those that ``layer_types`` lists; what they need to remember follows from it."""

    def make_mixer(self, layer_idx: int) -> Mixer:
        config = self.config
        if config.layer_types[layer_idx] == "full_attention":
            return attention(config, layer_idx, self.rotary, self.device)
        return GatedDeltaNet(
            f"{layer_prefix(layer_idx)}.linear_attn",
            layer_idx,
            hidden_size=config.hidden_size,
            num_k_heads=config.linear_num_key_heads,
            num_v_heads=config.linear_num_value_heads,
            head_k_dim=config.linear_key_head_dim,
            head_v_dim=config.linear_value_head_dim,
            conv_kernel=config.linear_conv_kernel_dim,
            eps=config.rms_norm_eps,
            tiled=config.value_head_order == "tiled",
            device=self.device,
        )

    @staticmethod
    def cache_specs(config: ModelConfig, kv_dtype: KvDtype) -> list[CacheSpec]:
        attention_spec = AttentionCacheSpec(config.num_key_value_heads, config.head_dim, kv_dtype)
        delta_net_spec = StateCacheSpec(
            conv_channels=2 * config.linear_num_key_heads * config.linear_key_head_dim
            + config.linear_num_value_heads * config.linear_value_head_dim,
            conv_kernel=config.linear_conv_kernel_dim,
            num_v_heads=config.linear_num_value_heads,
            head_k_dim=config.linear_key_head_dim,
            head_v_dim=config.linear_value_head_dim,
        )
        return [attention_spec if kind == "full_attention" else delta_net_spec for kind in config.layer_types]
