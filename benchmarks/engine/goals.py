"""What a run on a card is held against: the floor that may ship and the record that is aimed at, for each quantity and shape.

R is the share of the bandwidth that a copy reached in the same run, M the share of the rate that a product of bfloat16 matrices reached.
The figures are aims for one H200, not results.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from helexa_engine.presets import PRESETS, preset

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Goal:
    """Floor and record of one quantity; ``unit`` is ``R``, ``M``, ``us``, ``x`` ..."""

    floor: float
    record: float
    unit: str
    less_is_better: bool = False

    def verdict(self, measured: float) -> str:
        """``record``, ``floor`` or ``below``: what ``measured`` reaches."""
        sign = -1 if self.less_is_better else 1
        if sign * measured >= sign * self.record:
            return "record"
        return "floor" if sign * measured >= sign * self.floor else "below"


@dataclass(frozen=True, slots=True)
class Judged:
    """A quantity of a row beside its goal."""

    quantity: str
    measured: float
    goal: Goal

    def __str__(self) -> str:
        goal = self.goal
        return (
            f"{self.quantity:<34} {self.measured:8.3g} {goal.unit:<3} floor {goal.floor:g}, record {goal.record:g}: "
            f"{goal.verdict(self.measured)}"
        )


#: mix -> preset -> decode at batch 1 behind an empty context.
DECODE: dict[str, dict[str, Goal]] = {
    mix: {name: Goal(floor, record, "R") for name, (floor, record) in shapes.items()}
    for mix, shapes in {
        "Q4_K_M": {
            "qwen3.5-27b": (0.60, 0.73), "qwen3.5-9b": (0.45, 0.65), "qwen3.5-4b": (0.35, 0.55), "qwen3.5-0.8b": (0.17, 0.28),
            "qwen3.5-35b-a3b": (0.22, 0.36), "qwen3-8b": (0.45, 0.65),
        },
        "Q8_0": {
            "qwen3.5-27b": (0.68, 0.82), "qwen3.5-9b": (0.55, 0.77), "qwen3.5-4b": (0.45, 0.67), "qwen3.5-0.8b": (0.22, 0.38),
            "qwen3.5-35b-a3b": (0.28, 0.46),
        },
        "BF16": {
            "qwen3.5-27b": (0.78, 0.88), "qwen3.5-9b": (0.72, 0.85), "qwen3.5-4b": (0.62, 0.79), "qwen3.5-0.8b": (0.30, 0.52),
            "qwen3-0.6b": (0.25, 0.43),
        },
    }.items()
}  # fmt: skip

#: kind of model -> a decode step's time beyond its bytes, by layer.
OVERHEAD = {
    "dense": Goal(30, 12, "us", True),
    "hybrid": Goal(30, 15, "us", True),
    "experts": Goal(40, 20, "us", True),
}

#: kind of weights -> prefill from 4096 tokens, of models of four billion parameters and more.
PREFILL = {"BF16": Goal(0.45, 0.65, "M"), "quantised": Goal(0.35, 0.55, "M"), "experts": Goal(0.20, 0.35, "M")}
PREFILL_FROM = 4096
#: Shapes that are too small for that goal.
SMALL = ("qwen3-0.6b", "qwen3-1.7b", "qwen3.5-0.8b", "qwen3.5-2b")

#: answers together -> tokens a second over those of one.
AGGREGATE = {4: Goal(2.5, 3.3, "x"), 8: Goal(4, 5.5, "x"), 32: Goal(9, 14, "x")}

DELTA_STEP = Goal(12, 5, "us", True)  # convolution, gates and norms included, batch 1
ATTENTION_DECODE = Goal(0.50, 0.75, "R")  # heads of 256, batch 1
ATTENTION_CONTEXT = 32768
LOAD = Goal(5, 20, "GB/s")  # from the page cache to ready
PREFIX_HIT = Goal(40, 10, "ms", True)  # to the first token, beside the new tokens


def judged_op(row: Row) -> Iterator[Judged]:
    """What of a kernel's row on a card has a goal."""
    if row["benchmark"] == "gated_delta_rule" and row["tokens"] == 1 and "microseconds" in row:
        yield Judged("a delta net's step", row["microseconds"], DELTA_STEP)
    is_step = row["benchmark"] == "paged_attention" and row["tokens"] == 1
    if is_step and row["context"] == ATTENTION_CONTEXT and str(row["heads"]).endswith("x256"):
        yield Judged(f"attention behind {row['context']}, {row['kv_dtype']}", row["roofline"], ATTENTION_DECODE)


def kind_of(name: str) -> str:
    """``dense``, ``hybrid`` or ``experts``."""
    shape = preset(name)
    return "experts" if shape.num_experts else "hybrid" if shape.linear_num_key_heads else "dense"


def judged(row: Row) -> Iterator[Judged]:
    """What of an engine's or an aggregate's row on a card has a goal; nothing of rows of models that are no presets."""
    name, _, mix = str(row["model"]).partition(" ")
    if name not in PRESETS:
        return
    kind = kind_of(name)
    if row["benchmark"] == "aggregate":
        if row["sequences"] in AGGREGATE:
            yield Judged(f"{row['sequences']} together over one", row["times_single"], AGGREGATE[row["sequences"]])
        return
    if row["benchmark"] == "prefix":
        yield Judged("first token after a prefix hit", row["hit_seconds"] * 1e3, PREFIX_HIT)
        return
    if (decode := DECODE.get(mix, {}).get(name)) is not None and not row["decode_context"]:
        yield Judged("decode", row["decode_share_of_bandwidth"], decode)
    if not row["decode_context"]:
        yield Judged(f"overhead a layer, {kind}", row["decode_overhead_per_layer_microseconds"], OVERHEAD[kind])
    weights = "experts" if kind == "experts" else "BF16" if mix == "BF16" else "quantised"
    for prefill in row.get("prefills", ()):
        if prefill["tokens"] >= PREFILL_FROM and name not in SMALL:
            yield Judged(f"prefill {prefill['tokens']}, {weights}", prefill["share_of_matmul_rate"], PREFILL[weights])
    if not row.get("weights_shared", True):
        yield Judged("load", row["file_bytes"] / row["load_seconds"] / 1e9, LOAD)
