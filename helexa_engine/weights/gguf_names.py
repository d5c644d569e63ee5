"""GGUF's tensor names and metadata keys for Qwen3, in HuggingFace's words.

Source: llama.cpp's ``gguf-py/gguf/constants.py`` and ``tensor_mapping.py``. No Qwen architecture permutes rows for rotary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import UnsupportedCheckpoint

_BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
FUSED_QKV = "attn_qkv.weight"
_BLOCK_NAME = re.compile(r"blk\.(\d+)\.(.+)")

#: general.sampling.* -> generation_config
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
    "penalty_freq": "frequency_penalty",
    "penalty_present": "presence_penalty",
}


def hf_name(name: str) -> str | None:
    """HuggingFace parameter name of a GGUF tensor, or None when Qwen3 has no such tensor."""
    if name in _TOP:
        return _TOP[name]
    match = _BLOCK_NAME.fullmatch(name)
    if match and match[2] in _BLOCK:
        return f"model.layers.{int(match[1])}.{_BLOCK[match[2]]}"
    return None


def gguf_name(name: str) -> str | None:
    """GGUF tensor name of a HuggingFace parameter, or None."""
    for theirs, ours in _TOP.items():
        if name == ours:
            return theirs
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    for theirs, ours in _BLOCK.items():
        if match and match[2] == ours:
            return f"blk.{match[1]}.{theirs}"
    return None


def fused_qkv_names(name: str) -> tuple[str, str, str] | None:
    """The three HuggingFace parameters whose rows a fused ``attn_qkv`` holds in order, or None when it is not one."""
    match = _BLOCK_NAME.fullmatch(name)
    if match is None or match[2] != FUSED_QKV:
        return None
    prefix = f"model.layers.{int(match[1])}.self_attn"
    return f"{prefix}.q_proj.weight", f"{prefix}.k_proj.weight", f"{prefix}.v_proj.weight"


def hf_config(metadata: Mapping[str, Any], vocab_rows: int, tied: bool, where: str) -> dict[str, Any]:
    """HuggingFace's config from GGUF metadata. Raises :class:`UnsupportedCheckpoint` naming a key that is missing."""
    architecture = metadata.get("general.architecture")

    def read(key: str, default: Any = None, required: bool = True) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        if value is None and required:
            raise UnsupportedCheckpoint(f"metadata {architecture}.{key} is missing; convert the model again", where)
        return value

    heads = read("attention.head_count")
    config: dict[str, Any] = {
        "model_type": architecture,
        "hidden_size": read("embedding_length"),
        "intermediate_size": read("feed_forward_length"),
        "num_hidden_layers": read("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": read("attention.head_count_kv", heads),
        "head_dim": read("attention.key_length", required=False),
        "rms_norm_eps": read("attention.layer_norm_rms_epsilon"),
        "rope_theta": read("rope.freq_base"),
        "max_position_embeddings": read("context_length"),
        "vocab_size": vocab_rows,
        "tie_word_embeddings": tied,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }
    kind = read("rope.scaling.type", required=False)
    if kind is not None and not isinstance(kind, str):
        raise UnsupportedCheckpoint(f"metadata rope.scaling.type: expected text, got {type(kind).__name__}", where)
    if kind not in (None, "none"):
        scaling = {"rope_type": kind, "factor": read("rope.scaling.factor")}
        for theirs, ours in (
            ("original_context_length", "original_max_position_embeddings"),
            ("attn_factor", "attention_factor"),
            ("yarn_beta_fast", "beta_fast"),
            ("yarn_beta_slow", "beta_slow"),
        ):
            value = read(f"rope.scaling.{theirs}", required=False)
            if value is not None:
                scaling[ours] = value
        config["rope_scaling"] = scaling
    return config


def generation_config(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Sampling defaults stored as ``general.sampling.*`` and the end tokens, under HuggingFace's names.

    Raises:
        UnsupportedCheckpoint: one of them is not a number.
    """
    found: dict[str, Any] = {}
    for theirs, ours in _SAMPLING.items():
        value = metadata.get(f"general.sampling.{theirs}")
        if value is not None:
            found[ours] = _number(value, f"general.sampling.{theirs}", where)
    eos: list[int] = []
    for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"):
        if key in metadata:
            token = _number(metadata[key], key, where)
            if not isinstance(token, int):
                raise UnsupportedCheckpoint(f"metadata {key}: expected a token id, got {token}", where)
            eos += [token] if token not in eos else []
    if eos:
        found["eos_token_id"] = eos
    return found


def _number(value: Any, key: str, where: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UnsupportedCheckpoint(f"metadata {key}: expected a number, got {type(value).__name__}", where)
    return value
