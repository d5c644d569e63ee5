"""Quantising to a file: the same weights as quantising on loading, for every architecture; readable by others; safe on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helexa_engine import presets
from helexa_engine.errors import InvalidRequest, ModelDoesNotFit, UnsupportedCheckpoint
from helexa_engine.models.config import ModelConfig
from helexa_engine.models.decoder import Decoder
from helexa_engine.models.registry import model_class
from helexa_engine.runtime.quantize_model import quantize_model
from helexa_engine.text.tokenizer import Tokenizer
from helexa_engine.weights import loader, quantized_file
from helexa_engine.weights.checkpoint import open_checkpoint
from helexa_engine.weights.gguf import GGUFFile
from helexa_engine.weights.gguf_writer import GGUFWriter

from ..models.sessions import Session
from .quantisable import ARCHITECTURES, write_folder

Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return cache(lambda architecture: write_folder(tmp_path_factory.mktemp("hf") / architecture, architecture))


def load(path: Path, quant: str | None = None) -> Decoder:
    with open_checkpoint(path) as checkpoint:
        if quant is not None:
            checkpoint.tile_value_heads()
        config = ModelConfig.from_checkpoint(checkpoint.architecture, checkpoint.config, checkpoint.where)
        model = model_class(checkpoint.architecture, checkpoint.where)(config, 128)
        loader.load(model, checkpoint, quant=quant)
    return model


def logits(model: Decoder) -> torch.Tensor:
    ids = torch.randint(0, 380, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    return Session(model).feed(ids)


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q8_0"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_file_equals_quantising_on_loading(folders: Folders, tmp_path: Path, architecture: str, quant: str) -> None:
    path = tmp_path / "m.gguf"
    made = quantize_model(folders(architecture), path, quant, name="tiny")
    assert made.nbytes == path.stat().st_size
    file, folder = load(path), load(folders(architecture), quant)
    expected = logits(folder)
    assert expected.std() > 0.1
    assert torch.equal(logits(file), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_unquantised_files_hold_the_weights(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    # The twin keeps activations in float32: rounded to bfloat16 they would turn the other order of sums into whole bits.
    monkeypatch.setenv("HELEXA_OPS", "quant_matmul=reference")
    path = tmp_path / "m.gguf"
    quantize_model(folders(architecture), path, "BF16", name="tiny")
    expected = logits(load(folders(architecture)))
    # Value heads, and with them columns, are summed in another order.
    assert (logits(load(path)) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_quantising_a_gguf_equals_quantising_its_folder(folders: Folders, tmp_path: Path, architecture: str) -> None:
    """And the gguf package reads both, with the shapes and types that the mix says."""
    plain, direct, over = tmp_path / "plain.gguf", tmp_path / "direct.gguf", tmp_path / "over.gguf"
    quantize_model(folders(architecture), plain, "BF16", name="tiny")
    quantize_model(folders(architecture), direct, "Q4_K_M", name="tiny")
    quantize_model(plain, over, "Q4_K_M", name="not used")
    assert over.read_bytes() == direct.read_bytes()
    reader = gguf.GGUFReader(direct)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    originals = {tensor.name: tensor for tensor in gguf.GGUFReader(plain).tensors}
    assert stored.keys() == originals.keys()
    kinds = set()
    for name, tensor in stored.items():
        kinds.add(tensor.tensor_type.name)
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        original = gguf.quants.dequantize(originals[name].data, originals[name].tensor_type)
        assert ((value - original) ** 2).sum() <= 0.01 * (original**2).sum(), name
        if name.endswith(("norm.weight", "ssm_a", "ssm_dt.bias", "ssm_conv1d.weight", "ffn_gate_inp.weight")):
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
    assert kinds == {"F32", "Q4_K", "Q6_K"}
    assert reader.get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert reader.get_field("general.name").contents() == "tiny"


def test_text_survives(folders: Folders, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    quantize_model(folders("qwen35"), path, "Q8_0", name="tiny")
    with open_checkpoint(path) as file, open_checkpoint(folders("qwen35")) as folder:
        assert file.metadata is not None
        ours, theirs = Tokenizer.from_gguf(file.metadata), Tokenizer.from_folder(folder.path)
        assert file.chat_template == folder.chat_template
        assert file.config["value_head_order"] == "tiled"
        assert file.config["rms_norm_eps"] == pytest.approx(folder.config["rms_norm_eps"])
        for key in ("head_dim", "linear_num_value_heads", "layer_types", "tie_word_embeddings"):
            assert file.config[key] == folder.config[key]
    text = 'The quick brown fox <|im_start|> jümps\n\n 12345 <think>你好</think> {"name": 1}'
    for special in (False, True):
        assert ours.encode(text, allow_special=special) == theirs.encode(text, allow_special=special)
    assert ours.eos_token_ids == theirs.eos_token_ids and ours.pad_token_id == theirs.pad_token_id
    assert ours.vocab_size == theirs.vocab_size + 4, "the table's surplus rows are padding"
    assert ours.token_bytes(theirs.vocab_size + 1) == b""


def add_mtp(folder: Path, copy: Path, without: str = "") -> Path:
    """The folder of a hybrid with the tensors of an MTP block, which has the shapes of its last block, and one of a vision encoder."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    hidden = tensors["model.norm.weight"].shape[0]
    mtp = {
        name.replace("model.layers.3.", "mtp.layers.0."): values.flip(0).contiguous()
        for name, values in tensors.items()
        if name.startswith("model.layers.3.")
    }
    mtp["mtp.fc.weight"] = torch.randn(hidden, 2 * hidden, generator=torch.Generator().manual_seed(3)).bfloat16()
    for i, name in enumerate(("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")):
        mtp[f"mtp.{name}.weight"] = torch.full((hidden,), 0.25 * i).bfloat16()
    if without:
        del mtp[without]
    vision = {"model.visual.blocks.0.norm1.weight": torch.zeros(8)}
    save_file(tensors | mtp | vision, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("architecture", ["qwen3next", "qwen35", "qwen35moe"])
def test_the_block_that_predicts_a_further_token_is_kept(folders: Folders, tmp_path: Path, architecture: str) -> None:
    """As llama.cpp's converter keeps it: one more block, and ``nextn`` beside it."""
    source, path = add_mtp(folders(architecture), tmp_path / "folder"), tmp_path / "m.gguf"
    made = quantize_model(source, path, "Q4_K_M", name="tiny")
    assert made.left_out == {"vision": 1}
    quantize_model(source, tmp_path / "plain.gguf", "BF16", name="tiny")
    quantize_model(tmp_path / "plain.gguf", tmp_path / "over.gguf", "Q4_K_M", name="tiny")
    assert (tmp_path / "over.gguf").read_bytes() == path.read_bytes()
    reader = gguf.GGUFReader(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    last = {name.removeprefix("blk.3."): tuple(t.shape) for name, t in stored.items() if name.startswith("blk.3.")}
    mtp = {name.removeprefix("blk.4."): tuple(t.shape) for name, t in stored.items() if name.startswith("blk.4.")}
    assert last.items() <= mtp.items()
    assert mtp.keys() - last.keys() == {
        f"nextn.{name}.weight" for name in ("eh_proj", "enorm", "hnorm", "shared_head_norm")
    }
    assert stored["blk.4.nextn.eh_proj.weight"].tensor_type == gguf.GGMLQuantizationType.Q4_K
    for name, value in (("enorm", 1.0), ("hnorm", 1.25), ("shared_head_norm", 1.5)):
        np.testing.assert_array_equal(stored[f"blk.4.nextn.{name}.weight"].data, np.float32(value))
    plain = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "plain.gguf").tensors}
    np.testing.assert_array_equal(
        plain["blk.4.attn_k_norm.weight"], plain["blk.3.attn_k_norm.weight"][::-1], "the norms' 1 is folded in"
    )
    field = {key.partition(".")[2]: value.contents() for key, value in reader.fields.items()}
    assert field["block_count"] == 5 and field["nextn_predict_layers"] == 1
    if "attention.recurrent_layers" in field:
        assert field["attention.recurrent_layers"] == [True, True, True, False, False]
    assert {raw.name for raw in open_checkpoint(path).unused["MTP"]} == {f"blk.4.{name}" for name in mtp}
    assert logits(load(path)).isfinite().all()
    quantize_model(source, path, "Q8_0", name="tiny")  # no mix in which blocks are counted
    assert torch.equal(logits(load(path)), logits(load(folders(architecture), "Q8_0")))


