"""Qwen3.5, 3.6 and 3.8, dense. Reference: HuggingFace ``Qwen3_5ForCausalLM``."""

from __future__ import annotations

from .decoder import FeedForward
from .hybrid import HybridDecoder
from .qwen3 import gated_mlp


class Qwen3_5(HybridDecoder):
    """The hybrid's mixers, and a gated MLP in every layer."""

    def make_feed_forward(self, layer_idx: int) -> FeedForward:
        return gated_mlp(self.config, layer_idx, self.device)
