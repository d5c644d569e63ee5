"""The kernels' benchmarks run, on the processor and, under the emulation, as they do on a card; what they measure there is nothing."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from helexa_engine.ops.registry import native_core
from helexa_engine.testing.cuda_core import emulated_cuda, emulation

CASES = {
    "quant_matmul": ["--types", "Q4_K", "BF16", "--rows", "1", "--shape", "64x256", "--repeats", "1", "--cached"],
    "paged_attention": ["--heads", "2x1x64", "--tokens", "1", "--context", "70", "--repeats", "1"],
    "moe_matmul": [
        "--experts",
        "4",
        "--top-k",
        "2",
        "--hidden",
        "256",
        "--width",
        "256",
        "--shared-width",
        "256",
        "--rows",
        "1",
        "3",
        "--repeats",
        "1",
    ],
    "gated_delta_rule": ["--heads", "1", "2", "--tokens", "1", "20", "--repeats", "1"],
}


def rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, *options: str) -> list[dict[str, object]]:
    file = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", [name, *CASES[name], "--json", str(file), *options])
    importlib.import_module(f"benchmarks.ops.{name}").main()
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.skipif(native_core() is None, reason="benchmarks measure the native core")
@pytest.mark.parametrize("name", ["quant_matmul", "paged_attention", "moe_matmul"])
def test_on_the_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    made = rows(monkeypatch, tmp_path, name)
    assert len(made) == 2 and all(0 < row["roofline"] and row["instruction_set"] for row in made)  # type: ignore[operator]


@pytest.mark.skipif(emulation() is None, reason="the emulation is not built")
@pytest.mark.parametrize("name", CASES)
def test_as_on_a_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    with emulated_cuda():
        made = rows(monkeypatch, tmp_path, name, "--device", "cuda")
    assert len(made) == 2 and all(row["device"] == "emulated" for row in made)
    if name == "gated_delta_rule":
        assert all(row["microseconds"] == pytest.approx(row["seconds"] * 1e6, rel=0.01) for row in made)  # type: ignore[operator]
