"""A Qwen3.5 checkpoint's tensors as a GGUF file of architecture ``qwen35`` names and stores them, and back.

Both directions are written here, away from helexa's own loader, so that the shipped file is judged by transformers alone. Source of
the rules: llama.cpp's ``conversion/qwen.py``. Arrays are numpy, float32, in torch's order of dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

#: HuggingFace's name within a layer -> GGUF's name within a block.
LAYER_TENSORS = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
TOP_TENSORS = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}


def gguf_name(name: str) -> str:
    """GGUF name of a HuggingFace tensor. Raises KeyError for a tensor that a tied Qwen3.5 text model does not have."""
    stem = name.removeprefix("model.")
    if stem.startswith("layers."):
        _, index, rest = stem.split(".", 2)
        return f"blk.{index}.{LAYER_TENSORS[rest]}"
    return TOP_TENSORS[stem]


def to_gguf(name: str, values: Array, config: Mapping[str, Any]) -> Array:
    """What the file holds of a HuggingFace tensor. ``config`` is the content of ``config.json``."""
    values = _with_value_heads_moved(name, values, config, to_tiled=True)
    if name.endswith("A_log"):
        return -np.exp(values)
    if name.endswith("conv1d.weight"):
        return values[:, 0]
    return values + 1 if _is_offset_norm(name) else values


def from_gguf(name: str, values: Array, config: Mapping[str, Any]) -> Array:
    """The HuggingFace tensor ``name`` from what the file holds of it."""
    if name.endswith("A_log"):
        values = np.log(-values)
    elif name.endswith("conv1d.weight"):
        values = values[:, None]
    elif _is_offset_norm(name):
        values = values - 1
    return _with_value_heads_moved(name, values, config, to_tiled=False)


def _is_offset_norm(name: str) -> bool:
    """Whether a weight is the difference from 1 in HuggingFace's checkpoints: all norms but the delta net's own."""
    return name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight")


def _with_value_heads_moved(name: str, values: Array, config: Mapping[str, Any], *, to_tiled: bool) -> Array:
    """Value heads from grouped order (those of one key head together) to tiled order (one of every key head, then the next), or back."""
    keys, per_key = config["linear_num_key_heads"], config["linear_num_value_heads"] // config["linear_num_key_heads"]
    head_dim = config["linear_value_head_dim"]
    module = name.partition("linear_attn.")[2]

    def moved(x: Array, width: int, axis: int = 0) -> Array:
        x = np.moveaxis(x, axis, 0)
        old = (keys, per_key) if to_tiled else (per_key, keys)
        new = x.reshape(*old, width, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)
        return np.ascontiguousarray(np.moveaxis(new, 0, axis))

    if module in ("in_proj_qkv.weight", "conv1d.weight"):
        start = 2 * keys * config["linear_key_head_dim"]
        return np.concatenate([values[:start], moved(values[start:], head_dim)])
    if module == "in_proj_z.weight":
        return moved(values, head_dim)
    if module in ("in_proj_b.weight", "in_proj_a.weight", "A_log", "dt_bias"):
        return moved(values, 1)
    if module == "out_proj.weight":
        return moved(values, head_dim, axis=1)
    return values
