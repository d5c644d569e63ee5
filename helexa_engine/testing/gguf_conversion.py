"""What converting a HuggingFace checkpoint to GGUF does to its tensors, for every architecture, written a second time.

The loaders undo or honour this (``weights/canonical``); written from the conventions alone and sharing nothing with them, it
makes the files that they are tested with. Source: the project's notes on models, after llama.cpp's converters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

#: model_type -> GGUF's architecture
ARCHITECTURES = {
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe_text": "qwen35moe",
}
HYBRIDS = ("qwen3next", "qwen35", "qwen35moe")

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_SAME_IN_ALL = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    "linear_attn.norm.weight": "ssm_norm.weight",
}
#: Float32 in every file, whatever the file's type.
_FLOAT32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d.weight")


class Tensor(NamedTuple):
    """A tensor of the file: float32 values in PyTorch's order, and the module that decides on its type in a mix."""

    name: str
    values: torch.Tensor
    module: str
    is_float32: bool


def metadata(config: dict[str, Any]) -> dict[str, Any]:
    """Hyperparameters of a file with the model of ``config`` (HuggingFace's, of the text part)."""
    architecture = ARCHITECTURES[config["model_type"]]
    rope = config.get("rope_parameters") or config
    found: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if architecture != "qwen35moe":
        found["feed_forward_length"] = config["intermediate_size"]
    if "num_experts" in config:
        found |= {
            "expert_count": config["num_experts"],
            "expert_used_count": config["num_experts_per_tok"],
            "expert_feed_forward_length": config["moe_intermediate_size"],
        }
        if architecture != "qwen3moe":
            found["expert_shared_feed_forward_length"] = config["shared_expert_intermediate_size"]
    if architecture in HYBRIDS:
        rotary_dim = int(config["head_dim"] * rope["partial_rotary_factor"])
        found |= {
            "rope.dimension_count": rotary_dim,
            "ssm.conv_kernel": config["linear_conv_kernel_dim"],
            "ssm.state_size": config["linear_key_head_dim"],
            "ssm.group_count": config["linear_num_key_heads"],
            "ssm.time_step_rank": config["linear_num_value_heads"],
            "ssm.inner_size": config["linear_num_value_heads"] * config["linear_value_head_dim"],
            "full_attention_interval": 4,
        }
        if architecture != "qwen3next":
            found["rope.dimension_sections"] = [*rope["mrope_section"], 0]
    return {f"{architecture}.{key}": value for key, value in found.items()}


def convert(
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    *,
    fused_qkv: bool = False,
    fused_experts: bool = False,
    old_ssm_in: bool = False,
) -> list[Tensor]:
    """The file's tensors, out of HuggingFace's by name.

    Args:
        fused_qkv: q, k and v of full attention in one tensor.
        fused_experts: gate and up of the experts in one tensor.
        old_ssm_in: the input projection of Qwen3-Next's delta net in one tensor, as its first converters left it.
    """
    is_hybrid = ARCHITECTURES[config["model_type"]] in HYBRIDS
    made = []
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for name, stored in tensors.items():
        values = stored.float()
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
            layers.setdefault(int(match[1]), {})[match[2]] = values
        elif name in _TOP:
            if name == "model.norm.weight" and is_hybrid:
                values = 1 + values
            made.append(Tensor(_TOP[name], values, name.removesuffix(".weight"), values.ndim == 1))
    for layer, by_module in sorted(layers.items()):
        for name, values, module in _layer(config, by_module, fused_qkv, fused_experts, old_ssm_in):
            is_float32 = values.ndim == 1 or name in _FLOAT32
            made.append(Tensor(f"blk.{layer}.{name}", values, f"model.layers.{layer}.{module}", is_float32))
    return made


def _layer(
    config: dict[str, Any],
    found: dict[str, torch.Tensor],
    fused_qkv: bool,
    fused_experts: bool,
    old_ssm_in: bool,
) -> Iterator[tuple[str, torch.Tensor, str]]:
    """(name without the block, values, HuggingFace module) of one layer."""
    is_hybrid = ARCHITECTURES[config["model_type"]] in HYBRIDS
    left = dict(found)
    norms = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    norms += [f"self_attn.{part}_norm.weight" for part in "qk" if f"self_attn.{part}_norm.weight" in left]
    if is_hybrid:
        left |= {norm: 1 + left[norm] for norm in norms}
    yield (
        "post_attention_norm.weight" if is_hybrid else "ffn_norm.weight",
        left.pop("post_attention_layernorm.weight"),
        "post_attention_layernorm",
    )
    if fused_qkv and "self_attn.q_proj.weight" in left:
        parts = [left.pop(f"self_attn.{part}_proj.weight") for part in "qkv"]
        yield "attn_qkv.weight", torch.cat(parts), "self_attn.qkv_proj"
    if "mlp.gate.weight" in left:
        yield from _experts(config, left, fused_experts)
    if "linear_attn.A_log" in left:
        yield from _delta_net(config, left, old_ssm_in)
    for name, values in left.items():
        yield _SAME_IN_ALL[name], values, name.removesuffix(".weight")


