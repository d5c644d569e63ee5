"""llama.cpp beside us: its own ``llama-bench`` on the same file, with the same threads, lengths and repetitions."""

from __future__ import annotations

import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

from helexa_engine.ops.registry import require_native


def measure(program: Path, model: Path, ours: dict[str, Any]) -> dict[str, Any]:
    """A row like ``ours``. The bandwidth is measured again around its decode: a shared machine's changes from minute to minute."""
    prefill = _run(program, model, ours, "-p", ours["prefill_tokens"], "-n", 0)
    native = require_native()
    bandwidths = [native.read_bandwidth()]
    decode = _run(program, model, ours, "-p", 0, "-n", ours["decode_tokens"], "-d", ours["decode_context"])
    bandwidths.append(native.read_bandwidth())
    bandwidth = statistics.mean(bandwidths)
    decode_rate = statistics.median(decode["samples_ts"])
    step_bytes = ours["decode_bytes_per_token"] + ours.get("decode_kv_bytes_per_token", 0)
    shared = (
        "benchmark", "model", "date", "machine", "threads", "repetitions", "file_bytes",
        "prefill_tokens", "decode_tokens", "decode_context", "decode_bytes_per_token", "busy_processes",
    )  # fmt: skip
    return {key: ours[key] for key in shared if key in ours} | {
        "engine": "llama.cpp",
        "commit": prefill["build_commit"],
        "read_bytes_per_second": round(bandwidth),
        "prefill_tokens_per_second": round(statistics.median(prefill["samples_ts"]), 2),
        "prefill_samples": [round(rate, 2) for rate in prefill["samples_ts"]],
        "decode_tokens_per_second": round(decode_rate, 2),
        "decode_samples": [round(rate, 2) for rate in decode["samples_ts"]],
        "decode_share_of_bandwidth": round(decode_rate * step_bytes / bandwidth, 3),
    }


def memory_changed(ours: dict[str, Any], peer: dict[str, Any]) -> bool:
    """Whether memory was more than a tenth faster for one of the two: then their decodes do not compare."""
    one, other = ours["read_bytes_per_second"], peer["read_bytes_per_second"]
    return bool(max(one, other) > 1.1 * min(one, other))


def compare(ours: dict[str, Any], peer: dict[str, Any]) -> str:
    """helexa over llama.cpp, from one run."""
    parts = [
        f"{phase} {peer[key]:.1f} tokens/s, helexa is {ours[key] / peer[key]:.2f}x"
        for phase, key in (("prefill", "prefill_tokens_per_second"), ("decode", "decode_tokens_per_second"))
    ]
    text = f"{'llama.cpp':>12}  {'; '.join(parts)}; memory reads at {peer['read_bytes_per_second'] / 1e9:.1f} GB/s"
    return text + (", which is not what it was" if memory_changed(ours, peer) else "")


def _run(program: Path, model: Path, ours: dict[str, Any], *test: str | int) -> dict[str, Any]:
    runs = ["-t", ours["threads"], "-r", ours["repetitions"], "-o", "jsonl"]
    command = [str(program), "-m", str(model), *map(str, test), *map(str, runs)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return result
