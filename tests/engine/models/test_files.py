"""One model in every kind of file: a HuggingFace folder, split or fused, multimodal or not, and GGUF in its conventions.

That the folder's logits are transformers' is held elsewhere, and how near quantised files come in ``test_accuracy``; here every
file must give the folder's.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helexa_engine.models.config import ModelConfig
from helexa_engine.models.decoder import Decoder
from helexa_engine.models.registry import MODELS, model_class
from helexa_engine.quant import dequantize, types
from helexa_engine.runtime.quantize_model import quantize_model
from helexa_engine.testing import gguf_conversion
from helexa_engine.testing.checkpoints import TINY, random_tensors, write_folder, write_gguf
from helexa_engine.weights import loader
from helexa_engine.weights.checkpoint import open_checkpoint
from helexa_engine.weights.gguf import GGUFFile
from helexa_engine.weights.gguf_writer import GGUFWriter

from .sessions import Session

HYBRIDS = ("qwen3next", "qwen35", "qwen35moe")
IDS = torch.randint(0, 390, (100,), generator=torch.Generator().manual_seed(0)).tolist()


def load(path: Path, quant: str | None = None, *, mmap_experts: bool = False) -> Decoder:
    with open_checkpoint(path) as checkpoint:
        config = ModelConfig.from_checkpoint(checkpoint.architecture, checkpoint.config, checkpoint.where)
        model = model_class(checkpoint.architecture, checkpoint.where)(config, config.max_position_embeddings)
        loader.load(model, checkpoint, quant=quant, mmap_experts=mmap_experts)
    return model


def logits(path: Path, quant: str | None = None) -> torch.Tensor:
    return Session(load(path, quant)).feed(IDS)


def test_there_is_a_tiny_model_of_every_architecture() -> None:
    assert set(TINY) == set(MODELS)


@pytest.mark.parametrize("value_heads", [4, 8, 12], ids=["V = K", "V = 2K", "V = 3K"])
@pytest.mark.parametrize("architecture", HYBRIDS)
def test_gguf_equals_the_folder(architecture: str, value_heads: int, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", architecture, linear_num_value_heads=value_heads)
    got = logits(write_gguf(folder, tmp_path / "model.gguf"))
    assert (got - logits(folder)).abs().max() < 1e-4


@pytest.mark.parametrize("architecture", HYBRIDS)
def test_files_of_other_layouts_are_the_same_model(architecture: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", architecture)
    expected = logits(write_gguf(folder, tmp_path / "plain.gguf"))
    variants = {"fused_qkv": True, "fused_experts": True, "old_ssm_in": architecture == "qwen3next"}
    path = write_gguf(folder, tmp_path / "fused.gguf", **variants)
    names = {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    assert "blk.3.attn_qkv.weight" in names and "blk.3.attn_q.weight" not in names
    assert ("blk.0.ffn_gate_up_exps.weight" in names) == (architecture != "qwen35")
    assert ("blk.0.ssm_in.weight" in names) == (architecture == "qwen3next")
    assert torch.equal(logits(path), expected)


def test_which_layers_are_recurrent_may_be_listed(tmp_path: Path) -> None:
    layers = ["full_attention", "linear_attention", "linear_attention", "full_attention"]
    folder = write_folder(tmp_path / "hf", "qwen35", layer_types=layers)
    path = write_gguf(folder, tmp_path / "model.gguf")
    listed = edited(path, tmp_path / "listed.gguf", {"qwen35.attention.recurrent_layers": [False, True, True, False]})
    assert (logits(listed) - logits(folder)).abs().max() < 1e-4


def edited(path: Path, to: Path, metadata: dict) -> Path:
    """A copy with metadata added."""
    reader = gguf.GGUFReader(path)
    kept = {f.name: f.contents() for f in reader.fields.values() if not f.name.startswith("GGUF.")}
    with GGUFWriter(to, kept | metadata) as writer:
        for tensor in reader.tensors:
            stored = types.by_number(tensor.tensor_type)
            assert stored is not None
            writer.add_tensor(tensor.name, stored, tuple(tensor.shape.tolist()[::-1]), np.array(tensor.data))
    return to


def nvfp4_copies(path: Path, to: Path, plain: Path) -> None:
    """A float32 file twice over: ``to`` with its matrices as random NVFP4 blocks and a scale beside them, as converted NVFP4
    checkpoints are, and ``plain`` with the same values in float32.
    """
    rng = np.random.default_rng(0)
    reader = gguf.GGUFReader(path)
    kept = {f.name: f.contents() for f in reader.fields.values() if not f.name.startswith("GGUF.")}
    with GGUFWriter(to, kept) as scaled, GGUFWriter(plain, kept) as floats:
        for tensor in reader.tensors:
            shape, values = tuple(tensor.shape.tolist()[::-1]), np.array(tensor.data)
            is_kept = "token_embd" in tensor.name or "ffn_gate_inp" in tensor.name or "ssm_conv1d" in tensor.name
            if len(shape) < 2 or is_kept:
                scaled.add_tensor(tensor.name, types.F32, shape, values)
                floats.add_tensor(tensor.name, types.F32, shape, values)
                continue
            blocks = np.zeros(values.size // 64, dequantize.NVFP4_BLOCK)
            blocks["d"] = rng.integers(0x28, 0x48, blocks["d"].shape)
            blocks["qs"] = rng.integers(0, 256, blocks["qs"].shape)
            stored = blocks.view(np.uint8).reshape(-1)
            made = np.asarray(dequantize.dequantize(types.NVFP4, stored, shape), np.float32)
            count = shape[0] if len(shape) == 3 else 1
            scale = (values.std() / made.std() * rng.uniform(0.5, 1.5, count)).astype(np.float32)
            scaled.add_tensor(tensor.name, types.NVFP4, shape, stored)
            stem = tensor.name.removesuffix("weight")
            scaled.add_tensor(f"{stem}scale", types.F32, (count,), scale)
            scaled.add_tensor(f"{stem}input_scale", types.F32, (count,), np.full(count, 7, np.float32))
            floats.add_tensor(tensor.name, types.F32, shape, made * scale.reshape(-1, *[1] * (len(shape) - 1)))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("architecture", sorted(MODELS))
def test_scales_beside_nvfp4_matrices_count(architecture: str, fused: bool, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", architecture)
    layout = {"fused_qkv": True, "fused_experts": True, "old_ssm_in": architecture == "qwen3next"} if fused else {}
    scaled, plain = tmp_path / "nvfp4.gguf", tmp_path / "plain.gguf"
    nvfp4_copies(write_gguf(folder, tmp_path / "model.gguf", **layout), scaled, plain)
    expected = logits(plain)
    assert expected.std() > 0.1
    assert (logits(scaled) - expected).abs().max() < 1e-4
    if "moe" in architecture:
        assert torch.equal(Session(load(scaled, mmap_experts=True)).feed(IDS), logits(scaled))
    if not fused:  # and they are multiplied in where the matrix changes its type
        for source in (scaled, plain):
            quantize_model(source, source.with_suffix(".q8"), "Q8_0", name="m", allow_requantize=True)
        ours, theirs = GGUFFile(scaled.with_suffix(".q8")), GGUFFile(plain.with_suffix(".q8"))
        assert ours.tensors.keys() == theirs.tensors.keys()
        for name, tensor in ours.tensors.items():
            np.testing.assert_array_equal(tensor.data, theirs.tensors[name].data, name)


@pytest.mark.parametrize("architecture", ["qwen35", "qwen35moe"])
def test_multimodal_folders_give_their_text_model(architecture: str, tmp_path: Path) -> None:
    plain = write_folder(tmp_path / "plain", architecture)
    path = write_folder(tmp_path / "multimodal", architecture, multimodal=True)
    checkpoint = open_checkpoint(path)
    assert checkpoint.architecture == architecture
    assert {kind: [t.name for t in tensors] for kind, tensors in checkpoint.unused.items()} == {
        "vision": ["model.visual.blocks.0.norm1.weight"],
        "MTP": ["mtp.fc.weight"],
    }
    assert torch.equal(logits(path), logits(plain))


def test_an_mtp_block_is_left_out(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", "qwen35")
    path = write_gguf(folder, tmp_path / "mtp.gguf", mtp=True)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["num_hidden_layers"] == 4
    assert {t.name.split(".")[1] for t in checkpoint.unused["MTP"]} == {"4"} and len(checkpoint.unused["MTP"]) == 15
    assert torch.equal(logits(path), logits(write_gguf(folder, tmp_path / "plain.gguf")))


@pytest.mark.parametrize("architecture", ["qwen3moe", *HYBRIDS[::2]])
def test_fused_experts_of_a_folder_are_the_same_model(architecture: str, tmp_path: Path) -> None:
    """As transformers holds them and the released Qwen3.5 store them: one tensor of gate | up, one of down."""
    split = write_folder(tmp_path / "split", architecture)
    fused = write_folder(tmp_path / "fused", architecture)
    tensors = load_file(fused / "model.safetensors")
    for layer in range(json.loads((fused / "config.json").read_text())["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts"
        parts = {
            part: torch.stack([tensors.pop(f"{prefix}.{i}.{part}_proj.weight") for i in range(6)])
            for part in ("gate", "up", "down")
        }
        tensors[f"{prefix}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        tensors[f"{prefix}.down_proj"] = parts["down"]
    save_file(tensors, fused / "model.safetensors")
    assert torch.equal(logits(fused), logits(split))


@pytest.mark.parametrize("architecture", ["qwen3moe", *HYBRIDS])
def test_quantising_on_loading_keeps_small_matrices_exact(architecture: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", architecture)
    checkpoint = open_checkpoint(folder)
    listed = loader._mix_types(checkpoint, "Q4_K_M")
    kept = {name for name in checkpoint.tensor_names() if name not in listed}
    shapes = {tuple(checkpoint.tensor(name).shape) for name in kept if len(checkpoint.tensor(name).shape) > 1}
    router, shared_gate, conv = (6, 256), (1, 256), (1024, 4)
    expected = {"qwen3moe": {router}, "qwen35": {conv}}.get(architecture, {router, shared_gate, conv})
    assert shapes == expected
    truth, got = logits(folder).double(), logits(folder, "Q8_0").double()
    assert 0 < float((got - truth).square().mean() / truth.var()) < 2e-2


def test_names_of_the_converter_are_the_gguf_package_s() -> None:
    """The converter under ``testing`` is the oracle of the loaders; this is its own."""
    for model_type, architecture in gguf_conversion.ARCHITECTURES.items():
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[arch]}
        config = TINY[architecture] | {"vocab_size": 64}
        assert config["model_type"] == model_type
        for tensor in gguf_conversion.convert(config, random_tensors(config)):
            stem = tensor.name.removesuffix(".weight").removesuffix(".bias")
            block = stem.split(".")[1] if stem.startswith("blk.") else ""
            assert stem.replace(f"blk.{block}.", "blk.{bid}.") in known, tensor.name
