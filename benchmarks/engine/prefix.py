"""``python -m benchmarks.engine.prefix``: time to the first token of a prompt, cold and when the same prompt came before, with
``--restart`` before the model was closed and loaded again."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from helexa_engine import LLM, SamplingParams
from helexa_engine.cli import machine
from helexa_engine.cli.bench import Limits, Prompts, append_row, preset_file, preset_model
from helexa_engine.config import EngineConfig
from helexa_engine.errors import HelexaError
from helexa_engine.ops.registry import require_native
from helexa_engine.runtime.load import load_model

from .goals import judged

RESULTS = Path(__file__).resolve().parent.parent / "results" / "prefix.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.engine.prefix", description=__doc__)
    parser.add_argument("--preset", nargs="+", default=["qwen3-0.6b", "qwen3.5-0.8b"], help="[dense and hybrid]")
    parser.add_argument("--quant", default="Q8_0", help="[Q8_0]")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where models run [cpu]")
    parser.add_argument("--preset-folder", type=Path, help="where preset files are kept; default: the temporary folder")
    parser.add_argument("--prompt-tokens", type=int, default=4096, help="[4096]")
    parser.add_argument("--repetitions", type=int, default=3, help="[3]")
    parser.add_argument("--restart", action="store_true", help="close and load the model between the two")
    parser.add_argument("--num-threads", type=int, help="default: the physical cores")
    parser.add_argument("--output", type=Path, default=RESULTS, help="rows are appended here [results/prefix.jsonl]")
    arguments = parser.parse_args()
    try:
        for preset in arguments.preset:
            settings = {
                "device": arguments.device,
                "max_model_len": arguments.prompt_tokens + 16,
                "max_num_seqs": 1,
                "num_threads": arguments.num_threads,
            }
            row: dict[str, Any] = {"model": f"{preset} {arguments.quant}"}
            if arguments.restart:
                path = preset_file(preset, arguments.quant, arguments.preset_folder)
                row |= measure_restart(path, arguments.prompt_tokens, arguments.repetitions, settings)
                print(report_restart(row), flush=True)
            else:
                model = preset_model(preset, arguments.quant, arguments.preset_folder, arguments.device)
                with LLM.of(load_model(model, EngineConfig(**settings))) as llm:
                    row |= measure(llm, arguments.prompt_tokens, arguments.repetitions)
                print(report(row), flush=True)
                if arguments.device == "cuda":
                    print("\n".join(map(str, judged(row))), flush=True)
            append_row(arguments.output, row)
    except HelexaError as error:
        print(f"benchmarks.engine.prefix: error: {error}", file=sys.stderr)
        return 1
    return 0


def measure(llm: LLM, prompt_tokens: int, repetitions: int) -> dict[str, Any]:
    """The row; every prompt is new, and is asked for twice."""
    limits = Limits(llm.model_info.device)
    prompts = Prompts(llm)
    first_token_seconds(llm, prompts.draw(min(prompt_tokens, 1024)))  # warm-up
    limits.measure()
    cold, hit, cached = [], [], []
    for _ in range(repetitions):
        prompt = prompts.draw(prompt_tokens)
        for samples, expected in ((cold, False), (hit, True)):
            seconds, cached_tokens = first_token_seconds(llm, prompt)
            assert (cached_tokens > 0) == expected, f"{cached_tokens} tokens were cached"
            samples.append(seconds)
        cached.append(cached_tokens)
    limits.measure()
    return {
        "benchmark": "prefix",
        **_conditions(repetitions, limits.bandwidths, limits.described),
        "prompt_tokens": prompt_tokens,
        "cached_tokens": round(statistics.median(cached)),
        "snapshot_bytes": llm.model_info.snapshot_bytes,
        **_samples("cold", cold),
        **_samples("hit", hit),
        "hit_share_of_cold": round(statistics.median(hit) / statistics.median(cold), 4),
    }


def measure_restart(path: Path, prompt_tokens: int, repetitions: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The row; every prompt is asked for, then the model is closed, loaded and asked for it again."""
    native = require_native()
    bandwidth = [native.read_bandwidth()]
    cold, hit, close, restore, sizes = [], [], [], [], []
    for repetition in range(repetitions):
        with tempfile.TemporaryDirectory(prefix="helexa-prefixes-") as folder:
            llm = LLM(path, prefix_cache_folder=folder, **settings)
            prompts = Prompts(llm, seed=repetition)
            first_token_seconds(llm, prompts.draw(64))  # warm-up
            prompt = prompts.draw(prompt_tokens)
            seconds, cached_tokens = first_token_seconds(llm, prompt)
            assert cached_tokens == 0
            cold.append(seconds)
            started = time.perf_counter()
            llm.close()
            close.append(time.perf_counter() - started)
            sizes.append(sum(file.stat().st_size for file in Path(folder).glob("*.prefixes")))
            stages: dict[str, float] = {}
            with LLM(
                path,
                prefix_cache_folder=folder,
                progress=lambda stage, _: stages.update({stage: time.perf_counter()}),  # noqa: B023
                **settings,
            ) as llm:
                restore.append(stages["ready"] - stages["restoring prefixes"])
                first_token_seconds(llm, prompts.draw(64))
                seconds, cached_tokens = first_token_seconds(llm, prompt)
                assert cached_tokens > 0
                hit.append(seconds)
    bandwidth.append(native.read_bandwidth())
    return {
        "benchmark": "prefix_restart",
        **_conditions(repetitions, bandwidth),
        "prompt_tokens": prompt_tokens,
        "cached_tokens": cached_tokens,
        "file_bytes": round(statistics.median(sizes)),
        **_samples("cold", cold),
        **_samples("close", close),
        **_samples("restore", restore),
        **_samples("hit", hit),
        "restart_share_of_cold": round(
            (statistics.median(restore) + statistics.median(hit)) / statistics.median(cold), 4
        ),
    }


