"""The row of an op's benchmark: what a call took beside the ceilings of where it ran, in the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.engine.goals import judged_op
from helexa_engine.cli import machine

from .place import Place


def print_row(
    benchmark: str,
    case: dict[str, Any],
    where: Place,
    *,
    seconds: float,
    nbytes: float,
    operations: float,
    rate: float,
    json_file: str | None = None,
) -> None:
    """Prints one line of JSON, and appends it to ``json_file``.

    Args:
        case: what was measured, in fields of the benchmark's own.
        seconds: of one call.
        nbytes, operations: what a call must read and multiply at least.
        rate: operations a second; ``roofline`` is the share of the slower one of this and the bandwidth.
    """
    row = {
        "benchmark": benchmark,
        **case,
        "seconds": seconds,
        "bytes": nbytes,
        "gigabytes_per_second": nbytes / seconds / 1e9,
        "gigaflops": operations / seconds / 1e9,
        "roofline": max(nbytes / where.bandwidth, operations / rate) / seconds,
        "read_gigabytes_per_second": where.bandwidth / 1e9,
        "multiply_gigaflops": rate / 1e9,
        **where.described,
        "commit": machine.commit(),
        "machine": machine.describe(),
    }
    text = json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()})
    print(text, flush=True)
    if where.name == "cuda":
        for item in judged_op(row):
            print(item, flush=True)
    if json_file is not None:
        path = Path(json_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as lines:
            lines.write(text + "\n")
