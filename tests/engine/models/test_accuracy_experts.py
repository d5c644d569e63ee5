"""The accuracy bar of the families with experts; what is measured, and why, is said in ``test_accuracy``.

Rounding shows here mostly where it changes which expert a token goes to, so a single model says little: every family is held with
several seeds. The float32 path is held to HuggingFace. The quantised files are held to the float32 path on the same weights, as the
``gguf`` package dequantises them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helexa_engine import LLM
from helexa_engine.ops.registry import native_core
from helexa_engine.quant import mixes, types
from helexa_engine.testing.checkpoints import write_folder, write_gguf
from helexa_engine.weights.gguf import GGUFFile
from helexa_engine.weights.gguf_writer import GGUFWriter

from .test_accuracy import NUM_TOKENS, Bar, nmse

BARS = {
    "qwen3moe": Bar(float32=1e-6, bf16=1.1e-3, q8_0=2.7e-3, q4_k_m=3.4e-3),
    "qwen3next": Bar(float32=1e-6, bf16=9.3e-4, q8_0=8.6e-3, q4_k_m=1.5e-2),
    "qwen35moe": Bar(float32=1e-6, bf16=3.3e-4, q8_0=4.8e-3, q4_k_m=7.1e-3),
}
SEEDS = (0, 1)
MIXES = ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS")
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4, "num_hidden_layers": 4}


def token_ids(seed: int) -> list[int]:
    return torch.randint(0, 390, (NUM_TOKENS,), generator=torch.Generator().manual_seed(seed)).tolist()


def computed(path: Path, seed: int) -> torch.Tensor:
    with LLM(path, max_model_len=256, max_num_seqs=1) as llm:
        return llm.logits(token_ids(seed)).double()


def write_dequantised(source: Path, path: Path) -> Path:
    """The same file with every tensor as the float32 values that the ``gguf`` package reads in it."""
    metadata = {k: list(v) if isinstance(v, Sequence | np.ndarray) and not isinstance(v, str) else v
                for k, v in GGUFFile(source).metadata.items()}  # fmt: skip
    with GGUFWriter(path, metadata) as writer:
        for tensor in gguf.GGUFReader(source).tensors:
            values = np.ascontiguousarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
            shape = tuple(int(n) for n in reversed(tensor.shape))
            writer.add_tensor(tensor.name, types.F32, shape, values)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    root = tmp_path_factory.mktemp("experts")
    return cache(
        lambda architecture, seed: write_folder(root / f"{architecture}-{seed}", architecture, seed=seed, **EXPERTS)
    )


@pytest.mark.parametrize("architecture", BARS)
def test_the_float32_path_is_huggingfaces(
    folder: Callable[[str, int], Path], tmp_path: Path, architecture: str
) -> None:
    source = folder(architecture, 0)
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        truth = theirs(torch.tensor([token_ids(0)])).logits[0].double()
    error = nmse(computed(write_gguf(source, tmp_path / "f32.gguf"), 0), truth)
    print(f"{architecture} F32: {error:.3g}")
    assert 0 < error <= BARS[architecture].float32


@pytest.mark.skipif(native_core() is None, reason="the twins multiply in float32 whatever the type")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("architecture", BARS)
def test_logits_of_a_file_meet_the_bar_of_its_type(
    folder: Callable[[str, int], Path], tmp_path: Path, architecture: str, mix: str, seed: int
) -> None:
    chosen = mixes.by_name(mix)
    assert chosen is not None
    path = write_gguf(folder(architecture, seed), tmp_path / "file.gguf", chosen)
    truth = computed(write_dequantised(path, tmp_path / "truth.gguf"), seed)
    error = nmse(computed(path, seed), truth)
    print(f"{architecture} {mix} {seed}: {error:.3g}")
    assert 0 < error <= BARS[architecture].of(mix)


def test_a_wrong_expert_breaks_the_bar(folder: Callable[[str, int], Path], tmp_path: Path) -> None:
    """Two of sixteen experts exchanged in one matrix of one layer of four."""
    path = write_gguf(folder("qwen3moe", 0), tmp_path / "file.gguf", mixes.MIXES["Q8_0"])
    truth = computed(path, 0)
    record = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.3.ffn_up_exps.weight")
    content = np.fromfile(path, np.uint8)
    experts = content[record.data_offset : record.data_offset + record.n_bytes].reshape(EXPERTS["num_experts"], -1)
    experts[[0, 1]] = experts[[1, 0]]
    content.tofile(tmp_path / "exchanged.gguf")
    assert nmse(computed(tmp_path / "exchanged.gguf", 0), truth) > BARS["qwen3moe"].q8_0
