"""``out[t] = weight[ids[t]]``: rows of a packed table, dequantised, without expanding the table.

``quant_embedding(ids, weight)``: ``ids`` [T] int64, ``weight`` a matrix packed by the ``quant_matmul`` implementation of the same
name (tied heads share it; its scale counts) -> [T, K] float32. An id outside the table is a ValueError,
or on CUDA a row of NaN: the ids stay on the device.
"""

from __future__ import annotations

from ..registry import Implementation, Op

quant_embedding = Op(
    "quant_embedding",
    "helexa_engine.ops.quant_embedding.reference",
    Implementation(
        "cuda",
        "cuda",
        "helexa_engine.ops.quant_embedding.cuda",
        supports=lambda facts: facts.get("packed_by", "cuda") == "cuda",
    ),
    Implementation(
        "native",
        "cpu",
        "helexa_engine.ops.quant_embedding.native",
        supports=lambda facts: facts.get("packed_by", "native") == "native",
    ),
)

__all__ = ["quant_embedding"]
