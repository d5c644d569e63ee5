"""Small model files of every kind, made once a session with other people's writers."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from helexa_engine.weights.gguf_names import gguf_name

SHAPE = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    vocab_size=80, max_position_embeddings=256, rms_norm_eps=1e-6, rope_theta=10000.0, tie_word_embeddings=False,
)  # fmt: skip


@pytest.fixture(scope="session")
def hf_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE)).eval().float()


@pytest.fixture(scope="session")
def hf_folder(hf_model: Qwen3ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    hf_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sharded_folder(hf_model: Qwen3ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    hf_model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def write_gguf(path: Path, model: Qwen3ForCausalLM, *, fused: bool = False, split: int = 0) -> Path:
    writer = gguf.GGUFWriter(
        path, "qwen3", split_max_tensors=split, small_first_shard=False, use_temp_file=False, dry_run=False
    )
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_key_length(SHAPE["head_dim"])
    writer.add_value_length(SHAPE["head_dim"])
    writer.add_layer_norm_rms_eps(SHAPE["rms_norm_eps"])
    writer.add_rope_freq_base(SHAPE["rope_theta"])
    writer.add_token_list(["a", "b", "ü"])
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    for name, value in state.items():
        theirs = gguf_name(name)
        assert theirs is not None
        if fused and ".attn_q.weight" in theirs:
            parts = [state[name.replace("q_proj", p)] for p in ("q_proj", "k_proj", "v_proj")]
            writer.add_tensor(theirs.replace("attn_q", "attn_qkv"), np.concatenate(parts))
        elif not (fused and (".attn_k.weight" in theirs or ".attn_v.weight" in theirs)):
            writer.add_tensor(theirs, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def gguf_file(hf_model: Qwen3ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", hf_model)
