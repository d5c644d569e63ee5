"""Every way in which CUDA cannot be used, from the facts of machines that are not this one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helexa_engine import LLM, SamplingParams
from helexa_engine.errors import BackendUnavailable
from helexa_engine.ops import cuda
from helexa_engine.runtime import cuda_device, cuda_facts
from helexa_engine.runtime.cuda_facts import CudaDevice, CudaFacts, obstacle, serving

BUILT = ("80", "86", "89", "90a", "120")
H200 = CudaDevice("NVIDIA H200", (9, 0), 141 << 30)
GOOD = CudaFacts(
    kernels=True,
    architectures=BUILT,
    runtime=13000,
    driver=13000,
    devices=(H200,),
    torch="2.11.0+cu130",
    torch_cuda="13.0",
    torch_architectures=("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"),
)


def card(major: int, minor: int) -> CudaDevice:
    return CudaDevice("card", (major, minor), 24 << 30)


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"driver": 0, "devices": (), "error": 35}, "no_driver", "no NVIDIA driver here; install one.*--gpus all"),
        ({"driver": 0, "kernels": False, "torch_cuda": None}, "no_driver", "no NVIDIA driver"),
        ({"kernels": False, "architectures": (), "runtime": 0}, "no_kernels", "nvcc.*install the CUDA toolkit"),
        ({"is_old": True, "architectures": (), "runtime": 0}, "old_core", "build it again"),
        ({"driver": 12080, "error": 35, "devices": ()}, "old_driver", r"has CUDA 12\.8.*needs 13\.0.*580 or newer"),
        ({"driver": 12080}, "old_driver", "toolkit of version 12"),
        ({"torch_cuda": None, "torch": "2.11.0+cpu"}, "torch_without_cuda", r"2\.11\.0\+cpu.*whl/cu130"),
        (
            {"driver": 12080, "runtime": 12080},
            "torch_newer_than_driver",
            r"built for CUDA 13\.0.*driver has 12\.8.*580.*whl/cu128",
        ),
        ({"error": 802, "devices": ()}, "system_not_ready", "nvidia-fabricmanager"),
        ({"error": 803, "devices": ()}, "driver_mismatch", "restart"),
        ({"error": 999, "devices": ()}, "device_unusable", "CUDA error 999.*Xid"),
        ({"error": 100, "devices": ()}, "no_device", "CUDA_VISIBLE_DEVICES"),
        ({"devices": (card(7, 5),)}, "old_device", r"7\.5.*8\.0 .Ampere. or newer.*--device cpu"),
        ({"devices": (card(10, 0),)}, "no_code", r"80 86 89 90a 120.*10\.0.*HELEXA_CUDA_ARCHITECTURES=100"),
        ({"devices": (card(12, 0),), "torch_architectures": ("sm_80", "sm_90")}, "torch_without_code", "newer CUDA"),
        # The first in the way is named, not the last.
        ({"driver": 12020, "runtime": 12080, "torch_cuda": None}, "torch_without_cuda", "whl/cu128"),
    ],
)
def test_every_obstacle_is_named_with_its_fix(changes: dict[str, object], reason: str, words: str) -> None:
    found = cuda_device.diagnose(replace(GOOD, **changes))
    assert found is not None and found.reason == reason
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(str(found))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"driver": 13020},
        {"driver": 12020, "runtime": 12080, "torch_cuda": "12.8"},  # older within the major version runs machine code
        {"devices": (card(8, 6), card(7, 5))},
        {"devices": (card(8, 7),)},
        {"devices": (card(12, 1),)},
        {"torch_architectures": ()},
        {"torch_architectures": ("sm_50", "compute_90"), "devices": (card(12, 0),)},
    ],
)
def test_nothing_is_in_the_way(changes: dict[str, object]) -> None:
    assert obstacle(replace(GOOD, **changes)) is None


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), "80"), ((8, 6), "86"), ((8, 7), "86"), ((8, 9), "89"), ((9, 0), "90a"), ((12, 1), "120")]
    + [(none, None) for none in ((7, 5), (9, 1), (10, 0), (11, 0), (13, 0))],
)
def test_machine_code_runs_within_its_major_version(capability: tuple[int, int], expected: str | None) -> None:
    assert serving(capability, BUILT) == expected


def test_ptx_runs_on_later_devices_and_what_is_no_architecture_is_none() -> None:
    assert serving((12, 0), ("sm_80", "compute_90", "gfx942")) == "compute_90"
    assert serving((8, 6), ("compute_90",)) is None


def test_a_name_that_was_asked_for_raises_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device, "gather", lambda: replace(GOOD, driver=0, devices=(), error=35))
    with pytest.raises(BackendUnavailable, match="device cuda: there is no NVIDIA driver") as caught:
        cuda_device.require_cuda()
    assert caught.value.facts == {"device": "cuda", "reason": "no_driver"}


@pytest.mark.parametrize(
    ("facts", "level", "words"),
    [
        (replace(GOOD, torch_cuda=None), "WARNING", "on cpu (not cuda: torch 2.11.0+cu130 is built without CUDA"),
        (replace(GOOD, driver=0, devices=(), error=35), "INFO", "on cpu (not cuda: there is no NVIDIA driver here"),
    ],
    ids=["idle", "none"],
)
def test_auto_takes_the_cpu_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, facts: CudaFacts, level: str, words: str
) -> None:
    monkeypatch.setattr(cuda_device, "gather", lambda: facts)
    caplog.set_level("INFO", "helexa_engine.runtime.load")
    with LLM("demo", max_model_len=128, max_num_seqs=1) as llm:
        assert llm.generate("1 + 1", SamplingParams(max_tokens=2)).token_ids
    (said,) = (record for record in caplog.records if " on cpu" in record.message)
    assert said.levelname == level and words in said.message
    with pytest.raises(BackendUnavailable, match="^device cuda: "):
        LLM("demo", device="cuda")


def test_the_facts_of_this_process_can_be_had_without_a_driver() -> None:
    facts = cuda_facts.gather()
    assert facts.kernels == (cuda.kernels() is not None)
    if facts.driver == 0:
        assert not facts.devices and obstacle(facts) is not None
    import torch

    assert (facts.torch, facts.torch_cuda) == (torch.__version__, torch.version.cuda)


def test_without_kernels_the_facts_come_from_the_drivers_own_library(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = cuda_facts.nvml
    cards = [nvml.Card(0, "NVIDIA L4", (8, 9), 24 << 30, 20 << 30)]
    monkeypatch.setattr(cuda_facts.cuda, "kernels", lambda: None)
    monkeypatch.setattr(nvml, "read", lambda: (nvml.Driver("580.95.05", 13000), cards))
    facts = cuda_facts.gather()
    assert (facts.kernels, facts.driver, facts.devices) == (False, 13000, (CudaDevice("NVIDIA L4", (8, 9), 24 << 30),))
    found = obstacle(facts)
    assert found is not None and found.reason == "no_kernels"
