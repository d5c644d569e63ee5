"""What the benchmarks decide without measuring: which rows there are, and which are missing."""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.engine import __main__ as engine_main
from benchmarks.engine import aggregate, base, goals, llama_cpp, prefix, step_overhead
from benchmarks.engine.busy import busy_processes
from benchmarks.engine.cases import GROUPS, ON_CARD, Case, is_recorded, rows_of
from benchmarks.engine.summary import below, newest_pairs, summary
from benchmarks.load.agreement import disagreements
from helexa_engine import LLM
from helexa_engine.cli.bench import measure, prefill_operations, preset_file, preset_model, report
from helexa_engine.config import EngineConfig
from helexa_engine.ops.registry import native_core
from helexa_engine.presets import PRESETS, PresetCheckpoint
from helexa_engine.quant import mixes
from helexa_engine.testing.cuda_core import emulated_cuda, emulation
from helexa_engine.weights.checkpoint import open_checkpoint

CASE = Case("qwen3-0.6b", "Q8_0", 64, 32, 4096)


def row(engine: str = "helexa", **changes: Any) -> dict[str, Any]:
    return {
        "benchmark": "engine", "engine": engine, "model": CASE.name, "commit": "abc", "date": "today", "threads": 2,
        "machine": {"instruction_set": "avx512"}, "prefill_tokens": 64, "decode_tokens": 32, "decode_context": 4096,
        "repetitions": 3, "read_bytes_per_second": 4e10, "file_bytes": 1, "decode_bytes_per_token": 10**9,
        "prefill_tokens_per_second": 200.0, "decode_tokens_per_second": 30.0,
    } | changes  # fmt: skip


def test_every_case_has_a_preset_and_a_mix_and_groups_do_not_overlap() -> None:
    cases = [case for group in [*GROUPS.values(), ON_CARD] for case in group]
    assert all(case.preset in PRESETS and mixes.by_name(case.quant) is not None for case in cases)
    assert len(set(cases)) == len(cases)


def test_a_row_counts_for_its_commit_level_and_lengths_with_the_peers_behind_it() -> None:
    def recorded(rows: list[dict[str, Any]], *, peer: bool = False) -> bool:
        return is_recorded(CASE, rows, commit="abc", instruction_set="avx512", peer=peer)

    assert not recorded([]) and recorded([row()])
    for change in ({"commit": "abd"}, {"decode_context": 0}, {"prefill_tokens": 512}, {"model": "qwen3-0.6b Q6_K"},
                   {"busy_processes": 1}):  # fmt: skip
        assert not recorded([row(**change)])
    assert not recorded([row(machine={"instruction_set": "avx2"})])
    without_context = {key: value for key, value in row().items() if key != "decode_context"}  # as older rows are
    assert not recorded([without_context])
    assert not recorded([row()], peer=True) and not recorded([row(), row()], peer=True)
    assert recorded([row(), row("llama.cpp", commit="b1")], peer=True)
    assert not recorded([row(), row("llama.cpp", prefill_tokens=512)], peer=True)


def test_the_summary_takes_the_newest_pair_and_the_geometric_mean() -> None:
    slow = row(prefill_tokens_per_second=50.0, decode_share_of_bandwidth=0.5)
    fast = row(date="later", commit="abd", decode_share_of_bandwidth=0.5)
    other = row(model="qwen3-0.6b Q6_K", prefill_tokens_per_second=800.0, decode_share_of_bandwidth=0.5)
    peer = row("llama.cpp", prefill_tokens_per_second=100.0, decode_tokens_per_second=30.0)
    rows = [slow, peer, fast, peer | {"date": "later"}, fast, other, peer, other, peer | {"date": "another run"}]
    assert newest_pairs(rows) == [(fast, peer | {"date": "later"}), (other, peer)]
    assert newest_pairs(rows, "abc") == [(slow, peer), (other, peer)]
    beside = [one | {"busy_processes": 1, "decode_tokens_per_second": rate} for one, rate in ((slow, 9.0), (peer, 3.0))]
    *lines, last = summary(newest_pairs([*rows, *beside])).splitlines()
    assert "geometric mean of 2: prefill 4.00x (least 2.00x), decode 1.00x (least 1.00x)" in last
    assert lines[-1].endswith("beside 1 busy") and "3.00x" in lines[-1]  # shown, and not in the mean


