"""Importance matrices: both forms, what they change in a file, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from helexa_engine import presets
from helexa_engine.errors import InvalidRequest, ModelNotFound, UnsupportedCheckpoint
from helexa_engine.quant import types
from helexa_engine.quant.dequantize import dequantize
from helexa_engine.runtime.quantize_model import quantize_model
from helexa_engine.weights import imatrix
from helexa_engine.weights.gguf import GGUFFile
from helexa_engine.weights.gguf_writer import GGUFWriter

NAME = "blk.0.ffn_gate.weight"


def squares(cols: int = 256) -> np.ndarray:
    return np.exp(1.5 * np.random.default_rng(0).standard_normal(cols)).astype(np.float32)


def write(path: Path, entries: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    """sums [matrices, cols] and counts [matrices] as llama-imatrix writes them."""
    metadata = {"general.type": "imatrix", "imatrix.datasets": ["wiki.txt"], "imatrix.chunk_count": 7}
    with GGUFWriter(path, metadata | {"imatrix.chunk_size": 512}) as writer:
        for name, (sums, counts) in entries.items():
            writer.add_tensor(f"{name}.in_sum2", types.F32, sums.shape, sums.astype(np.float32))
            writer.add_tensor(f"{name}.counts", types.F32, (len(counts), 1), counts.astype(np.float32))
    return path


def write_legacy(path: Path, name: str, values: np.ndarray, calls: int, tail: bytes = b"") -> Path:
    head = struct.pack("<ii", 1, len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
    path.write_bytes(head + (values * calls).astype("<f4").tobytes() + tail)
    return path


def test_both_forms_give_mean_squares(tmp_path: Path) -> None:
    values = squares()
    new = imatrix.read(write(tmp_path / "new.gguf", {NAME: (values[None] * 40, np.array([40.0]))}))
    tail = struct.pack("<ii", 7, 8) + b"wiki.txt"
    old = imatrix.read(write_legacy(tmp_path / "old.dat", NAME, values, 3, tail))
    assert imatrix.read(write_legacy(tmp_path / "older.dat", NAME, values, 3)).chunks == 0
    for read in (new, old):
        found = read.of(NAME, 1, 256)
        assert found is not None
        np.testing.assert_allclose(found[0], values, rtol=1e-6)
        assert (read.datasets, read.chunks) == (("wiki.txt",), 7)
        assert read.of("blk.1.ffn_gate.weight", 1, 256) is None
        with pytest.raises(InvalidRequest, match="256 importances, the tensor has 1 x 128 columns.*another model"):
            read.of(NAME, 1, 128)


def test_an_expert_that_was_never_chosen_weighs_all_columns_alike(tmp_path: Path) -> None:
    sums = np.stack([squares(), np.zeros(256, np.float32)])
    found = imatrix.read(write(tmp_path / "i.gguf", {NAME: (sums, np.array([10.0, 0.0]))})).of(NAME, 2, 256)
    assert found is not None
    np.testing.assert_allclose(found[0], sums[0] / 10, rtol=1e-6)
    np.testing.assert_array_equal(found[1], 1)


def test_it_lowers_the_weighted_error_of_the_tensor_it_names_and_changes_no_other(tmp_path: Path) -> None:
    source, values = tmp_path / "m.gguf", squares()
    presets.write_preset_gguf(source, "qwen3-tiny", "F32")
    importance = write(tmp_path / "i.gguf", {NAME: (values[None], np.array([1.0]))})
    quantize_model(source, tmp_path / "without.gguf", "Q4_K_M", name="m")
    quantize_model(source, tmp_path / "with.gguf", "Q4_K_M", name="m", importance_file=importance)
    original, without, with_it = (GGUFFile(tmp_path / f"{n}.gguf") for n in ("m", "without", "with"))

    def error(file: GGUFFile) -> float:
        decoded = dequantize(file.tensors[NAME].quant_type, file.tensors[NAME].data, original.tensors[NAME].shape)
        stored = original.tensors[NAME].data.view(np.float32).reshape(decoded.shape)
        return float((values * (decoded - stored) ** 2).sum())

    assert error(with_it) < 0.9 * error(without)
    for name, tensor in without.tensors.items():
        assert name == NAME or np.array_equal(tensor.data, with_it.tensors[name].data)
    assert with_it.metadata["quantize.imatrix.file"] == "i.gguf"
    assert with_it.metadata["quantize.imatrix.chunks_count"] == 7
    assert "quantize.imatrix.file" not in without.metadata


def test_one_of_another_model_is_refused(tmp_path: Path) -> None:
    presets.write_preset_gguf(tmp_path / "m.gguf", "qwen3-tiny", "BF16")
    importance = write(tmp_path / "i.gguf", {NAME: (np.ones((1, 320)), np.array([1.0]))})
    with pytest.raises(InvalidRequest, match="blk.0.ffn_gate.weight has 320 importances"):
        quantize_model(tmp_path / "m.gguf", tmp_path / "q.gguf", "Q4_0", name="m", importance_file=importance)
    assert not (tmp_path / "q.gguf").exists()


def test_malformed_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no importance matrix there"):
        imatrix.read(tmp_path / "none")
    whole = write_legacy(tmp_path / "old.dat", NAME, squares(), 3).read_bytes()
    for length in [*range(40), *range(40, len(whole), 97), len(whole) - 1]:
        (tmp_path / "cut.dat").write_bytes(whole[:length])
        with pytest.raises(UnsupportedCheckpoint, match="importance matrix"):
            imatrix.read(tmp_path / "cut.dat")
    write_legacy(tmp_path / "nan.dat", NAME, np.full(4, np.nan, np.float32), 1)
    with pytest.raises(UnsupportedCheckpoint, match="negative or no numbers"):
        imatrix.read(tmp_path / "nan.dat")
    presets.write_preset_gguf(tmp_path / "m.gguf", "qwen3-tiny", "Q4_0")
    with pytest.raises(UnsupportedCheckpoint, match=r"not an importance matrix: no tensor ends in \.in_sum2"):
        imatrix.read(tmp_path / "m.gguf")
    with GGUFWriter(tmp_path / "half.gguf") as writer:
        writer.add_tensor(f"{NAME}.in_sum2", types.F32, (1, 4), np.ones((1, 4), np.float32))
    with pytest.raises(UnsupportedCheckpoint, match="counts beside it"):
        imatrix.read(tmp_path / "half.gguf")
