"""What each layer of a model remembers, from its shape alone: known before anything is loaded."""

from __future__ import annotations

from ..cache.spec import AttentionCacheSpec, CacheSpec, KvDtype, StateCacheSpec
from .config import ModelConfig


def cache_specs(config: ModelConfig, kv_dtype: KvDtype, device: str = "cpu") -> list[CacheSpec]:
    """One entry a layer: keys and values of attention, states of a gated delta net; on ``device``, ``"cpu"`` or ``"cuda"``."""
    attention = AttentionCacheSpec(config.num_key_value_heads, config.head_dim, kv_dtype, device=device)
    delta_net = StateCacheSpec(
        conv_channels=2 * config.linear_num_key_heads * config.linear_key_head_dim
        + config.linear_num_value_heads * config.linear_value_head_dim,
        conv_kernel=config.linear_conv_kernel_dim,
        num_v_heads=config.linear_num_value_heads,
        head_k_dim=config.linear_key_head_dim,
        head_v_dim=config.linear_value_head_dim,
    )
    return [attention if kind == "full_attention" else delta_net for kind in config.layer_types]