def test_pairs_below_a_ratio_stand_beside_what_the_bandwidth_allowed() -> None:
    slow = row(decode_tokens_per_second=36.0, decode_share_of_bandwidth=0.9, decode_kv_bytes_per_token=10**7)
    fast = row(model="qwen3-0.6b Q6_K", decode_tokens_per_second=90.0, decode_share_of_bandwidth=0.9)
    busy = slow | {"busy_processes": 1}
    peer = row("llama.cpp", prefill_tokens_per_second=100.0, decode_share_of_bandwidth=0.75)
    quick = peer | {"prefill_tokens_per_second": 160.0}
    lines = below(newest_pairs([slow, peer, fast, quick, busy, peer]), 1.5).splitlines()
    assert lines[2] == "| qwen3-0.6b Q8_0, avx512 behind 4096 | 1010 | 40.0 | 90% | 75% | 1.20 | 1.33 |"
    assert lines[3] == "" and lines[6:] == ["| qwen3-0.6b Q6_K, avx512 | 64 | 1.25 |"]


def test_busy_processes_compute_until_they_are_ended() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with pytest.raises(ZeroDivisionError), busy_processes(2) as processes:
        time.sleep(0.5)
        assert [process.poll() for process in processes] == [None, None]
        raise ZeroDivisionError
    assert all(process.poll() is not None for process in processes)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before > 0.1


@pytest.mark.skipif(native_core() is None, reason="benchmarks measure the native core")
def test_a_prompt_that_comes_again_is_measured_as_a_hit(tmp_path: Path) -> None:
    with LLM(preset_file("qwen3.5-tiny", "Q8_0", tmp_path), max_model_len=400, max_num_seqs=1) as llm:
        row = {"model": "tiny"} | prefix.measure(llm, 300, 2)
    assert row["cached_tokens"] == 256 and len(row["cold_samples"]) == len(row["hit_samples"]) == 2
    assert row["hit_share_of_cold"] == pytest.approx(row["hit_seconds"] / row["cold_seconds"], rel=0.05)
    assert "256 tokens cached" in prefix.report(row)


@pytest.mark.skipif(native_core() is None, reason="benchmarks measure the native core")
def test_a_restart_is_measured_from_closing_to_the_first_token(tmp_path: Path) -> None:
    path = preset_file("qwen3.5-tiny", "Q8_0", tmp_path)
    row = {"model": "tiny"} | prefix.measure_restart(path, 300, 2, {"max_model_len": 400, "max_num_seqs": 1})
    assert row["cached_tokens"] == 256 and row["file_bytes"] > 0
    assert all(len(row[f"{name}_samples"]) == 2 for name in ("cold", "close", "restore", "hit"))
    assert row["restart_share_of_cold"] == pytest.approx(
        (row["restore_seconds"] + row["hit_seconds"]) / row["cold_seconds"], rel=0.05
    )
    assert "256 tokens cached" in prefix.report_restart(row)


