"""GGUF and HuggingFace folders give one and the same checkpoint; what is wrong with either is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helexa_engine.errors import InvalidRequest, ModelNotFound, UnsupportedCheckpoint
from helexa_engine.models.config import ModelConfig
from helexa_engine.models.qwen3 import Qwen3
from helexa_engine.models.registry import model_class
from helexa_engine.quant import types
from helexa_engine.weights import loader
from helexa_engine.weights.checkpoint import Checkpoint, open_checkpoint
from helexa_engine.weights.raw_tensor import RawTensor

from .conftest import SHAPE, write_gguf


def values(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {t.name: t.data.view(np.float32).reshape(t.shape) for t in checkpoint.tensors}


def check_equal(checkpoint: Checkpoint, hf_model) -> None:
    state = {name: value.numpy() for name, value in hf_model.state_dict().items()}
    mine = values(checkpoint)
    assert mine.keys() == state.keys()
    for name in state:
        np.testing.assert_array_equal(mine[name], state[name])


def test_gguf_holds_the_model(gguf_file: Path, hf_model) -> None:
    checkpoint = open_checkpoint(gguf_file)
    check_equal(checkpoint, hf_model)
    assert checkpoint.architecture == "qwen3"
    for key in SHAPE:
        assert checkpoint.config[key] == pytest.approx(SHAPE[key])


def test_fused_qkv_is_the_same_model(hf_model, tmp_path: Path) -> None:
    check_equal(open_checkpoint(write_gguf(tmp_path / "fused.gguf", hf_model, fused=True)), hf_model)


def test_folders_hold_the_model(hf_folder: Path, sharded_folder: Path, hf_model) -> None:
    for folder in (hf_folder, sharded_folder):
        check_equal(open_checkpoint(folder), hf_model)


def test_configs_agree(gguf_file: Path, hf_folder: Path) -> None:
    configs = []
    for path in (gguf_file, hf_folder):
        checkpoint = open_checkpoint(path)
        configs.append(ModelConfig.from_checkpoint(checkpoint.architecture, checkpoint.config, checkpoint.where))
    a, b = configs
    assert a.rms_norm_eps == pytest.approx(b.rms_norm_eps)
    for field in ("hidden_size", "head_dim", "vocab_size", "rope_theta", "tie_word_embeddings", "num_key_value_heads"):
        assert getattr(a, field) == getattr(b, field)


@pytest.mark.parametrize("kind", ["gguf_file", "hf_folder", "sharded_folder"])
def test_loading_reports_progress_and_fills_every_slot(kind: str, request: pytest.FixtureRequest) -> None:
    checkpoint = open_checkpoint(request.getfixturevalue(kind))
    config = ModelConfig.from_checkpoint(checkpoint.architecture, checkpoint.config, checkpoint.where)
    model = Qwen3(config, 64)
    seen: list[float] = []
    loader.load(model, checkpoint, progress=lambda stage, fraction: seen.append(fraction))
    assert seen == sorted(seen) and seen[-1] == pytest.approx(1.0)
    assert model.norm.weight.shape == (64,)


def edited(folder: Path, tmp_path: Path, **changes) -> Path:
    copy = tmp_path / "edited"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key, None) if value is None else config.update({key: value})
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def load(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    cls = model_class(checkpoint.architecture, checkpoint.where)
    config = ModelConfig.from_checkpoint(checkpoint.architecture, checkpoint.config, checkpoint.where)
    loader.load(cls(config, 64), checkpoint)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, "'llama' is not supported"),
        ({"model_type": None}, "model_type is missing"),
        ({"hidden_size": "64"}, "hidden_size: expected an integer"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor"),
        ({"quantization_config": {"quant_method": "awq"}}, "'awq'"),
        ({"intermediate_size": 128}, r"expected shape \[128, 64\], got \[96, 64\]"),
        ({"num_hidden_layers": 3}, "tensors are missing: model.layers.2"),
        ({"num_hidden_layers": 1}, "are not part of qwen3: model.layers.1"),
    ],
)
def test_bad_configs_are_named(hf_folder: Path, tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=words):
        load(edited(hf_folder, tmp_path, **changes))


def test_what_is_not_there_is_named(hf_folder: Path, sharded_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no such file"):
        open_checkpoint(tmp_path / "nothing.gguf")
    with pytest.raises(UnsupportedCheckpoint, match="config.json is missing"):
        open_checkpoint(tmp_path)
    copy = edited(hf_folder, tmp_path)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UnsupportedCheckpoint, match="pytorch_model.bin is a pickle"):
        open_checkpoint(copy)
    shards = tmp_path / "shards"
    shutil.copytree(sharded_folder, shards)
    lost = sorted(shards.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelNotFound, match=lost.name):
        open_checkpoint(shards)


def test_malformed_safetensors_are_named(hf_folder: Path, tmp_path: Path) -> None:
    copy = edited(hf_folder, tmp_path)
    weights = copy / "model.safetensors"
    content = weights.read_bytes()
    for cut in (0, 4, 20, 2000):
        weights.write_bytes(content[:cut])
        with pytest.raises(UnsupportedCheckpoint, match="model.safetensors"):
            load(copy)
    weights.write_bytes(content[:-8])
    with pytest.raises(UnsupportedCheckpoint, match="truncated"):
        load(copy)
    state = load_file(hf_folder / "model.safetensors")
    state["model.norm.weight"] = torch.zeros(64, dtype=torch.int8)
    save_file(state, weights)
    with pytest.raises(UnsupportedCheckpoint, match="model.norm.weight.*I8"):
        load(copy)


def test_the_index_cannot_leave_the_folder(sharded_folder: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(sharded_folder, shards)
    (shards / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(UnsupportedCheckpoint, match="leaves the folder"):
        open_checkpoint(shards)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_conversion_rounds_as_torch_does(dtype: str) -> None:
    source = torch.cat(
        [torch.randn(1000, generator=torch.Generator().manual_seed(0)), torch.tensor([float("nan"), 1e-30])]
    )
    raw = RawTensor("t", types.F32, (1002,), source.numpy().view(np.uint8))
    got = loader.convert(raw, dtype)
    back = torch.from_numpy(got.data.copy()).view(getattr(torch, dtype))
    assert torch.equal(back.nan_to_num(7), source.to(getattr(torch, dtype)).nan_to_num(7))
    again = loader.convert(got, "float32").data.view(np.float32)
    np.testing.assert_array_equal(again[:1000], back[:1000].float().numpy())
    with pytest.raises(InvalidRequest, match="dtype"):
        loader.convert(raw, "int8")
