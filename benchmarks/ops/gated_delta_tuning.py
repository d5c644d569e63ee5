"""The search behind ``helexa_engine/ops/gated_delta_rule/tuning.json``, which ``python -m benchmarks.ops.gated_delta_rule --tune``
runs on a card: every tile of both kernels of the chunk form on one long prompt. What spills, or does not fit a block's shared memory,
is left out. The two kernels share only the chunk, so each is measured by itself."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helexa_engine.ops.gated_delta_rule.tuning import Tile, Tuning, head_dims, to_row

CHUNKS = (32, 64)  # divide a page, whose borders are those of prompt chunks and of snapshots
BLOCKS_V = (16, 32, 64)

#: Seconds of one launch, or None for what can't be taken.
Seconds = float | None
SolveKey = tuple[int, Tile]
AdvanceKey = tuple[int, int, Tile]


def tiles() -> list[Tile]:
    """Of either kernel."""
    return [Tile(*values) for values in itertools.product((16, 32, 64), (4, 8), (1, 2))]


def solve_candidates() -> list[SolveKey]:
    """(chunk, tile) of the kernel over all chunks at once."""
    return list(itertools.product(CHUNKS, tiles()))


def advance_candidates(head_v_dim: int) -> list[AdvanceKey]:
    """(chunk, block_v, tile) of the kernel from chunk to chunk."""
    columns = [block for block in BLOCKS_V if block <= head_v_dim]
    return list(itertools.product(CHUNKS, columns, tiles()))


def search(
    head_v_dim: int, time_solve: Callable[[SolveKey], Seconds], time_advance: Callable[[AdvanceKey], Seconds]
) -> tuple[Tuning, float]:
    """The fastest pair with one chunk, and its seconds.

    Raises:
        RuntimeError: no pair can be taken.
    """
    solves = {key: time_solve(key) for key in solve_candidates()}
    advances = {key: time_advance(key) for key in advance_candidates(head_v_dim)}
    found: list[tuple[float, Tuning]] = []
    for chunk in CHUNKS:
        solve = [(s, tile) for (its, tile), s in solves.items() if its == chunk and s is not None]
        advance = [(s, block, tile) for (its, block, tile), s in advances.items() if its == chunk and s is not None]
        if solve and advance:
            solve_seconds, solve_tile = min(solve, key=lambda row: row[0])
            advance_seconds, block_v, advance_tile = min(advance, key=lambda row: row[0])
            found.append((solve_seconds + advance_seconds, Tuning(chunk, block_v, solve_tile, advance_tile)))
    if not found:
        raise RuntimeError("every candidate spills or takes too much shared memory")
    seconds, tuning = min(found, key=lambda pair: pair[0])
    return tuning, seconds


def write_row(
    path: Path, architecture: str, head_k_dim: int, head_v_dim: int, tuning: Tuning, measured: dict[str, Any]
) -> None:
    """Puts a row into the table, in the place of an older one; ``measured`` says where and how it was found."""
    table = json.loads(path.read_text(encoding="utf-8"))
    rows = table.setdefault(architecture, {})
    rows[head_dims(head_k_dim, head_v_dim)] = to_row(tuning) | {"measured": measured}
    table = {"default": table.pop("default")} | dict(sorted(table.items()))
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


class Prompt:
    """One sequence's random activations on a card, and how long the kernels take over it."""

    def __init__(self, num_k_heads: int, num_v_heads: int, head_k_dim: int, head_v_dim: int, tokens: int) -> None:
        import torch

        from helexa_engine.ops.gated_delta_rule import triton as rule

        self._rule = rule
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device="cuda")

        qkv = normal(tokens, 2 * num_k_heads * head_k_dim + num_v_heads * head_v_dim)
        b, a = normal(tokens, num_v_heads), normal(tokens, num_v_heads)
        self._inputs = (
            qkv, qkv.stride(0), b, num_v_heads, a, num_v_heads, -normal(num_v_heads).exp(), normal(num_v_heads)
        )  # fmt: skip
        self._heads = (num_k_heads, num_v_heads, True)
        self._state = torch.zeros(1, num_v_heads, head_k_dim, head_v_dim, device="cuda")
        self._slots = torch.zeros(1, dtype=torch.int32, device="cuda")
        self._borders = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
        self._out = torch.empty(tokens, num_v_heads * head_v_dim, device="cuda")
        self._solved: dict[int, Any] = {}

    def time_solve(self, key: SolveKey) -> Seconds:
        """Of the kernel over all chunks at once."""
        chunk, tile = key
        head_k_dim = self._state.shape[2]

        def launch() -> Any:
            compiled, self._solved[chunk] = self._rule.solve(
                self._inputs, self._borders, self._heads, head_k_dim, chunk, tile
            )
            return compiled

        return self._seconds(launch)

    def time_advance(self, key: AdvanceKey) -> Seconds:
        """Of the kernel from chunk to chunk, on what the other one left for this chunk."""
        chunk, block_v, tile = key
        if chunk not in self._solved:
            return None

        def launch() -> Any:
            return self._rule.advance(
                self._inputs, self._solved[chunk], self._state, self._slots, self._borders, self._out, self._heads, chunk,
                block_v, tile,
            )  # fmt: skip

        return self._seconds(launch)

    def _seconds(self, launch: Callable[[], Any]) -> Seconds:
        import torch
        from triton.runtime.errors import OutOfResources

        try:
            compiled = launch()
        except OutOfResources:
            return None
        if compiled.n_spills:
            return None
        samples = []
        for _ in range(9):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(5):
                launch()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) / 5e3)
        return statistics.median(samples[1:])
