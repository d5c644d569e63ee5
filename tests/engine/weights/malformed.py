"""Tiny checkpoints of every family as plain tables, and writers that put down whatever the tables say, sense or not."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from helexa_engine.models.config import ModelConfig
from helexa_engine.models.registry import model_class
from helexa_engine.testing.checkpoints import write_tokenizer
from helexa_engine.weights import gguf
from helexa_engine.weights.gguf_names import gguf_name

FAMILIES = ("qwen3", "qwen3moe", "qwen3next", "qwen35", "qwen35moe")
HYBRIDS = ("qwen3next", "qwen35", "qwen35moe")
MIXTURES = ("qwen3moe", "qwen3next", "qwen35moe")
F32, F16, Q8_0, I32 = 0, 1, 8, 26
#: How a folder of 8-bit floats is scaled; smaller blocks than the published ones, so that a tiny matrix has several.
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
SCALES = "_scale_inv"
#: The matrices that published folders hold in 8-bit floats.
CODED = re.compile(r"model\..*(_proj(\.weight)?|in_proj_(qkvz?|z)\.weight)")

_MODEL_TYPE = {"qwen3moe": "qwen3_moe", "qwen3next": "qwen3_next", "qwen35": "qwen3_5", "qwen35moe": "qwen3_5_moe"}
_DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I32": 4, "I64": 8, "F8_E4M3": 1}
_TYPE_BYTES = {F32: (1, 4), F16: (1, 2), Q8_0: (32, 34), I32: (1, 4)}


@dataclass(frozen=True)
class Tensor:
    """``kind`` is a GGUF type number or a safetensors dtype; ``shape`` in PyTorch's order; ``data`` need not fit either."""

    shape: tuple[int, ...]
    kind: int | str
    data: bytes

    def __repr__(self) -> str:
        return f"Tensor({self.shape}, {self.kind}, {len(self.data)} bytes)"

    def filled(self) -> Tensor:
        """With as much data as shape and type ask for."""
        if isinstance(self.kind, str):
            size = math.prod(self.shape) * _DTYPE_BYTES.get(self.kind, 4)
        else:
            block, nbytes = _TYPE_BYTES.get(self.kind, (1, 4))
            size = math.prod(self.shape) // block * nbytes
        data = self.data if self.data else b"\0"
        return replace(self, data=(data * (size // len(data) + 1))[:size] if 0 <= size < 2**24 else self.data)


@dataclass
class Specimen:
    """A checkpoint of one family, as GGUF (``settings`` is its metadata) or as a folder (``settings`` is its config.json)."""

    family: str
    is_gguf: bool
    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    folder: Path = field(default_factory=Path)

    def copy(self) -> Specimen:
        return replace(self, settings=json.loads(json.dumps(self.settings)), tensors=dict(self.tensors))

    def write(self, to: Path) -> Path:
        """The file, or the folder with links to the tokenizer's files."""
        if self.is_gguf:
            path = to / f"{self.family}.gguf"
            path.write_bytes(gguf_bytes(self.settings, self.tensors))
            return path
        path = to / self.family
        path.mkdir(exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (path / name).write_bytes((self.folder / name).read_bytes())
        (path / "config.json").write_text(json.dumps(self.settings))
        (path / "model.safetensors").write_bytes(safetensors_bytes(self.tensors))
        return path


def safetensors_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    header: dict[str, Any] = {}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.kind,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + len(tensor.data)],
        }
        at += len(tensor.data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(t.data for t in tensors.values())


def gguf_bytes(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    out = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        out += [_text(key), _value(value)]
    offset, padded = 0, []
    for name, tensor in tensors.items():
        data = tensor.data + b"\0" * (-len(tensor.data) % gguf.DEFAULT_ALIGNMENT)
        dims = [d % 2**64 for d in reversed(tensor.shape)]
        out += [_text(name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, int(tensor.kind), offset)]
        padded.append(data)
        offset += len(data)
    head = b"".join(out)
    return head + b"\0" * (-len(head) % gguf.DEFAULT_ALIGNMENT) + b"".join(padded)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any, tagged: bool = True) -> bytes:
    """Type tag and value; numbers in the narrowest of the types that converters use."""
    kind, body = _encoded(value)
    return struct.pack("<I", kind) + body if tagged else body


def _encoded(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return gguf.BOOL, struct.pack("<B", value)
    if isinstance(value, int):
        if 0 <= value < 2**32:
            return gguf.UINT32, struct.pack("<I", value)
        return (gguf.INT64, struct.pack("<q", value)) if value < 0 else (gguf.UINT64, struct.pack("<Q", value))
    if isinstance(value, float):
        return gguf.FLOAT32, struct.pack("<f", value)
    if isinstance(value, str):
        return gguf.STRING, _text(value)
    items = [_encoded(item) for item in value]
    kind = items[0][0] if items else gguf.UINT32
    body = b"".join(body for item_kind, body in items if item_kind == kind)
    count = sum(item_kind == kind for item_kind, _ in items)
    return gguf.ARRAY, struct.pack("<IQ", kind, count) + body


def config_of(family: str, vocab_size: int) -> dict[str, Any]:
    """HuggingFace's text config of a tiny model."""
    config: dict[str, Any] = {
        "model_type": _MODEL_TYPE.get(family, family),
        "hidden_size": 64,
        "num_hidden_layers": 4 if family in HYBRIDS else 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": vocab_size,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    if family in MIXTURES:
        config |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
        if family in HYBRIDS:
            config["shared_expert_intermediate_size"] = 32
    else:
        config["intermediate_size"] = 96
    if family in HYBRIDS:
        config |= {
            "partial_rotary_factor": 0.5,
            "full_attention_interval": 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_conv_kernel_dim": 4,
        }
    return config


def metadata_of(family: str, config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    keys = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
    }
    if family in MIXTURES:
        keys |= {
            "expert_count": config["num_experts"],
            "expert_used_count": config["num_experts_per_tok"],
            "expert_feed_forward_length": config["moe_intermediate_size"],
        }
        if family in HYBRIDS:
            keys["expert_shared_feed_forward_length"] = config["shared_expert_intermediate_size"]
    else:
        keys["feed_forward_length"] = config["intermediate_size"]
    if family in HYBRIDS:
        keys |= {
            "ssm.conv_kernel": 4,
            "ssm.state_size": config["linear_key_head_dim"],
            "ssm.group_count": config["linear_num_key_heads"],
            "ssm.time_step_rank": config["linear_num_value_heads"],
            "ssm.inner_size": config["linear_num_value_heads"] * config["linear_value_head_dim"],
            "full_attention_interval": config["full_attention_interval"],
            "rope.dimension_count": int(config["head_dim"] * config["partial_rotary_factor"]),
        }
    vocab = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    added = {token["content"]: 3 if token["special"] else 4 for token in tokenizer["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    return {
        "general.architecture": family,
        **{f"{family}.{key}": value for key, value in keys.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [added.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": vocab["<|im_end|>"],
    }


def specimens(family: str, folder: Path) -> tuple[Specimen, Specimen, Specimen]:
    """(GGUF, folder, folder of 8-bit floats) of a tiny random model; ``folder`` takes the tokenizer's files."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(family, write_tokenizer(folder))
    shape = ModelConfig.from_checkpoint(family, config, "specimen")
    wanted = {
        name: tuple(slot.shape) for name, slot in model_class(family, "specimen")(shape, 64).parameters_wanted().items()
    }
    rng = np.random.default_rng(0)
    values = {name: 0.1 * rng.standard_normal(dims).astype(np.float32) for name, dims in wanted.items()}
    for name in values:
        if name.endswith("a_coefficient"):
            values[name] = -np.exp(values[name])
        elif "norm" in name:
            values[name] = 1 + values[name]
    metadata = metadata_of(family, config, json.loads((folder / "tokenizer.json").read_text()))
    in_gguf = {}
    for name, array in values.items():
        if family == "qwen3next" and name.endswith(("in_proj_b.weight", "in_proj_a.weight")):
            if name.endswith("in_proj_a.weight"):
                continue
            array = np.concatenate([array, values[name.replace("in_proj_b", "in_proj_a")]])  # random: in any order
            name = name.replace("in_proj_b", "in_proj_ba")
        stored = gguf_name(name, family)
        assert stored is not None, name
        in_gguf[stored] = Tensor(array.shape, F32, array.tobytes())
    as_hf = {
        name: Tensor(array.shape, "F32", np.ascontiguousarray(array, np.float32).tobytes())
        for name, array in _huggingface(family, config, values).items()
    }
    if family in ("qwen35", "qwen35moe"):
        nested = {"model_type": f"{config['model_type']}_text"}
        config = {"model_type": config["model_type"], "text_config": config | nested, "tie_word_embeddings": False}
    coded = config | {"quantization_config": FP8}
    return (
        Specimen(family, True, metadata, in_gguf),
        Specimen(family, False, config, as_hf, folder),
        Specimen(family, False, coded, _in_8_bits(as_hf), folder),
    )


def _in_8_bits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Random codes, none of them NaN, and a scale for each block."""
    rng = np.random.default_rng(0)
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not CODED.fullmatch(name):
            made[name] = tensor
            continue
        *stack, rows, cols = tensor.shape
        codes = rng.integers(0, 0x70, math.prod(tensor.shape), np.uint8) | rng.integers(0, 2, dtype=np.uint8) << 7
        grid = (*stack, -(-rows // 32), -(-cols // 32))
        scales = (1e-3 * (1 + rng.random(grid))).astype(np.float32)
        made[name] = Tensor(tensor.shape, "F8_E4M3", codes.astype(np.uint8).tobytes())
        made[name + SCALES] = Tensor(grid, "F32", scales.tobytes())
    return made


def _huggingface(family: str, config: Mapping[str, Any], values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Canonical tensors in the names and shapes of the published folders."""
    made: dict[str, np.ndarray] = {}
    multimodal = family in ("qwen35", "qwen35moe")
    for name, array in values.items():
        prefix, _, part = name.rpartition(".linear_attn.")
        if part == "a_coefficient":
            name, array = f"{prefix}.linear_attn.A_log", np.log(-array)
        elif part == "conv1d.weight":
            array = array[:, None, :]
        elif family == "qwen3next" and part in ("in_proj_qkv.weight", "in_proj_b.weight"):
            other = (
                "in_proj_z" if "qkv" in part else "in_proj_a"
            )  # random rows: their order within the fused tensor does not matter
            array = np.concatenate([array, values[f"{prefix}.linear_attn.{other}.weight"]])
            name = f"{prefix}.linear_attn.{'in_proj_qkvz' if 'qkv' in part else 'in_proj_ba'}.weight"
        elif family == "qwen3next" and part in ("in_proj_z.weight", "in_proj_a.weight"):
            continue
        elif ".experts." in name and family == "qwen35moe":
            if "up_proj" in name:
                continue
            if "gate_proj" in name:
                array = np.concatenate([array, values[name.replace("gate_proj", "up_proj")]], axis=1)
                name = name.replace("gate_proj", "gate_up_proj")
            name = name.removesuffix(".weight")
        elif ".experts." in name:
            for i, one in enumerate(array):
                made[name.replace(".experts.", f".experts.{i}.")] = one
            continue
        if multimodal and name.startswith("model."):
            name = "model.language_model." + name.removeprefix("model.")
        made[name] = array
    if multimodal:
        made["model.visual.patch_embed.proj.bias"] = np.zeros(8, np.float32)
        made["mtp.norm.weight"] = np.zeros(64, np.float32)
    return made
