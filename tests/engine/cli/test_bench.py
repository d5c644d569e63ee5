from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.engine.__main__ import compare, measure_llama_cpp
from helexa_engine.cli import main
from helexa_engine.cli.bench import append_row, decode_bytes, preset_file, report
from helexa_engine.quant import types
from helexa_engine.weights.checkpoint import open_checkpoint
from helexa_engine.weights.raw_tensor import RawTensor


def raw(name: str, rows: int, cols: int) -> RawTensor:
    return RawTensor(name, types.Q8_0, (rows, cols), np.zeros(rows * cols // 32 * 34, np.uint8))


def test_a_step_reads_one_row_of_an_untied_embedding_and_all_of_a_tied_one() -> None:
    embedding, layer, head = (
        raw(n, 64, 32) for n in ("model.embed_tokens.weight", "model.layers.0.x", "lm_head.weight")
    )
    assert decode_bytes([embedding, layer]) == 2 * 64 * 34
    assert decode_bytes([embedding, layer, head]) == 34 + 2 * 64 * 34


def test_a_step_reads_the_experts_that_a_token_takes() -> None:
    experts = RawTensor(
        "model.layers.0.mlp.experts.up_proj.weight", types.Q8_0, (8, 64, 32), np.zeros(8 * 64 * 34, np.uint8)
    )
    assert decode_bytes([experts, raw("model.layers.0.x", 64, 32)], experts_per_token=3) == (3 + 1) * 64 * 34


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "either MODEL or --preset"),
        (["demo", "--preset", "qwen3-tiny"], "either MODEL or --preset"),
    ],
)
def test_usage(capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    assert main(["bench", *argv]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--preset", "qwen9"], ["--preset", "qwen3-tiny", "--quant", "Q9"]])
def test_unknown_presets_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: list[str]) -> None:
    assert main(["bench", *argv, "--preset-folder", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("helexa: error: ")


def test_a_preset_file_is_written_once(tmp_path: Path) -> None:
    path = preset_file("qwen3-tiny", "q4_k_m", tmp_path)
    written = path.stat().st_mtime_ns
    assert preset_file("qwen3-tiny", "Q4_K_M", tmp_path) == path and path.stat().st_mtime_ns == written
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.num_layers == 2


ROW: dict[str, Any] = {
    "benchmark": "engine", "engine": "helexa", "model": "m", "date": "d", "commit": "c",
    "machine": {"cpu": "x", "instruction_set": "avx2"}, "threads": 2, "repetitions": 3, "read_bytes_per_second": 10_000_000_000,
    "file_bytes": 10**9, "load_seconds": 1.0, "resident_bytes": None, "resident_bytes_before_load": None, "prefill_tokens": 512,
    "prefill_tokens_per_second": 300.0, "decode_tokens": 64, "decode_tokens_per_second": 5.0, "decode_bytes_per_token": 10**9,
    "decode_share_of_bandwidth": 0.5, "decode_overhead_per_layer_microseconds": 7.0,
}  # fmt: skip


def test_rows_are_appended_and_reported(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.jsonl"
    append_row(file, ROW)
    append_row(file, ROW | {"model": "n"})
    assert [json.loads(line)["model"] for line in file.read_text().splitlines()] == ["m", "n"]
    assert "50% of the bandwidth's limit of 10.0" in report(ROW)


def test_llama_cpp_runs_beside_on_the_same_settings(tmp_path: Path) -> None:
    program = tmp_path / "llama-bench"
    results = [
        {"build_commit": "abc", "n_prompt": 512, "n_gen": 0, "samples_ts": [90.0, 100.0, 300.0]},
        {"build_commit": "abc", "n_prompt": 0, "n_gen": 64, "samples_ts": [2.0, 2.5, 9.0]},
    ]
    lines = "\n".join(json.dumps(result) for result in results)
    program.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/arguments\necho 'noise'\ncat <<'END'\n{lines}\nEND\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    peer = measure_llama_cpp(program, Path("m.gguf"), ROW)
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments == ["-m", "m.gguf", "-p", "512", "-n", "64", "-t", "2", "-r", "3", "-o", "jsonl"]
    assert (peer["engine"], peer["commit"]) == ("llama.cpp", "abc")
    assert (peer["prefill_tokens_per_second"], peer["decode_tokens_per_second"]) == (100.0, 2.5)
    assert peer["decode_share_of_bandwidth"] == 0.25
    assert "helexa is 3.00x" in compare(ROW, peer) and "helexa is 2.00x" in compare(ROW, peer)
