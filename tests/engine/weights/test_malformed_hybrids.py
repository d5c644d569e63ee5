"""Metadata and configs of the hybrids and mixtures that make no sense: the error names the key, or the tensor that contradicts it.

What any tensor may suffer, whatever the family, is in ``test_malformed``.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helexa_engine.errors import UnsupportedCheckpoint
from helexa_engine.models.config import ModelConfig
from helexa_engine.models.registry import model_class
from helexa_engine.quant import types
from helexa_engine.testing.checkpoints import write_folder, write_gguf
from helexa_engine.weights import loader
from helexa_engine.weights.checkpoint import open_checkpoint
from helexa_engine.weights.gguf_writer import GGUFWriter

ARCHITECTURES = ("qwen3moe", "qwen3next", "qwen35", "qwen35moe")
Tensors = dict[str, torch.Tensor]
Files = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Of an architecture, a folder and a GGUF file with nothing wrong."""

    @cache
    def write(architecture: str) -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp(architecture)
        layers: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
        folder = write_folder(
            root / "hf", architecture, num_hidden_layers=2, **(layers if architecture != "qwen3moe" else {})
        )
        path = write_gguf(folder, root / "plain.gguf")
        if layers:
            path = edit_gguf(path, root / "model.gguf", {f"{architecture}.full_attention_interval": 2})
        return folder, path

    return write


def edit_gguf(
    path: Path, to: Path, metadata: dict[str, Any] | None = None, edit: Callable[[Tensors], None] | None = None
) -> Path:
    """A copy with metadata replaced (None removes) and its tensors, all float32, edited."""
    reader = gguf.GGUFReader(path)
    kept = {f.name: f.contents() for f in reader.fields.values() if not f.name.startswith("GGUF.")}
    kept |= metadata or {}
    tensors = {t.name: torch.from_numpy(np.array(t.data).reshape(t.shape.tolist()[::-1])) for t in reader.tensors}
    if edit:
        edit(tensors)
    with GGUFWriter(to, {key: value for key, value in kept.items() if value is not None}) as writer:
        for name, values in tensors.items():
            writer.add_tensor(name, types.F32, tuple(values.shape), values.contiguous().numpy())
    return to


def edit_folder(
    folder: Path, to: Path, config: dict[str, Any] | None = None, edit: Callable[[Tensors], None] | None = None
) -> Path:
    shutil.copytree(folder, to)
    changed = json.loads((to / "config.json").read_text()) | (config or {})
    (to / "config.json").write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))
    if edit:
        tensors = load_file(to / "model.safetensors")
        edit(tensors)
        save_file({name: values.contiguous() for name, values in tensors.items()}, to / "model.safetensors")
    return to