def _experts(
    config: dict[str, Any], left: dict[str, torch.Tensor], fused: bool
) -> Iterator[tuple[str, torch.Tensor, str]]:
    if "mlp.experts.gate_up_proj" in left:
        gate, up = left.pop("mlp.experts.gate_up_proj").chunk(2, dim=1)
        down = left.pop("mlp.experts.down_proj")
    else:
        gate, up, down = (
            torch.stack([left.pop(f"mlp.experts.{i}.{part}_proj.weight") for i in range(config["num_experts"])])
            for part in ("gate", "up", "down")
        )
    if fused:
        yield "ffn_gate_up_exps.weight", torch.cat([gate, up], dim=1), "mlp.experts.gate_proj"
    else:
        yield "ffn_gate_exps.weight", gate, "mlp.experts.gate_proj"
        yield "ffn_up_exps.weight", up, "mlp.experts.up_proj"
    yield "ffn_down_exps.weight", down, "mlp.experts.down_proj"
    if "mlp.shared_expert_gate.weight" in left:
        yield "ffn_gate_inp_shexp.weight", left.pop("mlp.shared_expert_gate.weight")[0], "mlp.shared_expert_gate"


def _delta_net(
    config: dict[str, Any], left: dict[str, torch.Tensor], old_ssm_in: bool
) -> Iterator[tuple[str, torch.Tensor, str]]:
    key_heads, value_heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    key_dim, value_dim, ratio = (
        config["linear_key_head_dim"], config["linear_value_head_dim"], value_heads // key_heads,
    )  # fmt: skip
    reorders = config["model_type"] != "qwen3_next"

    def take(name: str) -> torch.Tensor:
        return left.pop(f"linear_attn.{name}")

    def value_order(x: torch.Tensor, width: int, dim: int = 0) -> torch.Tensor:
        """Value head (key head, i) at i * K + key head instead of key head * r + i; ``width`` rows or columns a head."""
        if not reorders:
            return x
        heads = x.movedim(dim, 0).reshape(key_heads, ratio, width, -1)
        return heads.transpose(0, 1).reshape(value_heads * width, -1).reshape(x.movedim(dim, 0).shape).movedim(0, dim)

    def v_rows(x: torch.Tensor) -> torch.Tensor:
        """The v rows of q | k | v, or channels of the convolution."""
        keys = 2 * key_heads * key_dim
        return torch.cat([x[:keys], value_order(x[keys:], value_dim)])

    conv = take("conv1d.weight").squeeze(1)
    yield "ssm_conv1d.weight", v_rows(conv), "linear_attn.conv1d"
    yield "ssm_a", -torch.exp(value_order(take("A_log"), 1)), "linear_attn.A_log"
    yield "ssm_dt.bias", value_order(take("dt_bias"), 1), "linear_attn.dt_bias"
    yield "ssm_out.weight", value_order(take("out_proj.weight"), value_dim, dim=1), "linear_attn.out_proj"
    if "linear_attn.in_proj_qkvz.weight" in left:
        fused = take("in_proj_qkvz.weight")
        yield "ssm_ba.weight", take("in_proj_ba.weight"), "linear_attn.in_proj_ba"
        if old_ssm_in:
            yield "ssm_in.weight", fused, "linear_attn.in_proj_qkvz"
            return
        sizes = [key_dim, key_dim, ratio * value_dim, ratio * value_dim]
        groups = [torch.split(group, sizes) for group in fused.chunk(key_heads)]  # q, k, its values, their gates
        q, k, v, z = (torch.cat([parts[i] for parts in groups]) for i in range(4))
        yield "attn_qkv.weight", torch.cat([q, k, v]), "linear_attn.in_proj_qkv"
        yield "attn_gate.weight", z, "linear_attn.in_proj_z"
    else:
        yield "attn_qkv.weight", v_rows(take("in_proj_qkv.weight")), "linear_attn.in_proj_qkv"
        yield "attn_gate.weight", value_order(take("in_proj_z.weight"), value_dim), "linear_attn.in_proj_z"
        yield "ssm_beta.weight", value_order(take("in_proj_b.weight"), 1), "linear_attn.in_proj_b"
        yield "ssm_alpha.weight", value_order(take("in_proj_a.weight"), 1), "linear_attn.in_proj_a"


def mtp_block(config: dict[str, Any], block: int) -> dict[str, torch.Tensor]:
    """Tensors of a block that predicts a further token (of zeros: nothing reads them), by name."""
    hidden, head_dim, width = config["hidden_size"], config["head_dim"], config.get("intermediate_size", 64)
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes = {
        "attn_norm": (hidden,), "post_attention_norm": (hidden,), "attn_q": (2 * q, hidden), "attn_k": (kv, hidden),
        "attn_v": (kv, hidden), "attn_output": (hidden, q), "attn_q_norm": (head_dim,), "attn_k_norm": (head_dim,),
        "ffn_gate": (width, hidden), "ffn_up": (width, hidden), "ffn_down": (hidden, width), "nextn.enorm": (hidden,),
        "nextn.eh_proj": (hidden, 2 * hidden), "nextn.hnorm": (hidden,), "nextn.shared_head_norm": (hidden,),
    }  # fmt: skip
    return {f"blk.{block}.{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
