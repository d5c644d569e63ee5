"""Quantising a folder on loading: the types of the mix, near the stored values, the bytes announced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helexa_engine.errors import InvalidRequest, UnsupportedCheckpoint
from helexa_engine.presets import write_preset_gguf
from helexa_engine.quant import mixes, types
from helexa_engine.quant.dequantize import dequantize
from helexa_engine.weights import loader
from helexa_engine.weights.checkpoint import Checkpoint, open_checkpoint
from helexa_engine.weights.raw_tensor import RawTensor


class Slot:
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.tensor: RawTensor | None = None

    def load(self, raw: RawTensor) -> None:
        self.tensor = raw


class Everything:
    """Wants whatever the checkpoint has."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.slots = {raw.name: Slot(raw.shape) for raw in checkpoint.tensors}

    def parameters_wanted(self) -> dict[str, Slot]:
        return self.slots


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M", "q6_k", "IQ4_XS"])
def test_each_matrix_gets_the_type_of_the_mix(hf_folder: Path, quant: str) -> None:
    checkpoint = open_checkpoint(hf_folder)
    model = Everything(checkpoint)
    loader.load(model, checkpoint, quant=quant)
    seen = set()
    loaded_bytes = 0
    for raw in checkpoint.tensors:
        tensor = model.slots[raw.name].tensor
        assert tensor is not None and tensor.shape == raw.shape
        loaded_bytes += tensor.nbytes if len(raw.shape) > 1 else 4 * raw.shape[0]
        stored = dequantize(raw.quant_type, raw.data, raw.shape)
        values = dequantize(tensor.quant_type, tensor.data, tensor.shape)
        if len(raw.shape) == 1:
            np.testing.assert_array_equal(values, stored)
            continue
        seen.add(tensor.quant_type)
        assert tensor.quant_type.is_quantised
        assert ((values - stored) ** 2).mean() < 0.01 * (stored**2).mean()
    mix = mixes.by_name(quant)
    assert mix is not None and (mix.base in seen or seen <= {types.Q5_0, types.Q8_0, types.IQ4_NL})
    assert sum(tensor.nbytes for tensor in loader.loaded_tensors(checkpoint, quant=quant)) == loaded_bytes


def test_what_a_plain_load_takes(hf_folder: Path, gguf_file: Path) -> None:
    folder = open_checkpoint(hf_folder)
    values = sum(int(np.prod(raw.shape)) for raw in folder.tensors)
    assert sum(tensor.nbytes for tensor in loader.loaded_tensors(folder, dtype="float32")) == 4 * values
    file = open_checkpoint(gguf_file)
    assert sum(tensor.nbytes for tensor in loader.loaded_tensors(file)) <= file.nbytes


def test_an_unknown_mix_is_named(hf_folder: Path) -> None:
    checkpoint = open_checkpoint(hf_folder)
    with pytest.raises(InvalidRequest, match="quant: expected one of .*Q4_K_M.*got 'Q4_KM'"):
        loader.load(Everything(checkpoint), checkpoint, quant="Q4_KM")


def test_nan_is_not_quantised_in_silence(hf_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(hf_folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    (tmp_path / "config.json").write_bytes((hf_folder / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(UnsupportedCheckpoint, match=f"{name}.*NaN"):
        loader.load(Everything(checkpoint), checkpoint, quant="Q8_0")


def test_what_is_quantised_already_is_not_quantised_again(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_preset_gguf(path, "qwen3-tiny", "Q4_K_M")
    with pytest.raises(InvalidRequest, match="quant: the weights are quantised already"):
        loader.loaded_tensors(open_checkpoint(path), quant="Q8_0")
