"""The place of each row's largest value: what greedy decoding takes of the logits.

``argmax(values, out)``: ``values`` [T, N] float32 -> ``out`` [T] int64, the first place among equals; a NaN counts as the largest of
all, so that it does not pass unseen. As a kernel it belongs to a recorded decode step, and every thread reads what it just wrote.
"""

from __future__ import annotations

from ..registry import Implementation, Op

argmax = Op(
    "argmax",
    "helexa_engine.ops.argmax.reference",
    Implementation("native", "cpu", "helexa_engine.ops.argmax.native"),
)

__all__ = ["argmax"]