@pytest.mark.skipif(native_core() is None, reason="benchmarks measure the native core")
@pytest.mark.parametrize("preset", ["qwen3-tiny", "qwen3.5-tiny"])
def test_answers_together_and_steps_are_measured(tmp_path: Path, preset: str) -> None:
    path = preset_file(preset, "Q4_K_M", tmp_path)
    with open_checkpoint(path) as checkpoint:
        bytes_per_step, operations = aggregate.work(checkpoint)
    assert 0 < bytes_per_step < path.stat().st_size and operations > bytes_per_step
    with LLM(path, max_model_len=512, max_num_seqs=4) as llm:
        rows = aggregate.measure(llm, "tiny", [1, 4], 8, 1, bytes_per_step, operations)
        assert [row["sequences"] for row in rows] == [1, 4] and rows[0]["times_single"] == 1.0
        ratio = rows[1]["tokens_per_second"] / rows[0]["tokens_per_second"]
        assert rows[1]["times_single"] == pytest.approx(ratio, rel=0.01)
        assert all(0 < row["share_of_bandwidth"] <= row["share_of_roofline"] for row in rows)
        assert "4 together" in aggregate.report(rows[1])
        row = {"model": "tiny"} | step_overhead.measure(llm._loaded, 3, 5, 1.0)
    parts = [row[f"{part}_microseconds"] for part in ("schedule", "batch", "sample", "rest")]
    assert all(0 < part < row["host_microseconds"] < row["step_microseconds"] for part in parts)
    assert "3 sequences" in step_overhead.report(row)


def test_recorded_rows_can_be_read_and_say_what_they_compare() -> None:
    rows = rows_of(Path(base.ROOT) / "benchmarks" / "results" / "engine.jsonl")
    assert rows and {row["engine"] for row in rows} == {"helexa", "llama.cpp"}
    assert rows_of(Path("/nowhere/engine.jsonl")) == []


def test_the_peer_runs_the_same_lengths_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bandwidths = iter([6e10, 2e10])
    monkeypatch.setattr(llama_cpp, "require_native", lambda: SimpleNamespace(read_bandwidth=lambda: next(bandwidths)))
    program, calls = tmp_path / "llama-bench", tmp_path / "calls"
    answer = json.dumps({"samples_ts": [99.0, 100.0, 104.0], "build_commit": "b1"})
    program.write_text(f"#!/bin/sh\necho \"$@\" >> {calls}\necho noise\necho '{answer}'\n")
    program.chmod(0o755)
    peer = llama_cpp.measure(program, tmp_path / "m.gguf", row())
    assert [line.split(" ", 2)[2] for line in calls.read_text().splitlines()] == [
        "-p 64 -n 0 -t 2 -r 3 -o jsonl",
        "-p 0 -n 32 -d 4096 -t 2 -r 3 -o jsonl",
    ]
    assert (peer["engine"], peer["commit"], peer["prefill_tokens_per_second"]) == ("llama.cpp", "b1", 100.0)
    assert peer["decode_share_of_bandwidth"] == pytest.approx(100 * 1e9 / 4e10)
    assert peer["read_bytes_per_second"] == 4e10 and not llama_cpp.memory_changed(row(), peer)
    assert llama_cpp.memory_changed(row(), peer | {"read_bytes_per_second": 4.5e10})
    assert llama_cpp.memory_changed(row(), peer | {"read_bytes_per_second": 3.5e10})
    text = llama_cpp.compare(row(), peer)
    assert "prefill 100.0 tokens/s, helexa is 2.00x" in text and "decode 100.0 tokens/s, helexa is 0.30x" in text


@pytest.mark.parametrize(("speeds", "kept"), [([4.0, 9.0], 0), ([5.0, 4.2, 9.0], 1), ([5.0, 2.0, 3.0, 9.0], 2)])
def test_a_pair_in_which_memory_changed_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speeds: list[float], kept: int
) -> None:
    """Three times at most, and whatever the pair showed."""
    attempts = [row("llama.cpp", read_bytes_per_second=speed * 1e10) for speed in speeds]
    left = iter(attempts)
    monkeypatch.setattr(engine_main, "measure", lambda *args, **options: row())
    monkeypatch.setattr(engine_main, "report", lambda row: "")
    monkeypatch.setattr(llama_cpp, "measure", lambda *args: next(left))
    output = tmp_path / "engine.jsonl"
    monkeypatch.setattr(
        sys, "argv", ["engine", "m.gguf", "--attempts", "3", "--peer-llama-bench", "x", "--output", str(output)]
    )
    assert engine_main.main() == 0
    assert rows_of(output) == [row(), attempts[kept]]


