"""float32 to a block format, with the search that :mod:`helexa_engine.quant.quantize` defines.

``quantize(values, quant_type, importance=None)``: float32 numpy [..., cols] -> uint8 [..., row bytes]. The implementations give
the same bytes.
"""

from __future__ import annotations

from ..registry import Implementation, Op

quantize = Op(
    "quantize",
    "helexa_engine.ops.quantize.reference",
    Implementation("native", "cpu", "helexa_engine.ops.quantize.native"),
)

__all__ = ["quantize"]
