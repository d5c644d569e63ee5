"""The plan of a load is what the load does: the same bytes, the same context, the same kernels."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from helexa_engine.architectures import ARCHITECTURES
from helexa_engine.cache.spec import AttentionCache, StateCache
from helexa_engine.config import EngineConfig
from helexa_engine.errors import InvalidRequest, UnsupportedCheckpoint
from helexa_engine.layers.linear import MatrixParameter
from helexa_engine.layers.moe import ExpertsParameter, SparseMoe
from helexa_engine.layers.weight import FloatParameter
from helexa_engine.models.decoder import Decoder
from helexa_engine.ops.registry import Op
from helexa_engine.quant import mixes
from helexa_engine.runtime import plan as plan_module
from helexa_engine.runtime.load import LoadedModel, load_model
from helexa_engine.runtime.plan import ModelPlan, plan_model
from helexa_engine.testing.checkpoints import write_folder, write_gguf
from helexa_engine.weights.checkpoint import open_checkpoint

from . import quantisable

FREE = 200 * 2**20
KINDS: dict[str, dict[str, Any]] = {
    "folder": {},
    "gguf": {},
    "quantised on loading": {"quant": "Q4_K_M", "quant_cache": False},
    "quantised into the cache": {"quant": "Q4_K_M"},
    "mapped experts": {"mmap_experts": True},
    "converted": {"dtype": "float32"},
    "quantised keys and values": {"kv_dtype": "q8_0"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(architecture, ``folder`` or ``gguf``) -> path, the matrices of a GGUF file in a mix of K quants."""
    root = tmp_path_factory.mktemp("plan")
    found = {}
    for architecture in ARCHITECTURES:
        found[architecture, "folder"] = quantisable.write_folder(root / architecture, architecture)
        small = write_folder(root / f"{architecture}-small", architecture)
        path = root / f"{architecture}.gguf"
        found[architecture, "gguf"] = write_gguf(small, path, mixes.MIXES["Q4_K_M"])
    return found


def planned(path: Path, config: EngineConfig) -> ModelPlan:
    with open_checkpoint(path) as checkpoint:
        return plan_model(checkpoint, config, name=path.stem)


@pytest.fixture
def fixed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same free memory whenever somebody looks."""
    monkeypatch.setattr(plan_module, "available_bytes", lambda: FREE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_loaded_model_is_as_planned_byte_for_byte(
    files: dict[tuple[str, str], Path], fixed_memory: None, architecture: str, kind: str
) -> None:
    path = files[architecture, "folder" if kind == "folder" or "quant" in KINDS[kind] else "gguf"]
    config = EngineConfig(max_num_seqs=3, **KINDS[kind])
    plan = planned(path, config)
    loaded = load_model(path, config)
    try:
        info, memory = loaded.info, plan.memory
        assert (info.name, info.path, info.architecture) == (plan.name, path, plan.architecture)
        assert (info.vocab_size, info.max_model_len) == (plan.config.vocab_size, memory.max_model_len)
        figures = (info.weight_bytes, info.kv_bytes, info.state_bytes, info.snapshot_bytes)
        assert figures == (memory.weight_bytes, memory.kv_bytes, memory.state_bytes, memory.snapshot_bytes)
        held = held_bytes(loaded)
        assert held["weights"] == memory.weight_bytes
        assert held["kv"] == memory.kv_bytes
        assert held["states"] == memory.state_bytes + memory.snapshot_bytes
        assert held["rotary"] <= memory.position_bytes
    finally:
        loaded.close(10.0)


def held_bytes(loaded: LoadedModel) -> dict[str, int]:
    """What is really there."""
    runner = loaded.thread._engine.runner
    model: Decoder = runner.model
    weights = 0
    for layer in model.layers:
        if isinstance(layer.feed_forward, SparseMoe):
            layer.feed_forward._pack()
            weights += nbytes(layer.feed_forward._router)
    for name, slot in model.parameters_wanted().items():
        if isinstance(slot, FloatParameter):  # the router is packed, with the shared expert's gate in it
            weights += nbytes(slot.get()) if slot.value is not None and "shared_expert_gate" not in name else 0
        else:
            assert isinstance(slot, MatrixParameter | ExpertsParameter)
            weights += slot.packed.nbytes
    caches = runner._caches
    return {
        "weights": weights,
        "kv": sum(nbytes(c.k) + nbytes(c.v) for c in caches if isinstance(c, AttentionCache)),
        "states": sum(nbytes(c.conv_state) + nbytes(c.recurrent_state) for c in caches if isinstance(c, StateCache)),
        "rotary": nbytes(model.rotary),
    }


def nbytes(value: Any) -> int:
    return value.untyped_storage().nbytes() if isinstance(value, torch.Tensor) else int(value.nbytes)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kernels_are_those_that_the_layers_choose(
    files: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    path = files[architecture, "gguf"]
    chosen: dict[str, set[str]] = {}
    choose = Op.choose

    def noted(op: Op, device: str, **facts: Any) -> ModuleType:
        module = choose(op, device, **facts)
        chosen.setdefault(op.name, set()).add(module.__name__)
        return module

    monkeypatch.setattr(Op, "choose", noted)
    for forced in ("", "quant_matmul=reference,quant_embedding=reference"):
        monkeypatch.setenv("HELEXA_OPS", forced)
        chosen.clear()
        plan = planned(path, EngineConfig())
        assert not chosen, "planning builds nothing"
        loaded = load_model(path, EngineConfig(max_model_len=64, max_num_seqs=1))
        loaded.close(10.0)
        assert {op: {choice.module} for op, choice in plan.kernels.items()} == chosen


def test_the_tokens_of_a_context_pay_for_their_angles(files: dict[tuple[str, str], Path], fixed_memory: None) -> None:
    config = EngineConfig(max_num_seqs=2)
    plan = planned(files["qwen3", "gguf"], config)
    pages = -(-plan.memory.max_model_len // 64)
    assert plan.memory.position_bytes == 4 * pages * (64 * plan.config.rotary_dim + 2)


def test_what_no_load_would_take_is_refused_as_a_load_does(files: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    path = files["qwen3", "gguf"]
    with pytest.raises(InvalidRequest, match="imatrix: expected quant beside it"):
        planned(path, EngineConfig(imatrix="weights.dat"))
    with pytest.raises(InvalidRequest, match="quant: the weights are quantised already"):
        planned(path, EngineConfig(quant="Q8_0"))
    folder = tmp_path / "llama"
    folder.mkdir()
    source = files["qwen3", "folder"]
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    config = (source / "config.json").read_text().replace('"model_type": "qwen3"', '"model_type": "llama"')
    (folder / "config.json").write_text(config)
    for refuse in (lambda: planned(folder, EngineConfig()), lambda: load_model(folder, EngineConfig())):
        with pytest.raises(UnsupportedCheckpoint, match="architecture 'llama' is not supported; helexa runs qwen3"):
            refuse()


def test_planning_brings_no_torch() -> None:
    import subprocess

    program = "import sys, helexa_engine.runtime.plan; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
