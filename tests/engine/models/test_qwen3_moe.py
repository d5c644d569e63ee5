"""Qwen3 with experts against HuggingFace transformers, from a HuggingFace folder and from GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from helexa_engine.errors import UnsupportedCheckpoint
from helexa_engine.models.config import ModelConfig
from helexa_engine.models.qwen3_moe import Qwen3Moe
from helexa_engine.quant import types
from helexa_engine.quant.quantize import quantize
from helexa_engine.quant.types import QuantType
from helexa_engine.weights.checkpoint import open_checkpoint
from helexa_engine.weights.gguf_names import gguf_name
from helexa_engine.weights.gguf_writer import GGUFWriter
from helexa_engine.weights.loader import load

from .sessions import Pool, Session, assert_same, float32_costs
from .test_qwen3 import random_ids

SHAPES: dict[str, dict[str, Any]] = {
    "normalised": {},
    "not_normalised": {"norm_topk_prob": False},
    "one_expert_a_token": {"num_experts_per_tok": 1},
    "all_experts": {"num_experts": 5, "num_experts_per_tok": 5},
    "tied": {"tie_word_embeddings": True},
}


def write_folder(folder: Path, **changes: Any) -> Qwen3MoeForCausalLM:
    """A tiny random model as transformers saves it: one tensor an expert."""
    torch.manual_seed(0)
    shape = dict(
        hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_experts=16, num_experts_per_tok=4,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32, vocab_size=160,
        max_position_embeddings=512, norm_topk_prob=True, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(shape | changes))).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.15 if "experts" not in name else 0.3
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else spread * noise)
    model.save_pretrained(folder)
    return model


def write_gguf(folder: Path, path: Path, quant_type: QuantType = types.F32, *, fused: bool = False) -> Path:
    """The folder's model as GGUF; ``fused`` puts each expert's gate and up into one tensor."""
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    metadata = {
        "general.architecture": "qwen3moe",
        "qwen3moe.block_count": config["num_hidden_layers"],
        "qwen3moe.context_length": config["max_position_embeddings"],
        "qwen3moe.embedding_length": config["hidden_size"],
        "qwen3moe.feed_forward_length": config["intermediate_size"],
        "qwen3moe.attention.head_count": config["num_attention_heads"],
        "qwen3moe.attention.head_count_kv": config["num_key_value_heads"],
        "qwen3moe.attention.key_length": config["head_dim"],
        "qwen3moe.attention.value_length": config["head_dim"],
        "qwen3moe.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "qwen3moe.rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        "qwen3moe.expert_count": config["num_experts"],
        "qwen3moe.expert_used_count": config["num_experts_per_tok"],
        "qwen3moe.expert_feed_forward_length": config["moe_intermediate_size"],
    }
    with GGUFWriter(path, metadata) as writer:
        for raw in checkpoint.tensors:
            name, values = gguf_name(raw.name, "qwen3moe"), raw.values()
            assert name is not None
            if fused and "ffn_up_exps" in name:
                continue
            if fused and "ffn_gate_exps" in name:
                up = checkpoint.tensor(raw.name.replace("gate_proj", "up_proj")).values()
                name, values = name.replace("ffn_gate_exps", "ffn_gate_up_exps"), torch.cat(
                    [torch.from_numpy(values), torch.from_numpy(up)], dim=1
                ).numpy()  # fmt: skip
            stored = types.F32 if values.ndim == 1 or raw.name.endswith("mlp.gate.weight") else quant_type
            writer.add_tensor(name, stored, values.shape, values if stored is types.F32 else quantize(values, stored))
    return path


def read(path: Path) -> tuple[Qwen3Moe, ModelConfig]:
    with open_checkpoint(path) as checkpoint:
        config = ModelConfig.from_checkpoint(checkpoint.architecture, checkpoint.config, checkpoint.where)
        model = Qwen3Moe(config, config.max_position_embeddings)
        load(model, checkpoint)
    return model, config


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_greedy_tokens_equal_transformers(tmp_path: Path, shape: str) -> None:
    theirs = write_folder(tmp_path / "hf", **SHAPES[shape])
    ours, config = read(tmp_path / "hf")
    ids = random_ids(150, seed=1)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
        assert (Session(ours).feed(ids) - expected).abs().max() < 1e-4
        prompt = torch.tensor([ids[:70]])
        answer = theirs.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    session = Session(ours)
    got, logits = [], session.feed(ids[:70])[-1]
    for _ in range(64):
        got.append(int(logits.argmax()))
        logits = session.feed([got[-1]])[-1]
    assert got == answer[0, 70:].tolist()


@pytest.mark.parametrize("fused", [False, True])
def test_gguf_equals_the_folder_to_the_bit(tmp_path: Path, fused: bool) -> None:
    write_folder(tmp_path / "hf")
    folder, config = read(tmp_path / "hf")
    gguf, gguf_config = read(write_gguf(tmp_path / "hf", tmp_path / "model.gguf", fused=fused))
    ids = random_ids(40, seed=5)
    assert torch.equal(Session(gguf).feed(ids), Session(folder).feed(ids))


@pytest.mark.parametrize("chunk", [1, 3, 63, 64, 65])
@pytest.mark.parametrize("quant_type", [types.F32, types.Q8_0], ids=str)
def test_chunked_prefill_equals_whole(tmp_path: Path, chunk: int, quant_type: QuantType) -> None:
    theirs = write_folder(tmp_path / "hf", num_hidden_layers=2)
    ours, config = read(write_gguf(tmp_path / "hf", tmp_path / "model.gguf", quant_type))
    ids = random_ids(140, seed=3)
    rounding = 2 * float32_costs(theirs, tuple(ids))
    whole = Session(ours).feed(ids)
    session = Session(ours)
    parts = session.feed_in(ids, list(range(chunk, len(ids), chunk)))
    assert_same(parts, whole, rounding=rounding)


def test_a_batch_equals_each_alone(tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", num_hidden_layers=2)
    ours, config = read(write_gguf(tmp_path / "hf", tmp_path / "model.gguf", types.Q8_0))
    prompts = [random_ids(count, seed=count) for count in (70, 1, 100)]
    expected = torch.cat([Session(ours).feed(prompt) for prompt in prompts])
    pool = Pool(ours)
    sessions = [Session(ours, pool, pages) for pages in [(1, 9), (4,), (8, 6)]]
    assert_same(pool.feed(*zip(sessions, prompts, strict=True)), expected)


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    theirs = write_folder(tmp_path / "hf")
    ours, config = read(tmp_path / "hf")
    ours.layers[1].feed_forward._top_k = 3
    ids = random_ids(64, seed=1)
    with torch.no_grad():
        difference = (Session(ours).feed(ids) - theirs(torch.tensor([ids])).logits[0]).abs().max()
    assert difference > 1e-2


def test_more_experts_a_token_than_there_are(tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", num_experts_per_tok=17)
    with pytest.raises(UnsupportedCheckpoint, match="num_experts_per_tok"):
        read(tmp_path / "hf")
