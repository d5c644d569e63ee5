"""The stack of the hybrids: gated delta nets and, in some layers, gated attention. What follows them is each architecture's own."""

from __future__ import annotations

from ..layers.gated_delta_net import GatedDeltaNet
from .decoder import Decoder, Mixer, layer_prefix
from .qwen3 import attention


class HybridDecoder(Decoder):
    """A decoder whose mixers are those that ``layer_types`` lists."""

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
