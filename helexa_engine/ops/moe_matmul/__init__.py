"""A sparse feed-forward block in one op: ``x += sum over the chosen experts of weight * expert(norm(x))``.

An expert is ``down(silu(gate(y)) * up(y))``. The router is a float32 matrix; its logits' softmax over *all* experts, in float32, gives
the weights; the ``top_k`` largest are taken (of equal ones the lowest index first) and with ``norm_topk_prob`` divided by their sum.
A shared expert, where there is one, serves every token with weight ``sigmoid(gate . y)``.

Functions of an implementation:

``pack_experts(quant_type, data, rows, cols, *, mapped)``
    ``data`` [E, bytes] uint8, each row a matrix [rows, cols] as in a GGUF file -> a stack in the implementation's own layout.
    ``mapped`` leaves the weights where they are and packs what is used as it is used: same results, no memory.
``pack_router(weight, shared_gate)``
    [E, H] float32 and [H] float32 or None -> the router in the implementation's own layout.
``moe_matmul(x, router, experts, shared, *, norm_weight, norm_eps, top_k, norm_topk_prob)``
    ``x`` [T, H] float32, added to in place and returned; ``experts`` and ``shared`` are :class:`Experts` or None.
"""

from __future__ import annotations

from ..registry import Implementation, Op
from .experts import Experts

moe_matmul = Op(
    "moe_matmul",
    "helexa_engine.ops.moe_matmul.reference",
    Implementation("cuda", "cuda", "helexa_engine.ops.moe_matmul.cuda", computes_in="int8"),
    Implementation("native", "cpu", "helexa_engine.ops.moe_matmul.native", computes_in="int8"),
)

__all__ = ["Experts", "moe_matmul"]
