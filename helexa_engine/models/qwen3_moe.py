"""Qwen3, mixture of experts. Reference: HuggingFace ``Qwen3MoeForCausalLM``; report arXiv 2505.09388."""

from __future__ import annotations

from ..layers.moe import SparseMoe
from .config import ModelConfig
from .decoder import FeedForward, layer_prefix
from .qwen3 import Qwen3


class Qwen3Moe(Qwen3):
    """Qwen3's attention, and experts in every layer."""

    def make_feed_forward(self, layer_idx: int) -> FeedForward:
        return sparse_moe(self.config, layer_idx, self.device)


def sparse_moe(config: ModelConfig, layer_idx: int, device: str) -> SparseMoe:
    """A layer's experts as the config has them; the hybrids' are the same block."""
    return SparseMoe(
        f"{layer_prefix(layer_idx)}.mlp",
        config.hidden_size,
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        width=config.moe_intermediate_size,
        shared_width=config.shared_expert_intermediate_size,
        norm_topk_prob=config.norm_topk_prob,
        device=device,
    )
