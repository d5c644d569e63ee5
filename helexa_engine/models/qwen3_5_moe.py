"""Qwen3.5 and 3.6, mixture of experts. Reference: HuggingFace ``Qwen3_5MoeForCausalLM``."""

from __future__ import annotations

from .decoder import FeedForward
from .hybrid import HybridDecoder
from .qwen3_moe import sparse_moe


class Qwen3_5Moe(HybridDecoder):
    """The hybrid's mixers, and experts with a shared one in every layer."""

    def make_feed_forward(self, layer_idx: int) -> FeedForward:
        return sparse_moe(self.config, layer_idx, self.device)
