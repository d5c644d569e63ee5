"""The row of an op's benchmark: what a call took beside the machine's ceilings in the same run."""

from __future__ import annotations

import json
from typing import Any

from helexa_engine.cli import machine
from helexa_engine.ops.registry import require_native


def print_row(
    benchmark: str,
    case: dict[str, Any],
    *,
    seconds: float,
    nbytes: float,
    operations: float,
    bandwidth: float,
    rate: float,
) -> None:
    """Prints one line of JSON.

    Args:
        case: what was measured, in fields of the benchmark's own.
        seconds: of one call.
        nbytes, operations: what a call must read and multiply at least.
        bandwidth, rate: the ceilings, bytes and operations a second; ``roofline`` is the share of the slower one.
    """
    native = require_native()
    row = {
        "benchmark": benchmark,
        **case,
        "seconds": seconds,
        "bytes": nbytes,
        "gigabytes_per_second": nbytes / seconds / 1e9,
        "gigaflops": operations / seconds / 1e9,
        "roofline": max(nbytes / bandwidth, operations / rate) / seconds,
        "read_gigabytes_per_second": bandwidth / 1e9,
        "multiply_gigaflops": rate / 1e9,
        "instruction_set": native.cpu_isa(),
        "threads": native.num_threads(),
        "commit": machine.commit(),
        "machine": machine.describe(),
    }
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}), flush=True)
