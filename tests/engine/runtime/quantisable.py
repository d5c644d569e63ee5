"""Tiny random models of every architecture as HuggingFace folders, complete with tokenizer, wide enough for blocks of 256."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from helexa_engine.testing.checkpoints import write_tokenizer

_SHAPE: dict[str, Any] = dict(
    hidden_size=256, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    max_position_embeddings=512, rms_norm_eps=1e-6, tie_word_embeddings=False,
)  # fmt: skip
_DELTA_NET = dict(
    linear_num_key_heads=2, linear_key_head_dim=64, linear_value_head_dim=64, linear_num_value_heads=4
)  # fmt: skip
_EXPERTS = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256, shared_expert_intermediate_size=256,
    norm_topk_prob=True,
)  # fmt: skip
ARCHITECTURES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "qwen3moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, _EXPERTS),
    "qwen3next": (Qwen3NextConfig, Qwen3NextForCausalLM, _EXPERTS | _DELTA_NET),
    "qwen35": (Qwen3_5TextConfig, Qwen3_5ForCausalLM, _DELTA_NET | {"tie_word_embeddings": True}),
    "qwen35moe": (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM, _EXPERTS | _DELTA_NET),
}


def write_folder(folder: Path, architecture: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """A folder as transformers saves it; the embedding table has four rows more than the tokenizer has tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    config_class, model_class, shape = ARCHITECTURES[architecture]
    tokens = write_tokenizer(folder)
    model = model_class(config_class(**(_SHAPE | shape | {"vocab_size": tokens + 4} | changes))).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_hybrid_norm = "linear_key_head_dim" in shape and not name.endswith("linear_attn.norm.weight")
            if name.endswith("A_log"):
                parameter.copy_(noise - 2.5)
            elif "norm" in name:
                parameter.copy_(0.2 * noise + (0 if is_hybrid_norm else 1))
            else:
                parameter.copy_(noise * (0.5 if "conv1d" in name else 0.08))
    model.to(dtype).save_pretrained(folder)
    return folder
