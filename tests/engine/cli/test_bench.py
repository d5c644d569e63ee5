from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helexa_engine.cli import main
from helexa_engine.cli.bench import Stages, append_row, decode_bytes, preset_file, report
from helexa_engine.cli.loading import load
from helexa_engine.config import EngineConfig
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
    "file_bytes": 10**9, "load_seconds": 1.0, "load_stage_seconds": {"imports": 0.25, "loading weights": 0.75},
    "resident_bytes": None, "resident_bytes_before_load": None, "prefill_tokens": 512,
    "prefill_tokens_per_second": 300.0, "decode_tokens": 64, "decode_context": 0, "decode_tokens_per_second": 5.0,
    "decode_bytes_per_token": 10**9,
    "decode_share_of_bandwidth": 0.5, "decode_overhead_per_layer_microseconds": 7.0,
}  # fmt: skip


def test_the_stages_of_a_load_add_up(tmp_path: Path) -> None:
    path = preset_file("qwen3-tiny", "Q4_K_M", tmp_path)
    started = time.perf_counter()
    stages = Stages()
    with load(str(path), EngineConfig(max_model_len=64, max_num_seqs=1), stages):
        passed = time.perf_counter() - started
    expected = ["imports", "reading the checkpoint", "reading the tokenizer", "loading weights", "reserving memory"]
    assert list(stages.seconds) == expected
    assert 0 < sum(stages.seconds.values()) <= passed + 0.01


def test_rows_are_appended_and_reported(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.jsonl"
    append_row(file, ROW)
    append_row(file, ROW | {"model": "n"})
    assert [json.loads(line)["model"] for line in file.read_text().splitlines()] == ["m", "n"]
    assert (
        "decode 64  5.0 tokens/s, 50% of the bandwidth's limit of 10.0; overhead 7 us a layer\n" in report(ROW) + "\n"
    )
    assert "load  1.00 s (imports 0.25, loading weights 0.75)\n" in report(ROW)
    behind = report(ROW | {"decode_context": 4096, "decode_share_outside_kernels": 0.021})
    assert "decode 64@4096  5.0" in behind and behind.endswith("us a layer; 2.1% of a step outside the kernels")
