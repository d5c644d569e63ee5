"""The shape of a model under HuggingFace's config names, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..architectures import ARCHITECTURES, HYBRIDS, MIXTURES
from ..errors import UnsupportedCheckpoint
from ..layers.rope_scaling import RopeScaling

LayerType = Literal["linear_attention", "full_attention"]
ValueHeadOrder = Literal["grouped", "tiled"]


def check_architecture(architecture: str, where: str) -> None:
    """Raises :class:`UnsupportedCheckpoint`, with what there is, unless a model here has this architecture."""
    if architecture not in ARCHITECTURES:
        raise UnsupportedCheckpoint(
            f"architecture {architecture!r} is not supported; helexa runs {', '.join(sorted(ARCHITECTURES))}", where
        )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Config names are HuggingFace's, unchanged, but for two.

    Attributes:
        intermediate_size: 0 in a mixture of experts, whose layers have no dense feed-forward.
        rotary_dim: dimensions of each head that rotate, the first ones (``head_dim * partial_rotary_factor``).
        layer_types: each layer's mixer.
        attn_output_gate: whether attention has a sigmoid gate for each value of its context (as many rows as the queries).
        linear_*: the delta net's shape; 0 without one.
        value_head_order: which key head value head ``j`` of a delta net belongs to: ``j // (V / K)`` (``grouped``, HuggingFace's
            order) or ``j % K`` (``tiled``, GGUF's from Qwen3.5 on).
        num_experts, num_experts_per_tok, moe_intermediate_size, norm_topk_prob: the mixture of experts; 0 without one.
        shared_expert_intermediate_size: width of the expert that every token takes; 0 without one.
    """

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
    rotary_dim: int
    layer_types: tuple[LayerType, ...]
    attn_output_gate: bool = False
    linear_num_key_heads: int = 0
    linear_num_value_heads: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    linear_conv_kernel_dim: int = 0
    value_head_order: ValueHeadOrder = "grouped"
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    norm_topk_prob: bool = True

    @classmethod
    def from_checkpoint(cls, architecture: str, config: Mapping[str, Any], where: str) -> ModelConfig:
        """From a checkpoint's config dict. ``where`` names the file in errors.

        Raises:
            UnsupportedCheckpoint: no model here has this architecture; a key is missing or has a value that makes no sense, or a
                feature is on that no release has.
        """
        check_architecture(architecture, where)
        read = _Reader(config, where)
        heads, hidden = read.integer("num_attention_heads", high=4096), read.integer("hidden_size")
        num_layers = read.integer("num_hidden_layers", high=4096)
        kv_heads = read.integer("num_key_value_heads", high=4096) if "num_key_value_heads" in config else heads
        head_dim = read.integer("head_dim", high=4096) if config.get("head_dim") is not None else hidden // heads
        if heads % kv_heads:
            raise read.fail(f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})")
        if head_dim % 16 or not head_dim:
            raise read.fail(f"head_dim: expected a multiple of 16, got {head_dim}")
        is_hybrid, is_mixture = architecture in HYBRIDS, architecture in MIXTURES
        rope = config.get("rope_parameters") or config.get("rope_scaling")
        if rope is not None and not isinstance(rope, Mapping):
            raise read.fail(f"rope_scaling: expected an object, got {rope!r}")
        theta = read.number(config if config.get("rope_theta") is not None else rope or {}, "rope_theta")
        rotary_dim = read.rotary_dim(head_dim, rope or {}, 0.25 if is_hybrid else 1.0)
        RopeScaling.from_config(theta, rope, where)  # raises what rotary_table would, with the file's name
        gated = read.boolean("attn_output_gate", is_hybrid)
        if gated != is_hybrid:
            raise read.fail(f"attn_output_gate: expected {is_hybrid} in {architecture}, got {gated}")
        for key, neutral in (("attention_bias", False), ("use_sliding_window", False), ("hidden_act", "silu")):
            if config.get(key, neutral) != neutral:
                raise read.fail(f"{key}: expected {neutral!r}, got {config[key]!r}; no Qwen3 release sets it")
        return cls(
            architecture=architecture,
            hidden_size=hidden,
            intermediate_size=0 if is_mixture else read.integer("intermediate_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=read.integer("vocab_size"),
            max_position_embeddings=read.integer("max_position_embeddings", high=2**27),
            # As a GGUF file stores it, so that a model computes the same from either kind of checkpoint.
            rms_norm_eps=float(np.float32(read.number(config, "rms_norm_eps"))),
            rope_theta=theta,
            rope_scaling=rope,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            rotary_dim=rotary_dim,
            attn_output_gate=gated,
            layer_types=read.layer_types(num_layers, interval=4 if is_hybrid else 1),
            **(read.delta_net() if is_hybrid else {}),
            **(read.mixture(architecture) if is_mixture else {}),
        )


class _Reader:
    """Checked access to a config dict. Every error names the key and the file."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config = config
        self._where = where

    def fail(self, what: str) -> UnsupportedCheckpoint:
        return UnsupportedCheckpoint(what, self._where)

    def integer(self, key: str, low: int = 1, high: int = 2**24) -> int:
        value = self._config.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(f"{key}: expected an integer in [{low}, {high}], got {value!r}")
        return value

    def number(self, source: Mapping[str, Any], key: str) -> float:
        value = source.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
            raise self.fail(f"{key}: expected a positive number, got {value!r}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._config.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.fail(f"{key}: expected true or false, got {value!r}")
        return default if value is None else value

    def rotary_dim(self, head_dim: int, rope: Mapping[str, Any], default_factor: float) -> int:
        if self._config.get("rotary_dim") is not None:
            rotary_dim = self.integer("rotary_dim", high=head_dim)
        else:
            key = "partial_rotary_factor"
            source = rope if rope.get(key) is not None else self._config
            factor = self.number(source, key) if source.get(key) is not None else default_factor
            rotary_dim = int(head_dim * factor) if factor <= 1 else 0
        if rotary_dim < 2 or rotary_dim % 2:
            raise self.fail(f"partial_rotary_factor: expected an even part of head_dim ({head_dim}), got {rotary_dim}")
        return rotary_dim

    def layer_types(self, num_layers: int, interval: int) -> tuple[LayerType, ...]:
        """What the config lists, else full attention in every ``interval``-th layer."""
        pattern: list[LayerType] = ["linear_attention", "full_attention"]
        listed = None if interval == 1 else self._config.get("layer_types")  # no hybrid: nothing else is possible
        if listed is None:
            if interval != 1 and "full_attention_interval" in self._config:
                interval = self.integer("full_attention_interval")
            listed = [pattern[(i + 1) % interval == 0] for i in range(num_layers)]
        if not isinstance(listed, (list, tuple)) or len(listed) != num_layers:
            got = len(listed) if isinstance(listed, (list, tuple)) else repr(listed)
            raise self.fail(f"layer_types: expected {num_layers} entries, one a layer, got {got}")
        made: list[LayerType] = []
        for i, kind in enumerate(listed):
            if kind not in ("linear_attention", "full_attention"):
                raise self.fail(f"layer_types[{i}]: expected linear_attention or full_attention, got {kind!r}")
            made.append(kind)
        if "full_attention" not in made:
            raise self.fail("layer_types: expected at least one layer of full_attention, got none")
        return tuple(made)

    def delta_net(self) -> dict[str, Any]:
        shape = {
            "linear_num_key_heads": self.integer("linear_num_key_heads", high=4096),
            "linear_num_value_heads": self.integer("linear_num_value_heads", high=4096),
            "linear_key_head_dim": self.integer("linear_key_head_dim", high=512),
            "linear_value_head_dim": self.integer("linear_value_head_dim", high=512),
            "linear_conv_kernel_dim": self.integer("linear_conv_kernel_dim"),
        }
        keys, values = shape["linear_num_key_heads"], shape["linear_num_value_heads"]
        if values % keys:
            raise self.fail(f"linear_num_value_heads ({values}) is not a multiple of linear_num_key_heads ({keys})")
        for key in ("linear_key_head_dim", "linear_value_head_dim"):
            if shape[key] % 16:
                raise self.fail(f"{key}: expected a multiple of 16, got {shape[key]}")
        if shape["linear_conv_kernel_dim"] != 4:
            raise self.fail(f"linear_conv_kernel_dim: expected 4, got {shape['linear_conv_kernel_dim']}")
        order = self._config.get("value_head_order", "grouped")
        if order not in ("grouped", "tiled"):
            raise self.fail(f"value_head_order: expected grouped or tiled, got {order!r}")
        return shape | {"value_head_order": order}

    def mixture(self, architecture: str) -> dict[str, Any]:
        experts = self.integer("num_experts", high=2**16)
        if self._config.get("decoder_sparse_step", 1) != 1 or self._config.get("mlp_only_layers"):
            raise self.fail(
                "decoder_sparse_step and mlp_only_layers: expected 1 and none; every release has experts in every layer"
            )
        shared = architecture != "qwen3moe"
        return {
            "num_experts": experts,
            "num_experts_per_tok": self.integer("num_experts_per_tok", high=experts),
            "moe_intermediate_size": self.integer("moe_intermediate_size"),
            "shared_expert_intermediate_size": self.integer("shared_expert_intermediate_size") if shared else 0,
            # HuggingFace's own defaults; its Qwen3.5 always normalises.
            "norm_topk_prob": architecture == "qwen35moe" or self.boolean("norm_topk_prob", shared),
        }
