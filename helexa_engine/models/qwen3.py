"""Qwen3, dense. Reference: HuggingFace ``Qwen3ForCausalLM``; report arXiv 2505.09388."""

from __future__ import annotations

import torch

from ..batch import Batch
from ..cache.spec import AttentionCacheSpec, KvDtype
from ..layers.attention import Attention
from ..layers.embedding import Embedding
from ..layers.linear import Linear
from ..layers.mlp import GatedMLP
from ..layers.norm import RMSNorm
from ..layers.rotary import rotary_table
from ..layers.weight import ParameterSlot
from .config import ModelConfig


class Qwen3Layer:
    """norm > attention > residual > norm > feed-forward > residual."""

    def __init__(self, config: ModelConfig, layer_idx: int, rotary: torch.Tensor, device: str) -> None:
        prefix = f"model.layers.{layer_idx}"
        self.input_norm = RMSNorm(f"{prefix}.input_layernorm.weight", config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(
            f"{prefix}.self_attn",
            layer_idx,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
            rotary=rotary,
            device=device,
        )
        self.post_attention_norm = RMSNorm(
            f"{prefix}.post_attention_layernorm.weight", config.hidden_size, config.rms_norm_eps
        )
        self.mlp = GatedMLP(f"{prefix}.mlp", config.hidden_size, config.intermediate_size, device)

    def slots(self) -> dict[str, ParameterSlot]:
        return self.input_norm.slots() | self.attention.slots() | self.post_attention_norm.slots() | self.mlp.slots()

    def __call__(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self.mlp(self.attention(x, self.input_norm, batch), self.post_attention_norm)


class Qwen3:
    """Embedding, layers, final norm and head.

    Args:
        config: the model's shape.
        max_model_len: positions the rotary table covers.
    """

    def __init__(self, config: ModelConfig, max_model_len: int, device: str = "cpu") -> None:
        self.config = config
        rotary = rotary_table(config.head_dim, max_model_len, config.rope_theta, config.rope_scaling)
        self.embedding = Embedding("model.embed_tokens.weight", config.vocab_size, config.hidden_size, device)
        self.layers = [Qwen3Layer(config, i, rotary, device) for i in range(config.num_hidden_layers)]
        self.norm = RMSNorm("model.norm.weight", config.hidden_size, config.rms_norm_eps)
        if config.tie_word_embeddings:
            self.lm_head = Linear.tied(self.embedding.parameter)
        else:
            self.lm_head = Linear([("lm_head.weight", config.vocab_size)], config.hidden_size, device)

    def parameters_wanted(self) -> dict[str, ParameterSlot]:
        """HuggingFace parameter name -> where it goes; every one must be loaded."""
        wanted = self.embedding.slots() | self.norm.slots()
        for layer in self.layers:
            wanted |= layer.slots()
        if not self.config.tie_word_embeddings:
            wanted |= self.lm_head.slots()
        return wanted

    @staticmethod
    def cache_specs(config: ModelConfig, kv_dtype: KvDtype) -> list[AttentionCacheSpec]:
        """What each layer remembers; known before anything is loaded."""
        spec = AttentionCacheSpec(config.num_key_value_heads, config.head_dim, kv_dtype)
        return [spec] * config.num_hidden_layers

    def forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states [T, hidden_size] float32 before the final norm; keys and values of the new tokens are written."""
        x = self.embedding(batch.input_ids)
        for layer in self.layers:
            x = layer(x, batch)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [M, vocab_size] float32 of hidden states [M, hidden_size]."""
        return self.lm_head(hidden.contiguous(), norm=self.norm)
