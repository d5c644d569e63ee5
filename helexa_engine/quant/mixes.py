"""Mixes: which type each tensor of a model gets, under the names that llama.cpp gave them (``Q4_K_M``).

Source: ``llama_tensor_get_type`` of llama.cpp, as laid down in the project's notes on models.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from helexa_engine.quant import types
from helexa_engine.quant.types import QuantType

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
# Small matrices that decide much: the router, the shared expert's gate, the delta net's convolution.
_ALWAYS_FLOAT32 = re.compile(r".+\.(mlp\.gate|mlp\.shared_expert_gate|linear_attn\.conv1d)\.weight")


@dataclass(frozen=True, slots=True)
class Mix:
    """A named mix: ``base`` for most matrices, ``head`` for the one that makes the logits; ``file_type`` is GGUF's number."""

    name: str
    base: QuantType
    head: QuantType
    file_type: int


MIXES: dict[str, Mix] = {
    mix.name: mix
    for mix in (
        Mix("F32", types.F32, types.F32, 0),
        Mix("F16", types.F16, types.F16, 1),
        Mix("BF16", types.BF16, types.BF16, 32),
        Mix("Q8_0", types.Q8_0, types.Q8_0, 7),
        Mix("Q4_0", types.Q4_0, types.Q6_K, 2),
        Mix("Q6_K", types.Q6_K, types.Q6_K, 18),
        Mix("Q5_K_M", types.Q5_K, types.Q6_K, 17),
        Mix("Q4_K_M", types.Q4_K, types.Q6_K, 15),
        Mix("Q3_K_M", types.Q3_K, types.Q6_K, 12),
        Mix("IQ4_XS", types.IQ4_XS, types.Q6_K, 30),
    )
}

# For rows that are no multiple of 256.
_FALLBACK = {
    types.Q3_K: types.Q4_0,
    types.IQ4_XS: types.IQ4_NL,
    types.Q4_K: types.Q5_0,
    types.Q5_K: types.Q5_1,
    types.Q6_K: types.Q8_0,
}


def by_name(name: str) -> Mix | None:
    """The mix of this name (any case), or None."""
    return MIXES.get(name.upper())


def stays_float32(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is float32 in every file and in memory: what is no matrix, and matrices that are never quantised."""
    return len(shape) < 2 or min(shape) == 1 or _ALWAYS_FLOAT32.fullmatch(name) is not None


def use_more_bits(layer: int, num_layers: int) -> bool:
    """The layers that matter most: the first and last eighth and every third between."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _layer_type(mix: Mix, module: str, layer: int, num_layers: int, gqa_ratio: int, has_importance: bool) -> QuantType:
    # A merged q|k|v, a delta net's or an attention's, counts in the series of the attention layers' v.
    is_v = module in ("self_attn.v_proj", "self_attn.qkv_proj", "linear_attn.in_proj_qkv")
    is_down = module in ("mlp.down_proj", "mlp.experts.down_proj", "mlp.shared_expert.down_proj")
    if mix.name in ("Q4_K_M", "Q5_K_M") and (is_v or is_down) and use_more_bits(layer, num_layers):
        return types.Q6_K
    if mix.name == "Q3_K_M":
        if is_v:
            return types.Q5_K if layer < 2 else types.Q4_K
        if is_down:
            return types.Q5_K if layer < num_layers // 16 else types.Q4_K
        if module == "self_attn.o_proj":
            return types.Q4_K
    is_first_down = is_down and layer < num_layers // 8
    if mix.name == "IQ4_XS" and ((is_v and gqa_ratio >= 4) or (is_first_down and not has_importance)):
        return types.Q5_K
    if mix.name == "Q4_0" and is_first_down and has_importance:
        return types.Q4_1
    return mix.base


def quant_type_for(
    mix: Mix,
    name: str,
    shape: tuple[int, ...],
    *,
    num_layers: int,
    gqa_ratio: int,
    tied: bool,
    has_importance: bool = False,
) -> QuantType:
    """The type of one tensor.

    Args:
        name: canonical parameter name (HuggingFace's).
        shape: torch order; experts are [experts, out, in].
        gqa_ratio: query heads for each key-value head.
        tied: the embedding table is also the head.
        has_importance: an importance matrix is at hand, for which two mixes choose otherwise.
    """
    if stays_float32(name, shape):
        return types.F32
    match = _LAYER.fullmatch(name)
    if match:
        wanted = _layer_type(mix, match[2], int(match[1]), num_layers, gqa_ratio, has_importance)
    elif name == "lm_head.weight" or (tied and name == "model.embed_tokens.weight"):
        wanted = mix.head
    else:
        wanted = mix.base
    if shape[-1] % wanted.block_size:
        wanted = _FALLBACK.get(wanted, wanted)
    return types.F16 if shape[-1] % wanted.block_size else wanted
