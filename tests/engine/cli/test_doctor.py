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

ROOT = Path(__file__).resolve().parents[3]


def findings() -> dict[str, doctor.Finding]:
    return {finding.subject: finding for finding in doctor.examine()}


def test_the_report_covers_what_models_need(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor"])
    out = capsys.readouterr().out
    for subject in ("python", "packages", "torch", "processor", "native core", "memory", "demo model", "quantised"):
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
        ({"sse2"}, "slow", "generic kernels"),
    ],
)
def test_the_processors_level_is_named(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], status: str, words: str
) -> None:
    monkeypatch.setattr(doctor.machine, "cpu_flags", lambda: frozenset(flags))
    found = next(iter(doctor._processor()))
    assert found.status == status and words in found.text