@pytest.mark.parametrize(
    "without", ["fc", "layers.0.self_attn.k_norm", "layers.0.mlp.gate", "layers.0.mlp.experts.2.up_proj"]
)
def test_a_block_that_is_not_whole_is_left_out_and_counted(folders: Folders, tmp_path: Path, without: str) -> None:
    source = add_mtp(folders("qwen35moe"), tmp_path / "folder", without=f"mtp.{without}.weight")
    made = quantize_model(source, tmp_path / "m.gguf", "Q8_0", name="tiny")
    with open_checkpoint(source) as checkpoint:
        assert made.left_out == {"MTP": len(checkpoint.unused["MTP"]), "vision": 1}
    with_none = quantize_model(folders("qwen35moe"), tmp_path / "none.gguf", "Q8_0", name="tiny")
    assert with_none.left_out == {}
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "none.gguf").read_bytes()


def test_quantising_on_loading_counts_no_block_that_it_does_not_run(folders: Folders, tmp_path: Path) -> None:
    source, path = add_mtp(folders("qwen35"), tmp_path / "folder"), tmp_path / "m.gguf"
    made = quantize_model(source, path, "Q4_K_M", name="tiny", keep_mtp=False)
    assert made.left_out["MTP"] > 10
    assert torch.equal(logits(load(path)), logits(load(source, "Q4_K_M")))


