"""How the chunk form is cut into tiles: a table, ``tuning.json``, which nothing but ``python -m benchmarks.ops.gated_delta_rule
--tune`` writes. Nobody's first request waits for a search.

A row is for one architecture (``"sm_90"``) and one pair of head dimensions (``"128x128"``, keys x values), of what was measured on
a card; ``"default"`` is for all others: what compiles everywhere without spilling a register.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("tuning.json")


@dataclass(frozen=True, slots=True)
class Tile:
    """Of one kernel: terms of a product over a head dimension that are in registers at once, warps, stages of loads."""

    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Tuning:
    """``chunk`` tokens (32 or 64, so that chunks end where pages do), ``block_v`` columns of a state that a program holds, and the
    tiles of the kernel over all chunks at once and of that from chunk to chunk."""

    chunk: int
    block_v: int
    solve: Tile
    advance: Tile


def from_row(row: dict[str, Any]) -> Tuning:
    """Of a row of the table."""
    return Tuning(row["chunk"], row["block_v"], Tile(**row["solve"]), Tile(**row["advance"]))


def to_row(tuning: Tuning) -> dict[str, Any]:
    """The inverse of :func:`from_row`."""
    return asdict(tuning)


@functools.cache
def read_table(path: Path = TABLE) -> dict[str, Any]:
    """The file."""
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return table


def head_dims(head_k_dim: int, head_v_dim: int) -> str:
    """How the table calls them."""
    return f"{head_k_dim}x{head_v_dim}"


@functools.cache
def tuning_for(architecture: str, head_k_dim: int, head_v_dim: int, path: Path = TABLE) -> Tuning:
    """The row of this architecture and these dimensions, else the default."""
    table = read_table(path)
    row = table.get(architecture, {}).get(head_dims(head_k_dim, head_v_dim), table["default"])
    return from_row(row)