@pytest.mark.parametrize(("option", "value", "least"), [("--attempts", "0", 1), ("--busy-processes", "-1", 0)])
def test_a_number_that_measures_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, value: str, least: int
) -> None:
    monkeypatch.setattr(sys, "argv", ["engine", "m.gguf", option, value])
    with pytest.raises(SystemExit):
        engine_main.main()
    assert f"{option}: expected at least {least}, got {value}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "engine.__main__",
        "engine.summary",
        *(f"ops.{op}" for op in ("paged_attention", "quant_matmul", "quantize", "moe_matmul", "sample")),
    ],
)
def test_every_benchmark_imports(name: str) -> None:
    assert callable(importlib.import_module(f"benchmarks.{name}").main)


# -- On a card


def test_every_goal_is_measured_on_a_card_and_every_shape_there_has_one() -> None:
    measured = {(case.quant, case.preset) for case in ON_CARD}
    assert measured == {(mix, preset) for mix, shapes in goals.DECODE.items() for preset in shapes}
    assert all(goals.PREFILL_FROM in case.more_prompts for case in ON_CARD)
    every = [goal for shapes in goals.DECODE.values() for goal in shapes.values()]
    every += [
        *goals.OVERHEAD.values(),
        *goals.PREFILL.values(),
        *goals.AGGREGATE.values(),
        goals.LOAD,
        goals.DELTA_STEP,
    ]
    assert all((goal.record < goal.floor) == goal.less_is_better and goal.record != goal.floor for goal in every)


def test_a_row_is_judged_by_floor_and_record() -> None:
    prefills = [{"tokens": 512, "share_of_matmul_rate": 0.1}, {"tokens": 4096, "share_of_matmul_rate": 0.6}]
    of_card = row(
        model="qwen3.5-4b Q4_K_M", decode_context=0, decode_share_of_bandwidth=0.4, prefills=prefills, weights_shared=True,
        decode_overhead_per_layer_microseconds=31.0,
    )  # fmt: skip
    assert [str(item).split(": ")[-1] for item in goals.judged(of_card)] == ["floor", "below", "record"]
    assert [item.quantity for item in goals.judged(of_card)] == [
        "decode",
        "overhead a layer, hybrid",
        "prefill 4096, quantised",
    ]
    assert list(goals.judged(of_card | {"model": "a.gguf"})) == []
    loaded = of_card | {"weights_shared": False, "file_bytes": 30e9, "load_seconds": 2.0}
    assert [item.measured for item in goals.judged(loaded)][-1] == 15.0
    small = of_card | {"model": "qwen3.5-0.8b BF16"}
    assert not any("prefill" in item.quantity for item in goals.judged(small))
    together = {"benchmark": "aggregate", "model": "qwen3-0.6b Q4_K_M", "sequences": 8, "times_single": 4.5}
    assert [item.goal.verdict(item.measured) for item in goals.judged(together)] == ["floor"]


def test_kernels_alone_are_judged_where_a_goal_is_set() -> None:
    step = {"benchmark": "gated_delta_rule", "tokens": 1, "microseconds": 9.0}
    assert [str(item).split(": ")[-1] for item in goals.judged_op(step)] == ["floor"]
    assert not [*goals.judged_op(step | {"tokens": 64}), *goals.judged_op({"benchmark": "quant_matmul"})]
    attention = {"benchmark": "paged_attention", "tokens": 1, "context": 32768, "heads": "16x4x256", "kv_dtype": "q8_0"}
    assert [item.goal.verdict(item.measured) for item in goals.judged_op(attention | {"roofline": 0.8})] == ["record"]
    assert not list(goals.judged_op(attention | {"roofline": 0.8, "context": 4096}))


