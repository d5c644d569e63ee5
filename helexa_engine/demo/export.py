"""Writes a trained checkpoint as GGUF: ``python -m helexa_engine.demo.export CHECKPOINT TOKENIZER OUTPUT.gguf``.

Matrices become Q8_0, norms stay float32. The file holds everything that the model needs: weights, tokenizer, chat template and
sampling defaults.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

from . import FOLDER

ARCHITECTURE = "qwen3"
TEMPERATURE = 0.2  #: a small model is sure of what it knows; this keeps its answers right and still lets them vary

LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """A HuggingFace tensor's name in a GGUF file. Raises KeyError for a tensor that Qwen3 does not have."""
    stem = name.removeprefix("model.").removesuffix(".weight")
    if stem.startswith("layers."):
        _, index, rest = stem.split(".", 2)
        return f"blk.{index}.{LAYER_TENSORS[rest]}.weight"
    return {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[stem]


def export(checkpoint: Path, tokenizer_file: Path, output: Path) -> None:
    """Converts a HuggingFace folder of a Qwen3 model with tied embeddings, and its ``tokenizer.json``."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    bpe = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(output, ARCHITECTURE)
    writer.add_name("helexa demo")
    writer.add_description("A small Qwen3 model that answers questions about helexa.")
    writer.add_license("apache-2.0")
    writer.add_languages(["en"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_float32(gguf.Keys.General.SAMPLING_TEMP, TEMPERATURE)

    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])

    ids: dict[str, int] = dict(bpe["model"]["vocab"])
    types = dict.fromkeys(ids, gguf.TokenType.NORMAL)
    for added in bpe["added_tokens"]:
        ids[added["content"]] = added["id"]
        types[added["content"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    tokens = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in tokens] != list(range(config["vocab_size"])):
        raise ValueError(f"{tokenizer_file}: expected token ids 0 to {config['vocab_size'] - 1} without gaps")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([types[token] for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in bpe["model"]["merges"]])
    writer.add_eos_token_id(ids["<|im_end|>"])
    writer.add_pad_token_id(ids["<|endoftext|>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((FOLDER / "chat_template.jinja").read_text(encoding="utf-8").rstrip("\n"))

    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        values = tensor.astype(np.float32)
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), values)
        else:
            packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    export(args.checkpoint, args.tokenizer, args.output)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
