"""A plan for CUDA is what a load there takes, and can be made where there is no card."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helexa_engine import LLM, SamplingParams
from helexa_engine.architectures import ARCHITECTURES
from helexa_engine.cache.spec import AttentionCache, StateCache
from helexa_engine.cli import main
from helexa_engine.config import EngineConfig
from helexa_engine.errors import BackendUnavailable, InvalidRequest, ModelDoesNotFit
from helexa_engine.layers.moe import SparseMoe
from helexa_engine.layers.weight import FloatParameter
from helexa_engine.ops import cuda
from helexa_engine.presets import write_preset_gguf
from helexa_engine.quant import mixes
from helexa_engine.runtime import cuda_facts
from helexa_engine.runtime.cuda_facts import CudaDevice, CudaFacts
from helexa_engine.runtime.load import load_model
from helexa_engine.runtime.memory import graph_sizes
from helexa_engine.runtime.model_runner import ModelRunner
from helexa_engine.runtime.plan import ModelPlan, plan_model
from helexa_engine.testing.checkpoints import write_folder, write_gguf
from helexa_engine.testing.cuda_core import emulated_cuda
from helexa_engine.weights.checkpoint import open_checkpoint

from .test_workspace import LiveBytes, counted

GIB = 2**30


@pytest.fixture
def emulated(simt: Any) -> Iterator[None]:
    with emulated_cuda():
        yield


def planned(path: Path, config: EngineConfig, **options: Any) -> ModelPlan:
    with open_checkpoint(path) as checkpoint:
        return plan_model(checkpoint, config, name=path.stem, **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of every architecture a file in a mix of K quants."""
    root = tmp_path_factory.mktemp("plan")
    return {
        architecture: write_gguf(
            write_folder(root / architecture, architecture),
            root / f"{architecture}.gguf",
            mixes.MIXES["Q4_K_M"],
        )
        for architecture in ARCHITECTURES
    }


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_loaded_model_is_as_planned_byte_for_byte(
    files: dict[str, Path], emulated: None, architecture: str, graphs: bool
) -> None:
    config = EngineConfig(device="cuda", max_num_seqs=3, max_model_len=256, cuda_graphs=graphs, state_snapshots=2)
    plan = planned(files[architecture], config)
    memory = plan.memory
    loaded = load_model(files[architecture], config)
    try:
        assert (loaded.info.weight_bytes, loaded.info.kv_bytes) == (memory.weight_bytes, memory.kv_bytes)
        runner: Any = loaded.thread._engine.runner
        assert weights_of(runner.model) == memory.weight_bytes
        kv = sum(c.k.nbytes + c.v.nbytes for c in runner._caches if isinstance(c, AttentionCache))
        assert kv == memory.kv_bytes + graphs * memory.page_bytes, "one page more for rows that are nobody's"
        states = sum(
            c.conv_state.nbytes + c.recurrent_state.nbytes for c in runner._caches if isinstance(c, StateCache)
        )
        slot = memory.state_bytes // 3
        assert states == memory.state_bytes + memory.snapshot_bytes + graphs * slot
    finally:
        loaded.close(10.0)


def weights_of(model: Any) -> int:
    """What is really there."""
    total = 0
    for layer in model.layers:
        if isinstance(layer.feed_forward, SparseMoe):
            layer.feed_forward._pack()
            total += layer.feed_forward._router.weight.nbytes
    for name, slot in model.parameters_wanted().items():
        if isinstance(slot, FloatParameter):  # the router is packed, with the shared expert's gate in it
            total += slot.get().nbytes if slot.value is not None and "shared_expert_gate" not in name else 0
        else:
            total += slot.packed.nbytes
    return total


