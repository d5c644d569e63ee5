"""``python -m benchmarks.engine.prefix``: time to the first token of a prompt, cold and when the same prompt came before."""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from helexa_engine import LLM, SamplingParams
from helexa_engine.cli import machine
from helexa_engine.cli.bench import Prompts, append_row, preset_file
from helexa_engine.errors import HelexaError
from helexa_engine.ops.registry import require_native

RESULTS = Path(__file__).resolve().parent.parent / "results" / "prefix.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.engine.prefix", description=__doc__)
    parser.add_argument("--preset", nargs="+", default=["qwen3-0.6b", "qwen3.5-0.8b"], help="[dense and hybrid]")
    parser.add_argument("--quant", default="Q8_0", help="[Q8_0]")
    parser.add_argument("--preset-folder", type=Path, help="where preset files are kept; default: the temporary folder")
    parser.add_argument("--prompt-tokens", type=int, default=4096, help="[4096]")
    parser.add_argument("--repetitions", type=int, default=3, help="[3]")
    parser.add_argument("--num-threads", type=int, help="default: the physical cores")
    parser.add_argument("--output", type=Path, default=RESULTS, help="rows are appended here [results/prefix.jsonl]")
    arguments = parser.parse_args()
    try:
        for preset in arguments.preset:
            path = preset_file(preset, arguments.quant, arguments.preset_folder)
            with LLM(
                path, max_model_len=arguments.prompt_tokens + 16, max_num_seqs=1, num_threads=arguments.num_threads
            ) as llm:
                row = {"model": f"{preset} {arguments.quant}"} | measure(
                    llm, arguments.prompt_tokens, arguments.repetitions
                )
            print(report(row), flush=True)
            append_row(arguments.output, row)
    except HelexaError as error:
        print(f"benchmarks.engine.prefix: error: {error}", file=sys.stderr)
        return 1
    return 0


def measure(llm: LLM, prompt_tokens: int, repetitions: int) -> dict[str, Any]:
    """The row; every prompt is new, and is asked for twice."""
    native = require_native()
    prompts = Prompts(llm)
    first_token_seconds(llm, prompts.draw(min(prompt_tokens, 1024)))  # warm-up
    bandwidth = [native.read_bandwidth()]
    cold, hit, cached = [], [], []
    for _ in range(repetitions):
        prompt = prompts.draw(prompt_tokens)
        for samples, expected in ((cold, False), (hit, True)):
            seconds, cached_tokens = first_token_seconds(llm, prompt)
            assert (cached_tokens > 0) == expected, f"{cached_tokens} tokens were cached"
            samples.append(seconds)
        cached.append(cached_tokens)
    bandwidth.append(native.read_bandwidth())
    return {
        "benchmark": "prefix",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": machine.describe() | {"instruction_set": native.cpu_isa()},
        "threads": native.num_threads(),
        "repetitions": repetitions,
        "read_bytes_per_second": round(statistics.mean(bandwidth)),
        "prompt_tokens": prompt_tokens,
        "cached_tokens": round(statistics.median(cached)),
        "snapshot_bytes": llm.model_info.snapshot_bytes,
        "cold_seconds": round(statistics.median(cold), 4),
        "cold_samples": [round(seconds, 4) for seconds in cold],
        "hit_seconds": round(statistics.median(hit), 4),
        "hit_samples": [round(seconds, 4) for seconds in hit],
        "hit_share_of_cold": round(statistics.median(hit) / statistics.median(cold), 4),
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


if __name__ == "__main__":
    sys.exit(main())