def load(path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        config = ModelConfig.from_checkpoint(checkpoint.architecture, checkpoint.config, checkpoint.where)
        model = model_class(checkpoint.architecture, checkpoint.where)(config, 64)
        loader.load(model, checkpoint)


def refused(path: Path) -> str:
    with pytest.raises(UnsupportedCheckpoint) as caught:
        load(path)
    return str(caught.value)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_wrong_with_the_originals(files: Files, architecture: str) -> None:
    for path in files(architecture):
        load(path)


@pytest.mark.parametrize(
    ("architecture", "key", "value", "words"),
    [
        ("qwen35", "ssm.group_count", 3, r"ssm.time_step_rank: expected a multiple of ssm.group_count \(3\), got 8"),
        ("qwen35", "ssm.group_count", None, "ssm.group_count is missing"),
        ("qwen35", "ssm.group_count", "4", "ssm.group_count: expected an integer"),
        ("qwen35", "ssm.group_count", 0, "ssm.group_count: expected an integer of at least 1"),
        ("qwen35", "ssm.inner_size", 500, r"ssm.inner_size: expected a multiple of ssm.time_step_rank \(8\)"),
        ("qwen35", "ssm.conv_kernel", 5, "linear_conv_kernel_dim: expected 4, got 5"),
        ("qwen35", "ssm.state_size", 32, "expected shape"),
        ("qwen35", "full_attention_interval", 0, "full_attention_interval: expected an integer"),
        ("qwen35", "full_attention_interval", 1, r"self_attn.qkv_proj.weight.*expected 768 rows \(q, k, v\)"),
        ("qwen35", "full_attention_interval", 3, "at least one layer of full_attention"),
        ("qwen35", "attention.recurrent_layers", [True], "attention.recurrent_layers: expected 2 booleans"),
        ("qwen35", "attention.recurrent_layers", "all", "attention.recurrent_layers: expected 2 booleans"),
        ("qwen35", "nextn_predict_layers", 2, "block_count: expected from 1 to 4096 blocks beside 2"),
        ("qwen35", "nextn_predict_layers", 1, "missing|layer_types"),
        ("qwen35", "rope.dimension_count", 15, "rotary"),
        ("qwen35", "rope.dimension_count", 65, "rotary"),
        ("qwen35", "rope.dimension_count", None, "rope.dimension_count is missing"),
        ("qwen35", "attention.head_count_kv", [0, 3], "num_key_value_heads"),
        ("qwen35", "block_count", 2**40, "block_count"),
        ("qwen3next", "ssm.time_step_rank", 12, r"ssm.inner_size: expected a multiple of ssm.time_step_rank \(12\)"),
        ("qwen3next", "ssm.group_count", 2, r"expected 16 rows|expected shape"),
        ("qwen3next", "expert_count", 7, r"expected shape \[7, "),
        ("qwen3moe", "expert_used_count", 9, r"num_experts_per_tok: expected an integer in \[1, 6\]"),
        ("qwen3moe", "expert_used_count", None, "expert_used_count is missing"),
        ("qwen35moe", "expert_feed_forward_length", [256, 128], "expert_feed_forward_length: expected an integer"),
        ("qwen35moe", "expert_shared_feed_forward_length", None, "expert_shared_feed_forward_length is missing"),
    ],
)
def test_metadata_that_makes_no_sense_is_named(
    files: Files, architecture: str, key: str, value: Any, words: str, tmp_path: Path
) -> None:
    _, path = files(architecture)
    message = refused(edit_gguf(path, tmp_path / "m.gguf", {f"{architecture}.{key}": value}))
    assert re.search(words, message), message


@pytest.mark.parametrize(
    ("architecture", "changes", "words"),
    [
        ("qwen35", {"layer_types": ["linear_attention"]}, "layer_types: expected 2 entries, one a layer, got 1"),
        ("qwen35", {"layer_types": ["linear_attention", "sliding"]}, r"layer_types\[1\]: expected .* got 'sliding'"),
        ("qwen35", {"layer_types": 7}, "layer_types: expected 2 entries"),
        ("qwen35", {"linear_num_value_heads": 6}, "not a multiple of linear_num_key_heads"),
        ("qwen35", {"linear_key_head_dim": None}, "linear_key_head_dim: expected an integer"),
        ("qwen35", {"linear_key_head_dim": 40}, "linear_key_head_dim: expected a multiple of 16"),
        ("qwen35", {"linear_conv_kernel_dim": 3}, "linear_conv_kernel_dim: expected 4"),
        ("qwen35", {"attn_output_gate": False}, "attn_output_gate: expected True in qwen35, got False"),
        ("qwen35", {"text_config": [1]}, "text_config: expected an object"),
        ("qwen35", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.5}}, "partial_rotary_factor"),
        ("qwen35", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": "half"}}, "partial_rotary_factor"),
        ("qwen3next", {"linear_num_key_heads": 2}, r"in_proj_qkvz.*|expected .* rows \(q, k, v, z"),
        ("qwen3next", {"num_experts": 7}, "expert 6 of 7 is missing"),
        ("qwen3next", {"num_experts": 5}, "6 experts, num_experts is 5"),
        ("qwen3moe", {"num_experts": None}, "num_experts: expected a positive integer"),
        ("qwen3moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("qwen3moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("qwen35moe", {"norm_topk_prob": "yes"}, None),
        ("qwen3next", {"norm_topk_prob": "yes"}, "norm_topk_prob: expected true or false"),
        ("qwen35moe", {"shared_expert_intermediate_size": 128}, r"shared_expert.*expected shape \[128, 256\]"),
    ],
)
def test_configs_that_make_no_sense_are_named(
    files: Files, architecture: str, changes: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    folder, _ = files(architecture)
    path = edit_folder(folder, tmp_path / "edited", changes)
    if words is None:  # a key that this architecture does not have
        load(path)
    else:
        message = refused(path)
        assert re.search(words, message), message


def test_an_expert_unlike_the_others_is_named(files: Files, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"

    def cut(tensors: Tensors) -> None:
        tensors[name] = tensors[name][:128]

    message = refused(edit_folder(files("qwen3moe")[0], tmp_path / "edited", edit=cut))
    assert name in message and "expected F32 [256, 256]" in message


def test_one_tensor_in_two_forms_is_named(files: Files, tmp_path: Path) -> None:
    def twice(tensors: Tensors) -> None:
        tensors["blk.1.attn_qkv.weight"] = torch.cat([tensors[f"blk.1.attn_{part}.weight"] for part in "qkv"])

    message = refused(edit_gguf(files("qwen35")[1], tmp_path / "m.gguf", edit=twice))
    assert "two tensors give 'model.layers.1.self_attn.q_proj.weight'" in message and "blk.1.attn_qkv.weight" in message
