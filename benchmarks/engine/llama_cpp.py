"""llama.cpp beside us: its own ``llama-bench`` on the same file, with the same threads, lengths and repetitions."""

from __future__ import annotations

import json
import statistics
import subprocess
from pathlib import Path
from typing import Any


def measure(program: Path, model: Path, ours: dict[str, Any]) -> dict[str, Any]:
    """A row like ``ours``, with whose run it shares the bandwidth."""
    prefill = _run(program, model, ours, "-p", ours["prefill_tokens"], "-n", 0)
    decode = _run(program, model, ours, "-p", 0, "-n", ours["decode_tokens"], "-d", ours["decode_context"])
    decode_rate = statistics.median(decode["samples_ts"])
    step_bytes = ours["decode_bytes_per_token"] + ours.get("decode_kv_bytes_per_token", 0)
    shared = (
        "benchmark", "model", "date", "machine", "threads", "repetitions", "read_bytes_per_second", "file_bytes",
        "prefill_tokens", "decode_tokens", "decode_context", "decode_bytes_per_token", "busy_processes",
    )  # fmt: skip
    return {key: ours[key] for key in shared if key in ours} | {
        "engine": "llama.cpp",
        "commit": prefill["build_commit"],
        "prefill_tokens_per_second": round(statistics.median(prefill["samples_ts"]), 2),
        "prefill_samples": [round(rate, 2) for rate in prefill["samples_ts"]],
        "decode_tokens_per_second": round(decode_rate, 2),
        "decode_samples": [round(rate, 2) for rate in decode["samples_ts"]],
        "decode_share_of_bandwidth": round(decode_rate * step_bytes / ours["read_bytes_per_second"], 3),
    }


def compare(ours: dict[str, Any], peer: dict[str, Any]) -> str:
    """helexa over llama.cpp, from one run."""
    parts = [
        f"{phase} {peer[key]:.1f} tokens/s, helexa is {ours[key] / peer[key]:.2f}x"
        for phase, key in (("prefill", "prefill_tokens_per_second"), ("decode", "decode_tokens_per_second"))
    ]
    return f"{'llama.cpp':>12}  {'; '.join(parts)}"


def _run(program: Path, model: Path, ours: dict[str, Any], *test: str | int) -> dict[str, Any]:
    runs = ["-t", ours["threads"], "-r", ours["repetitions"], "-o", "jsonl"]
    command = [str(program), "-m", str(model), *map(str, test), *map(str, runs)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return result
