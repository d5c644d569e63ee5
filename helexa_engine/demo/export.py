"""Writes a trained checkpoint as GGUF: ``python -m helexa_engine.demo.export CHECKPOINT TOKENIZER OUTPUT.gguf``.

Matrices become Q8_0; norms, convolutions and the delta nets' decays stay float32. The file holds everything that the model needs:
weights, tokenizer, chat template and sampling defaults.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

from . import FOLDER
from .gguf_layout import gguf_name, to_gguf

ARCHITECTURE = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN35]
TEMPERATURE = 0.2  #: a small model is sure of what it knows; this keeps its answers right and still lets them vary


def export(checkpoint: Path, tokenizer_file: Path, output: Path) -> None:
    """Converts a HuggingFace folder of a Qwen3.5 text model with tied embeddings, and its ``tokenizer.json``."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    bpe = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(output, ARCHITECTURE)
    writer.add_name("helexa demo")
    writer.add_description("A small hybrid in the Qwen3.5 layout that answers questions about helexa.")
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
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(config["head_dim"] * rope["partial_rotary_factor"]))
    writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
    writer.add_full_attention_interval(config["layer_types"].index("full_attention") + 1)
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
    writer.add_ssm_inner_size(config["linear_value_head_dim"] * config["linear_num_value_heads"])

    ids: dict[str, int] = dict(bpe["model"]["vocab"])
    types = dict.fromkeys(ids, gguf.TokenType.NORMAL)
    for added in bpe["added_tokens"]:
        ids[added["content"]] = added["id"]
        types[added["content"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    tokens = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in tokens] != list(range(config["vocab_size"])):
        raise ValueError(f"{tokenizer_file}: expected token ids 0 to {config['vocab_size'] - 1} without gaps")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35")
    writer.add_token_list(tokens)
    writer.add_token_types([types[token] for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in bpe["model"]["merges"]])
    writer.add_eos_token_id(ids["<|im_end|>"])
    writer.add_pad_token_id(ids["<|endoftext|>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((FOLDER / "chat_template.jinja").read_text(encoding="utf-8").rstrip("\n"))

    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        values = to_gguf(name, tensor.astype(np.float32), config)
        if values.ndim == 1 or name.endswith("conv1d.weight"):
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