def test_what_a_model_does_not_read_is_kept(tmp_path: Path) -> None:
    source, path, patch = tmp_path / "m.gguf", tmp_path / "q.gguf", np.ones((4, 32), np.float32)
    presets.write_preset_gguf(tmp_path / "plain.gguf", "qwen3-tiny", "BF16")
    plain = GGUFFile(tmp_path / "plain.gguf")
    with GGUFWriter(source, alignment=64) as writer:
        for key, stored in plain.stored_metadata.items():
            writer.copy_metadata(key, stored)
        writer.add_metadata("general.note", [[1, 2], [3]], "uint16")
        for tensor in plain.tensors.values():
            writer.add_tensor(tensor.name, tensor.quant_type, tensor.shape, tensor.data)
        writer.add_tensor("v.patch_embd.weight", quantized_file.types.F32, patch.shape, patch)
    quantize_model(source, path, "Q4_0", name="m")
    made = GGUFFile(path)
    np.testing.assert_array_equal(made.tensors["v.patch_embd.weight"].data.view(np.float32).reshape(4, 32), patch)
    assert bytes(made.stored_metadata["general.note"]) == bytes(GGUFFile(source).stored_metadata["general.note"])
    assert "general.alignment" not in made.metadata


def test_quantised_weights_are_taken_only_when_allowed(tmp_path: Path) -> None:
    source, path = tmp_path / "m.gguf", tmp_path / "q.gguf"
    presets.write_preset_gguf(source, "qwen3-tiny", "Q8_0")
    with pytest.raises(InvalidRequest, match="quantised already .*Q8_0.*--allow-requantize"):
        quantize_model(source, path, "Q4_K_M", name="m")
    assert not path.exists()
    made = quantize_model(source, path, "Q4_K_M", name="m", allow_requantize=True)
    assert {"Q4_K", "Q6_K"} <= made.types.keys() and "Q8_0" not in made.types
    assert quantize_model(source, path, "Q8_0", name="m").types.keys() == {"Q8_0", "F32"}, "nothing changes"


def test_a_failure_leaves_nothing(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, path = tmp_path / "broken", tmp_path / "out" / "m.gguf"
    path.parent.mkdir()
    shutil.copytree(folders("qwen3"), broken)
    tensors = load_file(broken / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    tensors[name][5, 7] = float("inf")
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(UnsupportedCheckpoint, match=f"{name}.*NaN or infinite"):
        quantize_model(broken, path, "Q4_K_M", name="m")
    del tensors[name]
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(UnsupportedCheckpoint, match=f"missing: {name}"):
        quantize_model(broken, path, "Q4_K_M", name="m")
    monkeypatch.setattr(quantized_file.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ModelDoesNotFit, match="the disk of"):
        quantize_model(folders("qwen3"), path, "Q4_K_M", name="m")
    assert not list(path.parent.iterdir())


def test_refusals(folders: Folders, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(InvalidRequest, match="type: expected one of .*Q4_K_M"):
        quantize_model(folders("qwen3"), path, "Q4_KM", name="m")
    folder = tmp_path / "folder"
    shutil.copytree(folders("qwen3moe"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"norm_topk_prob": False}))
    with pytest.raises(UnsupportedCheckpoint, match="norm_topk_prob is false"):
        quantize_model(folder, path, "Q8_0", name="m")
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UnsupportedCheckpoint, match="no name that helexa knows for the pre-tokenizer"):
        quantize_model(folder, path, "Q8_0", name="m")
    assert not path.exists()
