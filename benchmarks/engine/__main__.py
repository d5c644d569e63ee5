"""``python -m benchmarks.engine``: measures helexa and, beside it in the same run, llama.cpp; see benchmarks/README.md."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from helexa_engine.cli.bench import append_row, measure, preset_file, report
from helexa_engine.config import EngineConfig
from helexa_engine.errors import HelexaError

RESULTS = Path(__file__).resolve().parent.parent / "results" / "engine.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.engine", description=__doc__)
    parser.add_argument("models", metavar="FILE", nargs="*", help="GGUF files; default: the preset in each --quant")
    parser.add_argument("--preset", default="qwen3-0.6b", help="[qwen3-0.6b]")
    parser.add_argument("--quant", nargs="+", default=["Q8_0", "Q4_K_M"], help="[Q8_0 Q4_K_M]")
    parser.add_argument("--preset-folder", type=Path, help="where preset files are kept; default: the temporary folder")
    parser.add_argument(
        "--peer-llama-bench", metavar="PATH", type=Path, help="llama.cpp's llama-bench, run on the same files"
    )
    parser.add_argument("--num-threads", type=int, help="default: the physical cores")
    parser.add_argument("--memory-fraction", type=float, default=0.9, help="as of helexa serve [0.9]")
    parser.add_argument("--mmap-experts", action="store_true", help="as of helexa serve")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="[512]")
    parser.add_argument("--decode-tokens", type=int, default=64, help="[64]")
    parser.add_argument("--repetitions", type=int, default=5, help="[5]")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="rows are appended here [benchmarks/results/engine.jsonl]"
    )
    arguments = parser.parse_args()
    try:
        models = [(Path(model).name, Path(model)) for model in arguments.models] or [
            (f"{arguments.preset} {quant}", preset_file(arguments.preset, quant, arguments.preset_folder))
            for quant in arguments.quant
        ]
        for name, path in models:
            row = measure(
                str(path),
                EngineConfig(
                    num_threads=arguments.num_threads,
                    memory_fraction=arguments.memory_fraction,
                    mmap_experts=arguments.mmap_experts,
                ),
                name=name,
                prompt_tokens=arguments.prompt_tokens,
                decode_tokens=arguments.decode_tokens,
                repetitions=arguments.repetitions,
            )
            print(report(row), flush=True)
            append_row(arguments.output, row)
            if arguments.peer_llama_bench is not None:
                peer = measure_llama_cpp(arguments.peer_llama_bench, path, row)
                print(compare(row, peer), flush=True)
                append_row(arguments.output, peer)
    except HelexaError as error:
        print(f"benchmarks.engine: error: {error}", file=sys.stderr)
        return 1
    return 0


def measure_llama_cpp(program: Path, model: Path, ours: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp on the same file with the same threads, lengths and repetitions; its row shares our run's bandwidth."""
    lengths = ["-p", str(ours["prefill_tokens"]), "-n", str(ours["decode_tokens"])]
    runs = ["-t", str(ours["threads"]), "-r", str(ours["repetitions"]), "-o", "jsonl"]
    done = subprocess.run([str(program), "-m", str(model), *lengths, *runs], check=True, capture_output=True, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    prefill = next(result for result in results if result["n_prompt"])
    decode = next(result for result in results if result["n_gen"])
    decode_rate = statistics.median(decode["samples_ts"])
    shared = (
        "benchmark", "model", "date", "machine", "threads", "repetitions", "read_bytes_per_second", "file_bytes",
        "prefill_tokens", "decode_tokens", "decode_bytes_per_token",
    )  # fmt: skip
    return {key: ours[key] for key in shared} | {
        "engine": "llama.cpp",
        "commit": prefill["build_commit"],
        "prefill_tokens_per_second": round(statistics.median(prefill["samples_ts"]), 2),
        "prefill_samples": [round(rate, 2) for rate in prefill["samples_ts"]],
        "decode_tokens_per_second": round(decode_rate, 2),
        "decode_samples": [round(rate, 2) for rate in decode["samples_ts"]],
        "decode_share_of_bandwidth": round(
            decode_rate * ours["decode_bytes_per_token"] / ours["read_bytes_per_second"], 3
        ),
    }


def compare(ours: dict[str, Any], peer: dict[str, Any]) -> str:
    """helexa over llama.cpp, from one run."""
    parts = [
        f"{phase} {peer[key]:.1f} tokens/s, helexa is {ours[key] / peer[key]:.2f}x"
        for phase, key in (("prefill", "prefill_tokens_per_second"), ("decode", "decode_tokens_per_second"))
    ]
    return f"{'llama.cpp':>12}  {'; '.join(parts)}"


if __name__ == "__main__":
    sys.exit(main())
