"""GGUF's tensor names and metadata keys for the Qwen architectures, in HuggingFace's words.

Source: llama.cpp's ``gguf-py/gguf/constants.py`` and ``tensor_mapping.py``. No Qwen architecture permutes rows for rotary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..architectures import ARCHITECTURES, HYBRIDS, MIXTURES, TILED
from ..errors import UnsupportedCheckpoint

# The names of a fused tensor (``qkv_proj``, ``in_proj_qkvz``, ``in_proj_ba``, ``gate_up_proj``) are taken apart in ``canonical``.
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
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "ffn_gate_exps.weight": "mlp.experts.gate_proj.weight",
    "ffn_up_exps.weight": "mlp.experts.up_proj.weight",
    "ffn_down_exps.weight": "mlp.experts.down_proj.weight",
    "ffn_gate_up_exps.weight": "mlp.experts.gate_up_proj.weight",
    "ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight",
    "ffn_gate_shexp.weight": "mlp.shared_expert.gate_proj.weight",
    "ffn_up_shexp.weight": "mlp.shared_expert.up_proj.weight",
    "ffn_down_shexp.weight": "mlp.shared_expert.down_proj.weight",
    "attn_gate.weight": "linear_attn.in_proj_z.weight",
    "ssm_in.weight": "linear_attn.in_proj_qkvz.weight",
    "ssm_ba.weight": "linear_attn.in_proj_ba.weight",
    "ssm_beta.weight": "linear_attn.in_proj_b.weight",
    "ssm_alpha.weight": "linear_attn.in_proj_a.weight",
    "ssm_conv1d.weight": "linear_attn.conv1d.weight",
    "ssm_a": "linear_attn.a_coefficient",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_norm.weight": "linear_attn.norm.weight",
    "ssm_out.weight": "linear_attn.out_proj.weight",
    "nextn.eh_proj.weight": "nextn.eh_proj.weight",
    "nextn.enorm.weight": "nextn.enorm.weight",
    "nextn.hnorm.weight": "nextn.hnorm.weight",
    "nextn.shared_head_norm.weight": "nextn.shared_head_norm.weight",
}
_HYBRID_BLOCK = {"post_attention_norm.weight": "post_attention_layernorm.weight"}
_DELTA_NET_QKV = {"attn_qkv.weight": "linear_attn.in_proj_qkv.weight"}
_ATTENTION_QKV = {"attn_qkv.weight": "self_attn.qkv_proj.weight"}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
#: The gates of a delta net tell files apart whose value heads are in another order, and which look the same otherwise.
_OWNERS = {
    "ssm_in.weight": ("qwen3next",),
    "ssm_ba.weight": ("qwen3next",),
    "ssm_beta.weight": TILED,
    "ssm_alpha.weight": TILED,
}
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


def hf_name(name: str, layer_types: Sequence[str] = ()) -> str | None:
    """HuggingFace parameter name of a GGUF tensor, or None when no Qwen has such a tensor.

    ``layer_types`` says what ``attn_qkv`` is: a delta net's input projection in a ``linear_attention`` layer, else a fused q|k|v.
    """
    if name in _TOP:
        return _TOP[name]
    match = _BLOCK_NAME.fullmatch(name)
    if match is None:
        return None
    layer = int(match[1])
    is_linear = layer < len(layer_types) and layer_types[layer] == "linear_attention"
    table = _BLOCK | _HYBRID_BLOCK | (_DELTA_NET_QKV if is_linear else _ATTENTION_QKV)
    return f"model.layers.{layer}.{table[match[2]]}" if match[2] in table else None


def owners(name: str) -> tuple[str, ...]:
    """The architectures whose files may have a GGUF tensor of this name; all for most names, also for those that none has."""
    match = _BLOCK_NAME.fullmatch(name)
    return _OWNERS.get(match[2], ARCHITECTURES) if match else ARCHITECTURES


def gguf_name(name: str, architecture: str = "qwen3") -> str | None:
    """GGUF tensor name of a canonical parameter (see ``weights/canonical``), or None."""
    for theirs, ours in _TOP.items():
        if name == ours:
            return theirs
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    table = _BLOCK | _DELTA_NET_QKV
    if architecture in HYBRIDS:
        table = {theirs: ours for theirs, ours in table.items() if theirs != "ffn_norm.weight"} | _HYBRID_BLOCK
    for theirs, ours in table.items():
        if match and match[2] == ours:
            return f"blk.{match[1]}.{theirs}"
    return None


def unused_kind(name: str, num_layers: int) -> str | None:
    """``vision`` or ``MTP`` for a tensor that no text model here reads (blocks from ``num_layers`` on predict further tokens)."""
    if name.startswith(("v.", "mm.")):
        return "vision"
    match = _BLOCK_NAME.fullmatch(name)
    if match and (int(match[1]) >= num_layers or match[2].startswith("nextn.")):
        return "MTP"
    return None


class _Metadata:
    """Metadata of one architecture, read key by key. Raises :class:`UnsupportedCheckpoint` naming a key that is missing or wrong."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self._metadata = metadata
        self.architecture = str(metadata.get("general.architecture"))
        self.where = where

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"{self.architecture}.{key}", default)

    def read(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise UnsupportedCheckpoint(
                f"metadata {self.architecture}.{key} is missing; convert the model again", self.where
            )
        return value

    def fail(self, key: str, expected: str, got: Any) -> UnsupportedCheckpoint:
        return UnsupportedCheckpoint(
            f"metadata {self.architecture}.{key}: expected {expected}, got {got!r:.80}", self.where
        )

    def integer(self, key: str, default: int | None = None, *, low: int = 1) -> int:
        """A number, or an array that holds one number for every layer (0 where it does not apply)."""
        value = self.read(key) if default is None else self.get(key, default)
        if isinstance(value, np.ndarray):
            different = {item for item in value.tolist() if item != 0}
            value = different.pop() if len(different) == 1 else value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**31:
            raise self.fail(key, f"an integer of at least {low}", value)
        return value


def hf_config(metadata: Mapping[str, Any], vocab_rows: int, tied: bool, where: str) -> dict[str, Any]:
    """HuggingFace's config from GGUF metadata. Raises :class:`UnsupportedCheckpoint` naming a key that is missing."""
    data = _Metadata(metadata, where)
    architecture, heads = data.architecture, data.read("attention.head_count")
    is_mixture = architecture in MIXTURES
    config: dict[str, Any] = {
        "model_type": architecture,
        "hidden_size": data.read("embedding_length"),
        "intermediate_size": data.get("feed_forward_length") if is_mixture else data.read("feed_forward_length"),
        "num_hidden_layers": data.read("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": data.get("attention.head_count_kv", heads),
        "head_dim": data.get("attention.key_length"),
        "rms_norm_eps": data.read("attention.layer_norm_rms_epsilon"),
        "rope_theta": data.read("rope.freq_base"),
        "max_position_embeddings": data.read("context_length"),
        "vocab_size": vocab_rows,
        "tie_word_embeddings": tied,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }
    if architecture in HYBRIDS:
        config |= _hybrid_config(data)
    if is_mixture:
        config |= _mixture_config(data)
    kind = data.get("rope.scaling.type")
    if kind is not None and not isinstance(kind, str):
        raise UnsupportedCheckpoint(f"metadata rope.scaling.type: expected text, got {type(kind).__name__}", where)
    if kind not in (None, "none"):
        scaling = {"rope_type": kind, "factor": data.read("rope.scaling.factor")}
        for theirs, ours in _SCALING_KEYS:
            value = data.get(f"rope.scaling.{theirs}")
            if value is not None:
                scaling[ours] = value
        config["rope_scaling"] = scaling
    return config


def _hybrid_config(data: _Metadata) -> dict[str, Any]:
    """Layer types, gated attention, the delta net's shape. ``num_hidden_layers`` is the trunk without the MTP blocks."""
    blocks, mtp = data.integer("block_count"), data.integer("nextn_predict_layers", 0, low=0)
    if not 0 < blocks - mtp <= 4096:
        raise data.fail("block_count", f"from 1 to 4096 blocks beside {mtp} of MTP", blocks)
    key_heads, value_heads = data.integer("ssm.group_count"), data.integer("ssm.time_step_rank")
    if value_heads % key_heads:
        raise data.fail("ssm.time_step_rank", f"a multiple of ssm.group_count ({key_heads})", value_heads)
    inner = data.integer("ssm.inner_size")
    if inner % value_heads:
        raise data.fail("ssm.inner_size", f"a multiple of ssm.time_step_rank ({value_heads})", inner)
    return {
        "num_hidden_layers": blocks - mtp,
        "num_key_value_heads": data.integer("attention.head_count_kv"),
        "layer_types": _layer_types(data, blocks - mtp),
        "attn_output_gate": True,
        "rotary_dim": data.integer("rope.dimension_count"),
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": data.integer("ssm.state_size"),
        "linear_value_head_dim": inner // value_heads,
        "linear_conv_kernel_dim": data.integer("ssm.conv_kernel"),
        # Conversion reorders the value heads of Qwen3.5 and later, and leaves those of Qwen3-Next.
        "value_head_order": "tiled" if data.architecture in TILED else "grouped",
    }


def _layer_types(data: _Metadata, num_layers: int) -> list[str]:
    recurrent = data.get("attention.recurrent_layers")
    if recurrent is None:
        interval = data.integer("full_attention_interval", 4)
        flags = [(i + 1) % interval != 0 for i in range(num_layers)]
    else:
        flags = recurrent.tolist() if isinstance(recurrent, np.ndarray) else []
        if len(flags) < num_layers or any(flag not in (0, 1) for flag in flags):
            raise data.fail("attention.recurrent_layers", f"{num_layers} booleans", recurrent)
    return ["linear_attention" if flag else "full_attention" for flag in flags[:num_layers]]


#: HuggingFace's key -> the key after the architecture's prefix, and whether the value is a float.
_CONFIG_KEYS = {
    "num_hidden_layers": ("block_count", False),
    "max_position_embeddings": ("context_length", False),
    "hidden_size": ("embedding_length", False),
    "intermediate_size": ("feed_forward_length", False),
    "num_attention_heads": ("attention.head_count", False),
    "num_key_value_heads": ("attention.head_count_kv", False),
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon", True),
}
_MIXTURE_KEYS = {
    "num_experts": ("expert_count", False),
    "num_experts_per_tok": ("expert_used_count", False),
    "moe_intermediate_size": ("expert_feed_forward_length", False),
    "shared_expert_intermediate_size": ("expert_shared_feed_forward_length", False),
}
_HYBRID_KEYS = {
    "linear_conv_kernel_dim": ("ssm.conv_kernel", False),
    "linear_key_head_dim": ("ssm.state_size", False),
    "linear_num_key_heads": ("ssm.group_count", False),
    "linear_num_value_heads": ("ssm.time_step_rank", False),
}
_MROPE_SECTIONS = (11, 11, 10)


def metadata_of(architecture: str, config: Mapping[str, Any], where: str, *, mtp_blocks: int = 0) -> dict[str, Any]:
    """GGUF metadata of a HuggingFace config: the reverse of :func:`hf_config`, with the keys that llama.cpp wants besides.

    The config has been checked (as :class:`~helexa_engine.models.config.ModelConfig` checks it). ``mtp_blocks`` that predict
    further tokens follow the others.

    Raises:
        UnsupportedCheckpoint: a setting that no GGUF key expresses.
    """
    if architecture in MIXTURES and config.get("norm_topk_prob", True) is False:
        raise UnsupportedCheckpoint("norm_topk_prob is false, which a GGUF file cannot say", where)
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    heads, head_dim = config["num_attention_heads"], config.get("head_dim")
    head_dim = config["hidden_size"] // heads if head_dim is None else head_dim
    theta = config.get("rope_theta")
    keys = _CONFIG_KEYS | (_MIXTURE_KEYS if architecture in MIXTURES else {})
    made: dict[str, Any] = {
        ours: float(config[theirs]) if is_float else config[theirs]
        for theirs, (ours, is_float) in (keys | (_HYBRID_KEYS if architecture in HYBRIDS else {})).items()
        if config.get(theirs) is not None
    }
    made |= {
        "attention.head_count_kv": config.get("num_key_value_heads", heads),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": float(rope["rope_theta"] if theta is None else theta),
    }
    if architecture in HYBRIDS:
        made |= _hybrid_metadata(config, rope, head_dim, mtp_blocks)
    if mtp_blocks:
        made |= {"block_count": made["block_count"] + mtp_blocks, "nextn_predict_layers": mtp_blocks}
    if architecture in TILED:
        sections = list(rope.get("mrope_section") or _MROPE_SECTIONS)
        made["rope.dimension_sections"] = np.array((sections + [0] * 4)[:4], np.int32)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in (None, "default", "mrope"):
        made |= _scaling_metadata(kind, rope, where)
    prefixed = {f"{architecture}.{key}": value for key, value in made.items()}
    return {"general.architecture": architecture, "general.type": "model"} | prefixed


def _hybrid_metadata(
    config: Mapping[str, Any], rope: Mapping[str, Any], head_dim: int, mtp_blocks: int
) -> dict[str, Any]:
    factor = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.25))
    made: dict[str, Any] = {
        "ssm.inner_size": config["linear_num_value_heads"] * config["linear_value_head_dim"],
        "full_attention_interval": config.get("full_attention_interval", 4),
        "rope.dimension_count": int(head_dim * factor),
    }
    if config.get("layer_types") is not None:
        recurrent = [kind == "linear_attention" for kind in config["layer_types"]]
        made["attention.recurrent_layers"] = recurrent + [False] * mtp_blocks
    return made


