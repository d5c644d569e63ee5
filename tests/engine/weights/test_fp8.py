"""Checkpoints of 8-bit floats: the values of torch's own float8_e4m3fn times their scales, and clear refusals of all else."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helexa_engine.errors import UnsupportedCheckpoint
from helexa_engine.quant import types
from helexa_engine.testing.checkpoints import TINY, write_folder
from helexa_engine.weights import loader
from helexa_engine.weights.checkpoint import open_checkpoint
from helexa_engine.weights.fp8 import E4M3_VALUES, Fp8Scheme
from helexa_engine.weights.raw_tensor import RawTensor

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
CHANNELS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
}


def quantised(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 [out, in], scales [ceil(out / b0), ceil(in / b1)]) with the largest value of each block on e4m3's largest, 448."""
    rows, cols = weight.shape
    grid = -(-rows // block[0]), -(-cols // block[1])
    padded = torch.zeros(grid[0] * block[0], grid[1] * block[1])
    padded[:rows, :cols] = weight
    blocks = padded.reshape(grid[0], block[0], grid[1], block[1])
    scales = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / 448
    codes = (blocks / scales[:, None, :, None]).reshape(padded.shape)[:rows, :cols]
    return codes.to(torch.float8_e4m3fn), scales


def decoded(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    each = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: codes.shape[0], : codes.shape[1]]
    return (codes.float() * each).to(torch.bfloat16)


def write_both(
    folder: Path, architecture: str = "qwen3", kind: str = "block", config: dict[str, Any] = FP8, **changes: Any
) -> tuple[Path, Path]:
    """(a folder of 8-bit floats, the same values in bfloat16)."""
    plain = write_folder(folder / "plain", architecture, **changes)
    coded = write_folder(folder / "fp8", architecture, **changes)
    tensors = load_file(plain / "model.safetensors")
    as_codes: dict[str, torch.Tensor] = {}
    as_values: dict[str, torch.Tensor] = {}
    for name, weight in tensors.items():
        is_matrix = weight.ndim == 2 and name.endswith("_proj.weight") and "linear_attn.in_proj_b" not in name
        if not is_matrix:
            as_codes[name] = as_values[name] = weight.to(torch.bfloat16)
            continue
        block = {"block": (128, 128), "channel": (1, weight.shape[1]), "tensor": tuple(weight.shape)}[kind]
        codes, scales = quantised(weight, block)
        as_codes[name], as_values[name] = codes, decoded(codes, scales, block)
        if kind == "block":
            as_codes[f"{name}_scale_inv"] = scales
        else:
            as_codes[f"{name}_scale"] = scales if kind == "channel" else scales.reshape(())
    save_file(as_codes, coded / "model.safetensors")
    save_file(as_values, plain / "model.safetensors")
    settings = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    return coded, plain


def edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_the_codes_are_those_of_torch() -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(E4M3_VALUES, expected)


@pytest.mark.parametrize(
    ("architecture", "kind", "config"),
    [("qwen3", "channel", CHANNELS), ("qwen3", "tensor", CHANNELS), *((name, "block", FP8) for name in TINY)],
)
def test_values_equal_the_same_checkpoint_in_bfloat16(
    tmp_path: Path, architecture: str, kind: str, config: dict[str, Any]
) -> None:
    coded, plain = write_both(tmp_path, architecture, kind, config)
    with open_checkpoint(coded) as ours, open_checkpoint(plain) as theirs:
        assert sorted(ours.tensor_names()) == sorted(theirs.tensor_names())
        for name in ours.tensor_names():
            mine, other = ours.tensor(name), theirs.tensor(name)
            assert (mine.quant_type, mine.shape) == (other.quant_type, other.shape), name
            np.testing.assert_array_equal(mine.data, other.data, err_msg=name)
        for settings in ({}, {"dtype": "float32"}, {"quant": "Q4_K_M"}):
            assert set(loader.loaded_tensors(ours, **settings)) == set(loader.loaded_tensors(theirs, **settings))


def test_odd_shapes_end_in_part_of_a_block(tmp_path: Path) -> None:
    coded, plain = write_both(tmp_path, intermediate_size=200, hidden_size=320)
    with open_checkpoint(coded) as ours, open_checkpoint(plain) as theirs:
        name = "model.layers.0.mlp.down_proj.weight"
        assert ours.tensor(name).shape == (320, 200) and ours.tensor(name).quant_type is types.BF16
        np.testing.assert_array_equal(ours.tensor(name).data, theirs.tensor(name).data)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "awq", "bits": 4}, "'awq' are not supported; take the original checkpoint.*or a GGUF file"),
        ({"quant_method": "gptq", "bits": 4}, "'gptq' are not supported; take the original checkpoint"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes' are not supported"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            r"'compressed-tensors' \(pack-quantized\)",
        ),
        (FP8 | {"fmt": "e5m2"}, r"'fp8' \(e5m2\) are not supported"),
        (FP8 | {"weight_block_size": [128, 0]}, "weight_block_size: expected two positive numbers"),
        (FP8 | {"weight_block_size": [128, True]}, "weight_block_size: expected two positive numbers"),
        (FP8 | {"weight_block_size": [2**70, 128]}, "weight_block_size: expected two positive numbers"),
        (FP8 | {"weight_block_size": []}, "weight_block_size: expected two positive numbers"),
        (FP8 | {"weight_block_size": None}, r"scales of shape \[\d+, \d+\] do not fit .*, one a row or one in all"),
        (CHANNELS, "without its scales|one a row or one in all"),
        ({"fmt": "e4m3"}, "quantization_config: quant_method is missing"),
        ("fp8", "quantization_config: expected an object"),
        (FP8 | {"weight_block_size": [64, 64]}, r"scales of shape \[\d+, \d+\] do not fit a matrix"),
    ],
)
def test_refusals_name_what_to_take_instead(tmp_path: Path, config: Any, words: str) -> None:
    coded, _ = write_both(tmp_path, config=config)
    with pytest.raises(UnsupportedCheckpoint, match=words):
        open_checkpoint(coded)


