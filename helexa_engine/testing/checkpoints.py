"""Tiny seeded checkpoints of every architecture on disk, complete with tokenizer and chat template."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from ..ops.quantize import quantize
from ..quant import mixes, types
from ..quant.mixes import Mix
from ..quant.types import QuantType
from ..weights.gguf_writer import GGUFWriter
from . import gguf_conversion

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

TINY_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "torch_dtype": "float32",
}

_MOE: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
# Sizes as TINY_QWEN3; three delta nets and an attention layer, four key heads (the tests set other numbers of value heads).
_HYBRID: dict[str, Any] = {
    "num_hidden_layers": 4,
    "attn_output_gate": True,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}
_MROPE = {"mrope_section": [3, 3, 2], "mrope_interleaved": True}
_SHARED: dict[str, Any] = {"shared_expert_intermediate_size": 256}

TINY_QWEN3_MOE: dict[str, Any] = (
    TINY_QWEN3 | _MOE | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
)
TINY_QWEN3_NEXT: dict[str, Any] = (
    TINY_QWEN3 | _MOE | _SHARED | _HYBRID | {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"}
)
TINY_QWEN3_5: dict[str, Any] = (
    TINY_QWEN3
    | _HYBRID
    | {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text"}
    | {"rope_parameters": _HYBRID["rope_parameters"] | _MROPE}
)
TINY_QWEN3_5_MOE: dict[str, Any] = (
    TINY_QWEN3_5 | _MOE | _SHARED | {"architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text"}
)
#: by GGUF's architecture
TINY = {
    "qwen3": TINY_QWEN3,
    "qwen3moe": TINY_QWEN3_MOE,
    "qwen3next": TINY_QWEN3_NEXT,
    "qwen35": TINY_QWEN3_5,
    "qwen35moe": TINY_QWEN3_5_MOE,
}

_CORPUS = (
    "The quick brown fox jumps over the lazy dog. A page holds sixty-four tokens; a batch holds many sequences.",
    "helexa runs open models on hardware you own. user assistant system tool name arguments hello world answer",
    '{"name": "get_weather", "arguments": {"city": "Berlin"}} 0 1 2 3 4 5 6 7 8 9 true false null',
)


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random float32 weights by HuggingFace name, scaled so that activations stay near 1 and logits are spread."""
    generator = torch.Generator().manual_seed(seed)
    is_hybrid = "layer_types" in config

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def matrix(*shape: int) -> torch.Tensor:
        return noise(*shape) / math.sqrt(shape[-1])

    def norm(size: int) -> torch.Tensor:
        return (0.0 if is_hybrid else 1.0) + 0.1 * noise(size)

    def gated_mlp(prefix: str, width: int) -> dict[str, torch.Tensor]:
        return {
            f"{prefix}.gate_proj.weight": matrix(width, hidden),
            f"{prefix}.up_proj.weight": matrix(width, hidden),
            f"{prefix}.down_proj.weight": matrix(hidden, width),
        }

    def attention() -> dict[str, torch.Tensor]:
        head_dim = config["head_dim"]
        q_size, kv_size = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
        return {
            "self_attn.q_proj.weight": matrix(q_size * (2 if is_hybrid else 1), hidden),
            "self_attn.k_proj.weight": matrix(kv_size, hidden),
            "self_attn.v_proj.weight": matrix(kv_size, hidden),
            "self_attn.o_proj.weight": matrix(hidden, q_size),
            "self_attn.q_norm.weight": norm(head_dim),
            "self_attn.k_norm.weight": norm(head_dim),
        }

    def delta_net() -> dict[str, torch.Tensor]:
        value_heads, value_dim = config["linear_num_value_heads"], config["linear_value_head_dim"]
        keys, values = config["linear_num_key_heads"] * config["linear_key_head_dim"], value_heads * value_dim
        if config["model_type"] == "qwen3_next":
            rows = {"qkvz": 2 * keys + 2 * values, "ba": 2 * value_heads}
        else:
            rows = {"qkv": 2 * keys + values, "z": values, "b": value_heads, "a": value_heads}
        layer = {f"linear_attn.in_proj_{part}.weight": matrix(count, hidden) for part, count in rows.items()}
        return layer | {
            "linear_attn.conv1d.weight": 0.5 * noise(2 * keys + values, 1, config["linear_conv_kernel_dim"]),
            "linear_attn.A_log": noise(value_heads) - 2.5,  # states that live for tens of tokens
            "linear_attn.dt_bias": 0.2 * noise(value_heads),
            "linear_attn.norm.weight": 1 + 0.1 * noise(value_dim),
            "linear_attn.out_proj.weight": matrix(hidden, values),
        }

    def feed_forward() -> dict[str, torch.Tensor]:
        if "num_experts" not in config:
            return gated_mlp("mlp", config["intermediate_size"])
        layer = {"mlp.gate.weight": 2 * matrix(config["num_experts"], hidden)}
        for expert in range(config["num_experts"]):
            layer |= gated_mlp(f"mlp.experts.{expert}", config["moe_intermediate_size"])
        if "shared_expert_intermediate_size" in config:
            layer |= gated_mlp("mlp.shared_expert", config["shared_expert_intermediate_size"])
            layer["mlp.shared_expert_gate.weight"] = matrix(1, hidden)
        return layer

    hidden = config["hidden_size"]
    tensors = {
        "model.embed_tokens.weight": noise(config["vocab_size"], hidden),
        "model.norm.weight": norm(hidden),
    }
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = 3.0 * matrix(config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        is_linear = is_hybrid and config["layer_types"][i] == "linear_attention"
        layer = {"input_layernorm.weight": norm(hidden)} | (delta_net() if is_linear else attention())
        layer |= {"post_attention_layernorm.weight": norm(hidden)} | feed_forward()
        tensors |= {f"model.layers.{i}.{name}": values for name, values in layer.items()}
    return tensors


def write_tokenizer(folder: Path, vocab_size: int = 400) -> int:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json`` with Qwen's rules and special tokens; returns the number of tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    from ..text.tokenizer import PRE_TOKENIZERS

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRE_TOKENIZERS["qwen2"]), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL_TOKENS) - len(MARKERS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKERS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return int(tokenizer.get_vocab_size())


def write_folder(
    folder: Path, architecture: str = "qwen3", *, seed: int = 0, multimodal: bool = False, **changes: Any
) -> Path:
    """A HuggingFace folder with a tiny random model; ``changes`` replace entries of its config in :data:`TINY`.

    ``multimodal`` writes it as the released Qwen3.5 are: the text config nested, the text model under a prefix, and beside it
    tensors of a vision encoder and of an MTP block.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    num_tokens = write_tokenizer(folder)
    config = TINY[architecture] | {"vocab_size": num_tokens} | changes
    tensors = random_tensors(config, seed)
    ids = {token: num_tokens - len(CONTROL_TOKENS) - len(MARKERS) + i for i, token in enumerate(CONTROL_TOKENS)}
    generation = {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    if multimodal:
        outer = {"model_type": config["model_type"].removesuffix("_text"), "vision_config": {"depth": 1}}
        config = outer | {"tie_word_embeddings": config["tie_word_embeddings"], "text_config": config}
        tensors = {
            name.replace("model.", "model.language_model.") if name.startswith("model.") else name: values
            for name, values in tensors.items()
        }
        tensors |= {"model.visual.blocks.0.norm1.weight": torch.zeros(8), "mtp.fc.weight": torch.zeros(8, 16)}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_qwen3_folder(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """:func:`write_folder` of the dense Qwen3."""
    return write_folder(folder, seed=seed, **changes)


def write_gguf(
    folder: Path, path: Path, quant: QuantType | Mix = types.F32, *, mtp: bool = False, **conversion: bool
) -> Path:
    """The model of a folder that :func:`write_folder` wrote (not a multimodal one), as a GGUF file in the conventions of its
    architecture: its matrices in one type, or in a mix.

    ``mtp`` adds a block that predicts a further token; ``conversion`` are the variants of :func:`.gguf_conversion.convert`.
    """
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    added = {token["content"]: token for token in tokenizer["added_tokens"]}
    ids = tokenizer["model"]["vocab"] | {content: token["id"] for content, token in added.items()}
    tokens = sorted(ids, key=ids.__getitem__)
    normal, control, user_defined = 1, 3, 4  # tokenizer.ggml.token_type
    kinds = [normal if t not in added else control if added[t]["special"] else user_defined for t in tokens]
    metadata = {
        "general.architecture": gguf_conversion.ARCHITECTURES[config["model_type"]],
        "general.name": "tiny",
        **gguf_conversion.metadata(config),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": ids["<|im_end|>"],
        "tokenizer.ggml.padding_token_id": ids["<|endoftext|>"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
        "general.sampling.temp": 0.0,
    }
    if isinstance(quant, Mix):
        metadata["general.file_type"] = quant.file_type
    listed = gguf_conversion.convert(config, load_file(folder / "model.safetensors"), **conversion)
    if mtp:
        architecture, blocks = metadata["general.architecture"], config["num_hidden_layers"]
        metadata |= {f"{architecture}.block_count": blocks + 1, f"{architecture}.nextn_predict_layers": 1}
        extra = gguf_conversion.mtp_block(config, blocks)
        listed += [gguf_conversion.Tensor(name, values, "", is_float32=True) for name, values in extra.items()]
    encode = quantize.choose("cpu").quantize  # the same bytes as the reference's, sooner
    with GGUFWriter(path, metadata) as writer:
        writer.add_metadata("tokenizer.ggml.token_type", kinds, "int32")  # llama.cpp reads no other
        for tensor in listed:
            values = tensor.values.contiguous().numpy()
            quant_type = types.F32 if tensor.is_float32 else _stored_type(quant, tensor.module, values.shape, config)
            if quant_type is types.F32:
                writer.add_tensor(tensor.name, types.F32, values.shape, values)
            else:
                writer.add_tensor(tensor.name, quant_type, values.shape, encode(values, quant_type))
    return path


def _stored_type(quant: QuantType | Mix, module: str, shape: tuple[int, ...], config: dict[str, Any]) -> QuantType:
    if isinstance(quant, QuantType):
        return quant
    return mixes.quant_type_for(
        quant,
        f"{module}.weight",
        shape,
        num_layers=config["num_hidden_layers"],
        gqa_ratio=config["num_attention_heads"] // config["num_key_value_heads"],
        tied=config["tie_word_embeddings"],
    )
