"""The shape of a model under HuggingFace's config names, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedCheckpoint
from ..layers.rotary import inverse_frequencies


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Config names are HuggingFace's, unchanged. ``eos_token_ids`` holds every end-of-turn token that is configured."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    tie_word_embeddings: bool

    @classmethod
    def from_checkpoint(cls, architecture: str, config: Mapping[str, Any], where: str) -> ModelConfig:
        """From a checkpoint's config dict. ``where`` names the file in errors.

        Raises:
            UnsupportedCheckpoint: a key is missing or has a value that makes no sense, or a feature is on that Qwen3 never ships.
        """

        def integer(key: str, low: int = 1, high: int = 2**24) -> int:
            value = config.get(key)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise UnsupportedCheckpoint(f"{key}: expected an integer in [{low}, {high}], got {value!r}", where)
            return value

        def number(source: Mapping[str, Any], key: str) -> float:
            value = source.get(key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
                raise UnsupportedCheckpoint(f"{key}: expected a positive number, got {value!r}", where)
            return float(value)

        heads, hidden = integer("num_attention_heads", high=4096), integer("hidden_size")
        rope = config.get("rope_parameters") or config.get("rope_scaling")
        if rope is not None and not isinstance(rope, Mapping):
            raise UnsupportedCheckpoint(f"rope_scaling: expected an object, got {rope!r}", where)
        theta = number(config if config.get("rope_theta") is not None else rope or {}, "rope_theta")
        made = cls(
            architecture=architecture,
            hidden_size=hidden,
            intermediate_size=integer("intermediate_size"),
            num_hidden_layers=integer("num_hidden_layers", high=4096),
            num_attention_heads=heads,
            num_key_value_heads=integer("num_key_value_heads", high=4096) if "num_key_value_heads" in config else heads,
            head_dim=integer("head_dim", high=4096) if config.get("head_dim") is not None else hidden // heads,
            vocab_size=integer("vocab_size"),
            max_position_embeddings=integer("max_position_embeddings", high=2**27),
            rms_norm_eps=number(config, "rms_norm_eps"),
            rope_theta=theta,
            rope_scaling=rope,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
        if made.num_attention_heads % made.num_key_value_heads:
            raise UnsupportedCheckpoint(
                f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({made.num_key_value_heads})",
                where,
            )
        if made.head_dim % 16:
            raise UnsupportedCheckpoint(f"head_dim: expected a multiple of 16, got {made.head_dim}", where)
        inverse_frequencies(
            made.head_dim, theta, rope, where=where
        )  # raises what rotary_table would, with the file's name
        for key, neutral in (("attention_bias", False), ("use_sliding_window", False)):
            if config.get(key, neutral) != neutral:
                raise UnsupportedCheckpoint(
                    f"{key}: expected {neutral}, got {config[key]!r}; no Qwen3 release sets it", where
                )
        if config.get("hidden_act", "silu") != "silu":
            raise UnsupportedCheckpoint(f"hidden_act: expected 'silu', got {config['hidden_act']!r}", where)
        return made
