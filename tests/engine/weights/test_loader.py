"""Filling a model: every parameter once, as planned, the file's memory given back behind it, and nothing of a file that does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from helexa_engine.errors import InvalidRequest, UnsupportedCheckpoint
from helexa_engine.presets import write_preset_gguf
from helexa_engine.quant import types
from helexa_engine.testing.checkpoints import write_folder
from helexa_engine.weights import loader
from helexa_engine.weights.checkpoint import Checkpoint, open_checkpoint
from helexa_engine.weights.raw_tensor import RawTensor


class Slot:
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.loaded: list[RawTensor] = []
        self.mapped: list[RawTensor] = []

    def load(self, raw: RawTensor) -> None:
        self.loaded.append(raw)

    def map(self, raw: RawTensor) -> None:
        self.mapped.append(raw)


class Model:
    """Wants what the checkpoint has, in the order of its names."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.slots = {name: Slot(checkpoint.tensor(name).shape) for name in sorted(checkpoint.tensor_names())}

    def parameters_wanted(self) -> dict[str, Slot]:
        return self.slots


@pytest.fixture(scope="module")
def moe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loader") / "moe.gguf"
    write_preset_gguf(path, "qwen3-moe-tiny", "F16")
    return path


@pytest.fixture
def checkpoint(moe_file: Path) -> Iterator[Checkpoint]:
    with open_checkpoint(moe_file) as opened:
        yield opened


@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}, {"quant": "Q8_0"}, {"mmap_experts": True}], ids=str)
def test_what_is_loaded_is_what_was_planned(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    model, released, told = Model(checkpoint), [], []
    monkeypatch.setattr(checkpoint, "release", released.append)
    loader.load(model, checkpoint, progress=lambda stage, share: told.append((stage, share)), **settings)  # type: ignore[arg-type]
    planned = {tensor.name: tensor for tensor in loader.loaded_tensors(checkpoint, **settings)}  # type: ignore[arg-type]
    assert planned.keys() == model.slots.keys()
    for name, slot in model.slots.items():
        (raw,) = slot.mapped if planned[name].mapped else slot.loaded
        assert len(slot.mapped) + len(slot.loaded) == 1
        assert (raw.shape, raw.nbytes) == (planned[name].shape, planned[name].nbytes), name
        assert raw.quant_type is planned[name].quant_type, name
    assert released == list(model.slots), "each behind its own loading"
    shares = [share for _, share in told]
    assert {stage for stage, _ in told} == {"loading weights"}
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1.0)
    assert any(tensor.mapped for tensor in planned.values()) == ("mmap_experts" in settings)


def test_nothing_is_loaded_of_a_file_that_does_not_fit(checkpoint: Checkpoint) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    for change, words in (
        ({"no.such.weight": Slot((1,))}, "1 tensors are missing: no.such.weight"),
        ({name: Slot((3, 4))}, rf"tensor '{name}'.*: expected shape \[3, 4\], got"),
    ):
        model = Model(checkpoint)
        model.slots |= change
        with pytest.raises(UnsupportedCheckpoint, match=words):
            loader.load(model, checkpoint)
        assert not any(slot.loaded for slot in model.slots.values())
    model = Model(checkpoint)
    del model.slots[name]
    with pytest.raises(UnsupportedCheckpoint, match=f"1 tensors are not part of qwen3moe: {name}"):
        loader.load(model, checkpoint)


def test_settings_that_make_no_sense_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = Model(checkpoint)
    with pytest.raises(InvalidRequest, match="dtype: expected auto, float32, float16, bfloat16; got 'int8'"):
        loader.load(model, checkpoint, dtype="int8")
    with pytest.raises(InvalidRequest, match="quant: expected one of .*; got 'Q9'"):
        loader.load(model, checkpoint, quant="Q9")
    with pytest.raises(InvalidRequest, match="mmap_experts: the experts stay as the file has them, in F16"):
        loader.expert_names(checkpoint, dtype="float32")
    with (
        open_checkpoint(write_folder(tmp_path / "folder", "qwen3moe")) as folder,
        pytest.raises(InvalidRequest, match="mmap_experts: expected a GGUF file"),
    ):
        loader.expert_names(folder)


def test_values_are_converted_and_keep_their_scales() -> None:
    values = np.linspace(-2, 2, 64, dtype=np.float32).reshape(2, 32)
    raw = RawTensor("w", types.F32, (2, 32), values.reshape(-1).view(np.uint8), scales=(0.5,))
    half = loader.convert(raw, "float16")
    assert half.quant_type is types.F16 and half.scales == (0.5,)
    np.testing.assert_array_equal(half.values(), values.astype(np.float16).astype(np.float32))
    assert loader.convert(raw, "auto") is raw and loader.convert(raw, "float32") is raw
    coded = RawTensor("w", types.Q8_0, (2, 32), np.zeros(68, np.uint8))
    assert loader.convert(coded, "float32") is coded
    double = RawTensor("w", types.F64, (2, 32), values.astype(np.float64).reshape(-1).view(np.uint8))
    np.testing.assert_array_equal(loader.convert(double, "auto").values(), values)
