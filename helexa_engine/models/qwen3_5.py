"""Qwen3.5, 3.6 and 3.8, dense. Reference: HuggingFace ``Qwen3_5ForCausalLM``."""

from __future__ import annotations

from ..layers.mlp import GatedMLP
from .decoder import FeedForward, layer_prefix
from .hybrid import HybridDecoder


class Qwen3_5(HybridDecoder):
    """The hybrid's mixers, and a gated MLP in every layer."""

    def make_feed_forward(self, layer_idx: int) -> FeedForward:
        config = self.config
        return GatedMLP(f"{layer_prefix(layer_idx)}.mlp", config.hidden_size, config.intermediate_size, self.device)
