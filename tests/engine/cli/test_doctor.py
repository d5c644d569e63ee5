from __future__ import annotations

import builtins
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from helexa_engine.cli import doctor, main
from helexa_engine.runtime import cuda_device, cuda_facts, nvml
from helexa_engine.runtime.cuda_facts import CudaDevice, CudaFacts

ROOT = Path(__file__).resolve().parents[3]


def findings() -> dict[str, doctor.Finding]:
    return {finding.subject: finding for finding in doctor.examine()}


def test_the_report_covers_what_models_need(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor"])
    out = capsys.readouterr().out
    for subject in (
        "python",
        "packages",
        "torch",
        "processor",
        "native core",
        "memory",
        "demo model",
        "quantised",
        "cuda",
    ):
        assert subject in out
    assert code == (1 if re.search(r"^missing", out.replace(" ", ""), re.MULTILINE) else 0)


def test_requirements_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {f"{name}>={oldest}" for name, oldest in doctor.REQUIREMENTS.items()} == set(project["dependencies"])


@pytest.mark.parametrize(
    ("version", "expected"), [("2.13.0+cpu", (2, 13, 0)), ("0.4.3rc1", (0, 4, 3)), ("13", (13,)), ("1.0.dev2", (1, 0))]
)
def test_versions_are_compared_by_number(version: str, expected: tuple[int, ...]) -> None:
    assert doctor._numbers(version) == expected


def test_a_missing_and_an_old_package_are_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "rich":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2" if name == "jinja2" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "pip install 'rich>=13'" in out and "1.2 is too old" in out and "helexa cannot run models here" in out


def test_without_the_native_core_it_says_what_that_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if "_native" in (fromlist or ()):
            raise ImportError("no such module")
        return real(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", refuse)
    found = findings()["native core"]
    assert found.status == "slow" and "hundred times slower" in found.text and "CMake" in found.text


def test_a_broken_torch_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = next(iter(doctor._torch()))
    assert found.status == "missing" and "cannot be imported" in found.text


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (doctor.ISA_FLAGS["avx512"], "ok", "AVX-512 with VNNI"),
        (doctor.ISA_FLAGS["avx2"] | {"avx512f"}, "ok", "no avx512_vnni, avx512bw, avx512dq, avx512vl"),
        (doctor.ISA_FLAGS["avx2_vnni"], "ok", "AVX2 with VNNI (no avx512_vnni"),
        ({"sse2"}, "slow", "generic kernels"),
    ],
)
def test_the_processors_level_is_named(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], status: str, words: str
) -> None:
    monkeypatch.setattr(doctor.machine, "cpu_flags", lambda: frozenset(flags))
    found = next(iter(doctor._processor()))
    assert found.status == status and words in found.text


L4 = nvml.Card(0, "NVIDIA L4", (8, 9), 24 << 30, 20 << 30)
GOOD = CudaFacts(True, ("80", "89"), 13000, 13000, (CudaDevice("NVIDIA L4", (8, 9), 24 << 30),), 0, "2.11.0", "13.0")


def cuda_findings(
    monkeypatch: pytest.MonkeyPatch, cards: list[nvml.Card] | None, facts: CudaFacts
) -> dict[str, doctor.Finding]:
    def read() -> tuple[nvml.Driver, list[nvml.Card]]:
        if cards is None:
            raise nvml.NoDriver("none")
        return nvml.Driver("580.95.05", 13000), cards

    monkeypatch.setattr(nvml, "read", read)
    monkeypatch.setattr(cuda_facts, "gather", lambda: facts)
    monkeypatch.setattr(cuda_device, "diagnose", lambda: cuda_facts.obstacle(facts))
    return {finding.subject: finding for finding in doctor._cuda()}


def test_a_card_that_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cuda_findings(monkeypatch, [L4], GOOD)
    assert {finding.status for finding in found.values()} <= {"ok", "slow"} and found["cuda"].status == "ok"
    assert found["cuda driver"].text == "580.95.05, for CUDA up to 13.0"
    assert (
        found["cuda card 0"].text == "NVIDIA L4, 20.0 GiB of 24.0 GiB free, compute capability 8.9, kernels for sm_89"
    )
    assert found["cuda kernels"].text == "for compute capabilities 80 89, with CUDA 13.0"
    assert found["cuda"].text == "models run on NVIDIA L4, 24 GiB, compute capability 8.9"
    assert {"triton", "nccl"} <= found.keys()


def test_without_a_driver_models_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cuda_findings(monkeypatch, None, CudaFacts(True, ("80",), 13000, error=35, torch="2.11.0"))
    assert found["cuda"].status == "ok" and found["cuda"].text.startswith("no NVIDIA driver: models run on the CPU")
    assert found.keys() == {"cuda", "cuda kernels"}


def test_a_card_that_lies_idle_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cuda_findings(monkeypatch, [L4], CudaFacts(False, driver=13000, devices=GOOD.devices, torch="2.11.0"))
    assert found["cuda"].status == "slow" and "nvcc 12.8" in found["cuda"].text
    assert "no kernels for it in this build" in found["cuda card 0"].text


def test_cuda_is_reported_with_a_broken_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "read", lambda: (nvml.Driver("580.95.05", 13000), [L4]))
    monkeypatch.setattr(cuda_device, "gather", lambda: GOOD)
    monkeypatch.setitem(sys.modules, "torch", None)
    found = {finding.subject: finding for finding in doctor._cuda()}
    assert found["cuda"].status == "slow" and "without torch" in found["cuda"].text