def test_missing_and_wrong_scales_are_named(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    coded, _ = write_both(tmp_path)
    for value in (float("nan"), float("inf"), 1e38):  # the last overflows with the largest code
        edit(coded, lambda tensors, value=value: tensors[f"{name}_scale_inv"].fill_(value))
        with open_checkpoint(coded) as checkpoint, pytest.raises(UnsupportedCheckpoint, match=f"{name}_scale_inv.*NaN"):
            _ = checkpoint.tensor(name).data
    edit(coded, lambda tensors: tensors.pop(f"{name}_scale_inv"))
    with pytest.raises(UnsupportedCheckpoint, match=rf"{name}.*without its scales \({name}_scale_inv\)"):
        open_checkpoint(coded)
    coded, _ = write_both(tmp_path / "again")
    settings = json.loads((coded / "config.json").read_text())
    del settings["quantization_config"]
    (coded / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UnsupportedCheckpoint, match="8-bit floats without quantization_config"):
        open_checkpoint(coded)


@pytest.mark.parametrize("kind", ["channel", "tensor"])
def test_scales_of_another_kind_than_the_config_says_are_named(tmp_path: Path, kind: str) -> None:
    """One scale in all is also what a truncated grid of them may look like: it is not taken for more than the config says."""
    coded, _ = write_both(tmp_path, kind=kind)
    with pytest.raises(
        UnsupportedCheckpoint, match=r"_proj.weight_scale'.*in blocks of \[128, 128\] \(weight_block_size\)"
    ):
        open_checkpoint(coded)


@pytest.mark.parametrize(
    ("dtype", "words"),
    [(torch.float8_e4m3fn, "expected scales of 16, 32 or 64 bits, got 8-bit floats"), (torch.int32, "dtype I32")],
)
def test_scales_of_a_wrong_type_are_named(tmp_path: Path, dtype: torch.dtype, words: str) -> None:
    name = "model.layers.1.mlp.up_proj.weight_scale_inv"
    coded, _ = write_both(tmp_path)
    edit(coded, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(UnsupportedCheckpoint, match=f"{name}'.*{words}"):
        open_checkpoint(coded)


def test_blocks_larger_than_the_matrix_take_no_memory() -> None:
    codes = RawTensor("m", types.I8, (4, 8), np.arange(32, dtype=np.uint8), ("m",))
    scale = RawTensor("m_scale_inv", types.F32, (1, 1), np.array([0.5], np.float32).view(np.uint8), ("m_scale_inv",))
    tracemalloc.start()
    made = Fp8Scheme((2**24, 2**24)).dequantized(codes, scale, "here")
    np.testing.assert_array_equal(made.values().reshape(-1), E4M3_VALUES[:32] / 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
