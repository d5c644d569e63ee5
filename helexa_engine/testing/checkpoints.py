"""Tiny seeded Qwen3 checkpoints on disk, complete with tokenizer and chat template."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from ..quant import mixes, types
from ..quant.mixes import Mix
from ..quant.quantize import quantize
from ..quant.types import QuantType
from ..weights.gguf_names import gguf_name
from ..weights.gguf_writer import GGUFWriter

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

_CORPUS = (
    "The quick brown fox jumps over the lazy dog. A page holds sixty-four tokens; a batch holds many sequences.",
    "helexa runs open models on hardware you own. user assistant system tool name arguments hello world answer",
    '{"name": "get_weather", "arguments": {"city": "Berlin"}} 0 1 2 3 4 5 6 7 8 9 true false null',
)


def qwen3_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random float32 weights by HuggingFace name, scaled so that activations stay near 1 and logits are spread."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)

    def norm(size: int) -> torch.Tensor:
        return 1.0 + 0.1 * torch.randn(size, generator=generator)

    hidden, feed_forward, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q_size, kv_size = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    tensors = {
        "model.embed_tokens.weight": torch.randn(config["vocab_size"], hidden, generator=generator),
        "model.norm.weight": norm(hidden),
    }
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = 3.0 * matrix(config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm": norm(hidden),
            "self_attn.q_proj": matrix(q_size, hidden),
            "self_attn.k_proj": matrix(kv_size, hidden),
            "self_attn.v_proj": matrix(kv_size, hidden),
            "self_attn.o_proj": matrix(hidden, q_size),
            "self_attn.q_norm": norm(head_dim),
            "self_attn.k_norm": norm(head_dim),
            "post_attention_layernorm": norm(hidden),
            "mlp.gate_proj": matrix(feed_forward, hidden),
            "mlp.up_proj": matrix(feed_forward, hidden),
            "mlp.down_proj": matrix(hidden, feed_forward),
        }
        tensors |= {f"model.layers.{i}.{name}.weight": values for name, values in layer.items()}
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


def write_qwen3_folder(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A HuggingFace folder with a tiny random Qwen3 model; ``changes`` replace entries of :data:`TINY_QWEN3`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    num_tokens = write_tokenizer(folder)
    config = TINY_QWEN3 | {"vocab_size": num_tokens} | changes
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    ids = {token: num_tokens - len(CONTROL_TOKENS) - len(MARKERS) + i for i, token in enumerate(CONTROL_TOKENS)}
    generation = {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    save_file(qwen3_tensors(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_gguf(folder: Path, path: Path, quant: QuantType | Mix = types.F32) -> Path:
    """The model of a folder that :func:`write_qwen3_folder` wrote, as a GGUF file: its matrices in one type, or in a mix."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    added = {token["content"]: token for token in tokenizer["added_tokens"]}
    ids = tokenizer["model"]["vocab"] | {content: token["id"] for content, token in added.items()}
    tokens = sorted(ids, key=ids.__getitem__)
    normal, control, user_defined = 1, 3, 4  # tokenizer.ggml.token_type
    kinds = [normal if t not in added else control if added[t]["special"] else user_defined for t in tokens]
    metadata = {
        "general.architecture": "qwen3",
        "general.name": "tiny",
        "qwen3.block_count": config["num_hidden_layers"],
        "qwen3.context_length": config["max_position_embeddings"],
        "qwen3.embedding_length": config["hidden_size"],
        "qwen3.feed_forward_length": config["intermediate_size"],
        "qwen3.attention.head_count": config["num_attention_heads"],
        "qwen3.attention.head_count_kv": config["num_key_value_heads"],
        "qwen3.attention.key_length": config["head_dim"],
        "qwen3.attention.value_length": config["head_dim"],
        "qwen3.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "qwen3.rope.freq_base": float(config["rope_theta"]),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": ids["<|im_end|>"],
        "tokenizer.ggml.padding_token_id": ids["<|endoftext|>"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
        "general.sampling.temp": 0.0,
    }
    if isinstance(quant, Mix):
        metadata["general.file_type"] = quant.file_type
    with GGUFWriter(path, metadata) as writer:
        for hf_name, tensor in load_file(folder / "model.safetensors").items():
            name, values = gguf_name(hf_name), tensor.float().numpy()
            assert name is not None
            quant_type = _stored_type(quant, hf_name, values.shape, config)
            if quant_type is types.F32:
                writer.add_tensor(name, types.F32, values.shape, values)
            else:
                writer.add_tensor(name, quant_type, values.shape, quantize(values, quant_type))
    return path


def _stored_type(quant: QuantType | Mix, hf_name: str, shape: tuple[int, ...], config: dict[str, Any]) -> QuantType:
    if isinstance(quant, QuantType):
        return quant if len(shape) > 1 else types.F32
    return mixes.quant_type_for(
        quant,
        hf_name,
        shape,
        num_layers=config["num_hidden_layers"],
        gqa_ratio=config["num_attention_heads"] // config["num_key_value_heads"],
        tied=config["tie_word_embeddings"],
    )
