"""The stack of the hybrids: gated delta nets and, in some layers, gated attention. What follows them is each architecture's own."""

from __future__ import annotations

from ..cache.spec import AttentionCacheSpec, CacheSpec, KvDtype, StateCacheSpec
from ..layers.attention import Attention
from ..layers.gated_delta_net import GatedDeltaNet
from .config import ModelConfig
from .decoder import Decoder, Mixer, layer_prefix


class HybridDecoder(Decoder):
    """A decoder whose mixers are those that ``layer_types`` lists; what they need to remember follows from it."""

    def make_mixer(self, layer_idx: int) -> Mixer:
        return self._MIXERS[self.config.layer_types[layer_idx]](self, layer_idx)

    def _delta_net(self, layer_idx: int) -> Mixer:
        config = self.config
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

    def _attention(self, layer_idx: int) -> Mixer:
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
            gated=config.attn_output_gate,
            device=self.device,
        )

    _MIXERS = {"linear_attention": _delta_net, "full_attention": _attention}

    @staticmethod
    def cache_specs(config: ModelConfig, kv_dtype: KvDtype) -> list[CacheSpec]:
        specs: dict[str, CacheSpec] = {
            "full_attention": AttentionCacheSpec(config.num_key_value_heads, config.head_dim, kv_dtype),
            "linear_attention": StateCacheSpec(
                conv_channels=2 * config.linear_num_key_heads * config.linear_key_head_dim
                + config.linear_num_value_heads * config.linear_value_head_dim,
                conv_kernel=config.linear_conv_kernel_dim,
                num_v_heads=config.linear_num_value_heads,
                head_k_dim=config.linear_key_head_dim,
                head_v_dim=config.linear_value_head_dim,
            ),
        }
        return [specs[kind] for kind in config.layer_types]