def _conditions(
    repetitions: int, bandwidth: Sequence[float], device: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    stamp = machine.stamp(require_native())
    stamp["machine"] |= device or {}
    return {
        **stamp,
        "repetitions": repetitions,
        "read_bytes_per_second": round(statistics.mean(bandwidth)),
    }


def _samples(name: str, seconds: Sequence[float]) -> dict[str, Any]:
    return {
        f"{name}_seconds": round(statistics.median(seconds), 4),
        f"{name}_samples": [round(sample, 4) for sample in seconds],
    }


def first_token_seconds(llm: LLM, prompt: list[int]) -> tuple[float, int]:
    """Seconds from handing the prompt in to its first token, and how many of its tokens were cached."""
    started = time.perf_counter()
    result = llm.generate(prompt, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
    return time.perf_counter() - started, result.usage.cached_tokens


def report(row: dict[str, Any]) -> str:
    """The row for people."""
    return (
        f"{row['model']}: first token of {row['prompt_tokens']} after {row['cold_seconds']:.2f} s cold, {row['hit_seconds']:.3f} s with "
        f"{row['cached_tokens']} tokens cached ({row['hit_share_of_cold']:.1%}); {row['threads']} threads"
    )


def report_restart(row: dict[str, Any]) -> str:
    """The row for people."""
    return (
        f"{row['model']}: first token of {row['prompt_tokens']} after {row['cold_seconds']:.2f} s cold; "
        f"{row['file_bytes'] / 1e6:.0f} MB saved and closed in {row['close_seconds']:.2f} s; restored in "
        f"{row['restore_seconds']:.2f} s and first token after {row['hit_seconds']:.3f} s with {row['cached_tokens']} tokens cached "
        f"({row['restart_share_of_cold']:.1%} together); {row['threads']} threads"
    )


if __name__ == "__main__":
    sys.exit(main())