def test_a_prompts_operations_are_those_of_its_parameters_and_of_attention() -> None:
    dense = PresetCheckpoint("qwen3-8b", "Q4_K_M")
    assert prefill_operations(dense, 1) == pytest.approx(2 * 6.95e9, rel=0.01)  # 8.2e9 but for embedding and head
    alone, long = (prefill_operations(dense, tokens) / tokens for tokens in (1, 4096))
    assert long - alone == pytest.approx(4 * 4096 * 36 * 4095 / 2)
    experts = PresetCheckpoint("qwen3.5-35b-a3b", "Q4_K_M")
    assert 2 * 2e9 < prefill_operations(experts, 1) < 2 * 3e9


@pytest.mark.skipif(native_core() is None or emulation() is None, reason="the core or the emulation is not built")
@pytest.mark.parametrize("preset", ["qwen3-tiny", "qwen3.5-tiny"])
def test_a_card_is_measured_with_its_ceilings(preset: str) -> None:
    with emulated_cuda():
        model = preset_model(preset, "Q4_K_M", None, "cuda")
        assert isinstance(model, PresetCheckpoint)
        config = EngineConfig(device="cuda", max_num_batched_tokens=128)
        made = measure(model, config, name=preset, prompt_tokens=[64, 130], decode_tokens=4, repetitions=1)
    assert made["machine"]["device"] == "emulated" and made["weights_shared"] and made["kv_dtype"] == "bfloat16"
    assert [prefill["tokens"] for prefill in made["prefills"]] == [64, 130] and made["max_num_batched_tokens"] == 128
    step_bytes = sum(made[f"decode_{part}_per_token"] for part in ("bytes", "kv_bytes", "state_bytes"))
    share = step_bytes * made["decode_tokens_per_second"] / made["read_bytes_per_second"]
    assert made["decode_share_of_bandwidth"] == pytest.approx(share, abs=0.001)
    assert (made["decode_state_bytes_per_token"] > 0) == (preset == "qwen3.5-tiny")
    assert "decode_share_outside_kernels" not in made
    assert "prefill 130" in report(made) and "of the multiply rate" in report(made)
    json.dumps(made)


def load_record(**changes: int) -> dict[str, Any]:
    """A request as the load generator writes it: a text of 20 tokens, in a template of 12."""
    figures = {"usage_prompt_tokens": 32, "usage_completion_tokens": 8, "input_sequence_length": 20} | changes
    return {"metrics": {name: {"value": value} for name, value in figures.items()}}


@pytest.mark.parametrize(
    ("records", "counted", "words"),
    [
        ([load_record(), load_record()], {}, None),
        ([load_record()], {}, "requests: 1 by the tool, 2 by helexa"),
        ([load_record(), load_record()], {"vllm:prompt_tokens_total": 65}, "prompt tokens: 64 by the tool, 65 by"),
        ([load_record(), load_record()], {"vllm:generation_tokens_total": 15}, "completion tokens: 16 by the tool, 15"),
        ([load_record(), load_record()], {"vllm:request_success_total:length": 1}, "answers: 2 by the tool, 1 by"),
        ([load_record(), load_record(usage_completion_tokens=9)], {}, "tokens of its answer: 8 by the tool, 9 by"),
        ([load_record(input_sequence_length=21), load_record()], {}, "tokens of its prompt: 33 by the tool, 32 by"),
        ([load_record(), {"error": {"code": 500}, "metrics": {}}], {}, "a request failed"),
    ],
)
def test_a_load_generator_agrees_in_every_count_or_the_run_fails(
    records: list[dict[str, Any]], counted: dict[str, int], words: str | None
) -> None:
    server = {
        "vllm:prompt_tokens_total": 64,
        "vllm:generation_tokens_total": 16,
        "vllm:request_success_total:length": 2,
    }
    problems = disagreements(records, server | counted, requests=2, output_tokens=8, overhead=12)
    assert any(words in problem for problem in problems) if words else not problems