def _scaling_metadata(kind: str, rope: Mapping[str, Any], where: str) -> dict[str, Any]:
    if kind not in ("linear", "yarn"):
        raise UnsupportedCheckpoint(f"rope scaling {kind!r} is not supported; expected default, linear or yarn", where)
    made = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    for ours, theirs in _SCALING_KEYS if kind == "yarn" else ():
        value = rope.get(theirs)
        if value is not None:
            made[f"rope.scaling.{ours}"] = value if ours == "original_context_length" else float(value)
    return made


_SCALING_KEYS = (
    ("original_context_length", "original_max_position_embeddings"),
    ("attn_factor", "attention_factor"),
    ("yarn_beta_fast", "beta_fast"),
    ("yarn_beta_slow", "beta_slow"),
)


def sampling_metadata(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """``general.sampling.*`` of HuggingFace's generation config: the reverse of :func:`generation_config`."""
    defaults = dict(generation_config)
    if defaults.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return {
        f"general.sampling.{ours}": value if ours == "top_k" else float(value)
        for ours, theirs in _SAMPLING.items()
        if isinstance(value := defaults.get(theirs), (int, float)) and not isinstance(value, bool)
    }


def _mixture_config(data: _Metadata) -> dict[str, Any]:
    return {
        "num_experts": data.integer("expert_count"),
        "num_experts_per_tok": data.integer("expert_used_count"),
        "moe_intermediate_size": data.integer("expert_feed_forward_length"),
        "shared_expert_intermediate_size": (
            0 if data.architecture == "qwen3moe" else data.integer("expert_shared_feed_forward_length")
        ),
        "norm_topk_prob": True,  # as in every released model; the file does not say
    }


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
