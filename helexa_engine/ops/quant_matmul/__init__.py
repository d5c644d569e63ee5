"""``out = epilogue(norm(x) @ [parts].T)``: RMSNorm, merged quantised matmul, SwiGLU and residual in one op.

Functions of an implementation:

``pack(quant_type, data, rows, cols, *, scale)``
    ``data`` [bytes] uint8 as in a GGUF file, row-major -> a matrix in the implementation's own layout. Its products are multiplied
    with ``scale``.
``quant_matmul(x, parts, *, norm_weight, norm_eps, activation, residual, out, exact)``
    ``x`` [T, K] float32; ``parts`` packed matrices [N_i, K] whose outputs stand side by side; -> [T, N] float32.
"""

from __future__ import annotations

from ..registry import Implementation, Op

quant_matmul = Op(
    "quant_matmul",
    "helexa_engine.ops.quant_matmul.reference",
    Implementation("cuda", "cuda", "helexa_engine.ops.quant_matmul.cuda", computes_in="int8"),
    Implementation("native", "cpu", "helexa_engine.ops.quant_matmul.native", computes_in="int8"),
)

__all__ = ["quant_matmul"]