@pytest.mark.parametrize("preset", ["qwen3-tiny", "qwen3.5-tiny", "qwen3-moe-tiny"])
def test_the_largest_steps_take_no_more_than_planned(
    preset: str, emulated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"{preset}.gguf"
    write_preset_gguf(path, preset, "Q8_0")
    config = EngineConfig(
        device="cuda", max_model_len=256, max_num_seqs=2, max_num_batched_tokens=66, prefix_cache=False
    )
    plan = planned(path, config)
    scratch = plan.memory.page_bytes + plan.memory.state_bytes // 2
    live = LiveBytes()
    for name in ("forward", "logits"):
        monkeypatch.setattr(ModelRunner, name, counted(getattr(ModelRunner, name), live))
    with LLM.of(load_model(path, config)) as llm:
        greedy = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        llm.generate([[7, 8, 9]] * 2, greedy)
        llm.generate([[5] * 33] * 2, greedy)
    assert live.rows == 66, "no step was as large as a step may be"
    workspace = plan.memory.workspace_bytes - scratch
    print(f"{preset}: planned {workspace}, taken {live.peak}")
    assert live.peak <= workspace


@pytest.fixture(scope="module")
def preset_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preset") / "tiny.gguf"
    write_preset_gguf(path, "qwen3.5-tiny", "Q4_K_M")
    return path


def test_a_plan_needs_no_card_and_no_kernels(
    preset_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_compiled", lambda: None)
    arguments = ["plan", str(preset_file), "--device", "cuda", "--free-memory", "2GiB"]
    assert main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["device"], facts["kv_dtype"], facts["available_bytes"]) == ("cuda", "bfloat16", 2 * GIB)
    assert facts["total_bytes"] <= facts["budget_bytes"]
    assert {choice["implementation"] for choice in facts["kernels"].values()} == {"cuda"}
    assert facts["instruction_set"] is None
    assert main(arguments) == 0
    assert "cuda, 2.00 GiB free" in capsys.readouterr().out


def test_it_brings_no_torch(preset_file: Path) -> None:
    program = (
        "import sys\nfrom helexa_engine.cli import main\n"
        f"assert main(['plan', {str(preset_file)!r}, '--device', 'cuda', '--free-memory', '2GiB']) == 0\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "False"


def test_a_model_that_does_not_fit_names_the_device(preset_file: Path) -> None:
    with pytest.raises(ModelDoesNotFit, match="but cuda has 0.00 GiB free") as caught:
        planned(preset_file, EngineConfig(device="cuda"), available=1_000_000)
    assert caught.value.facts["device"] == "cuda"


def test_bad_sizes_are_refused(preset_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(preset_file), "--free-memory", "much"]) != 0
    assert "--free-memory: expected a size such as 80GiB, got 'much'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mmap_experts": True}, "mmap_experts: expected false on cuda"),
        ({"kv_dtype": "float16"}, "kv_dtype: keys and values on cuda are stored as bfloat16 or q8_0, not as float16"),
    ],
)
def test_what_cuda_does_not_do_is_refused(preset_file: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        planned(preset_file, EngineConfig(device="cuda", **config), available=GIB)


def test_what_has_no_kernel_is_refused_or_runs_on_the_cpu(
    preset_file: Path, emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No twin stands in for a kernel that is missing: it could not read what lies on a card."""
    from helexa_engine.runtime import plan as module

    monkeypatch.setattr(module.paged_attention, "implementations", module.paged_attention.implementations[-1:])
    with pytest.raises(
        BackendUnavailable, match="no kernels for this model: paged_attention: no implementation runs on cuda"
    ):
        planned(preset_file, EngineConfig(device="cuda"))
    plan = planned(preset_file, EngineConfig(device="auto"))
    assert plan.device == "cpu" and "paged_attention" in plan.why_device
    assert planned(preset_file, EngineConfig(device="cpu")).device == "cpu"


def test_auto_takes_cuda_where_everything_is_there(preset_file: Path, emulated: None) -> None:
    plan = planned(preset_file, EngineConfig())
    assert (plan.device, plan.why_device, plan.kv_dtype) == ("cuda", "it can be used", "bfloat16")


@pytest.mark.parametrize(
    ("most", "expected"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (200, [1, 2, 4, 8, 16, 32, 64])],
)
def test_graphs_are_few(most: int, expected: list[int]) -> None:
    assert graph_sizes(most) == expected


def test_a_server_plans_for_a_card_without_torch(preset_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = CudaFacts(
        kernels=True, architectures=("90a",), runtime=13000, driver=13000, torch="2.9.0", torch_cuda="13.0",
        devices=(CudaDevice("H200", (9, 0), 140 * GIB),),
    )  # fmt: skip

    def asked() -> bool:
        raise AssertionError("torch was asked")

    monkeypatch.setattr(cuda_facts, "gather_without_device", lambda: facts)
    monkeypatch.setattr(torch.cuda, "is_available", asked)
    plan = planned(preset_file, EngineConfig(), available=2 * GIB)
    assert (plan.device, plan.memory.available_bytes) == ("cuda", 2 * GIB)
