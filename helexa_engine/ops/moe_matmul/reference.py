"""The twin of ``moe_matmul`` in plain PyTorch: dequantise one expert at a time, multiply. Only experts in use are touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ...quant.dequantize import dequantize
from ...quant.types import QuantType
from ..quant_matmul.reference import rms_norm
from .experts import Experts


@dataclass(frozen=True)
class BlockStack:
    """``stack`` matrices [rows, cols] as the file stores them: ``data`` uint8 [stack, rows * quant_type.row_bytes(cols)].

    ``scales``, one a matrix or none, multiply the products.
    """

    quant_type: QuantType
    data: np.ndarray
    rows: int
    cols: int
    mapped: bool
    scales: tuple[float, ...] = ()

    @property
    def stack(self) -> int:
        return int(self.data.shape[0])

    @property
    def nbytes(self) -> int:
        return 0 if self.mapped else int(self.data.nbytes)

    def dequantized(self, member: int) -> torch.Tensor:
        """One matrix as float32 [rows, cols], without its scale."""
        return torch.from_numpy(dequantize(self.quant_type, self.data[member], (self.rows, self.cols)))


@dataclass(frozen=True)
class Router:
    """``weight`` [E, H] and the shared expert's gate [H], float32."""

    weight: torch.Tensor
    shared_gate: torch.Tensor | None


def check_stack(quant_type: QuantType, data: np.ndarray, rows: int, cols: int) -> None:
    """Raises ValueError unless ``data`` holds matrices [rows, cols] of this type."""
    expected = rows * quant_type.row_bytes(cols)
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != expected or data.strides[1] != 1:
        raise ValueError(
            f"pack_experts: data: expected uint8 [E, {expected}] for experts of {rows} x {cols} {quant_type}, "
            f"got {data.dtype} {data.shape}"
        )


def pack_experts(
    quant_type: QuantType,
    data: np.ndarray,
    rows: int,
    cols: int,
    *,
    scales: tuple[float, ...] = (),
    mapped: bool = False,
) -> BlockStack:
    """Keeps the blocks as they are. Raises ValueError when ``data`` has the wrong number of bytes."""
    check_stack(quant_type, data, rows, cols)
    return BlockStack(quant_type, data if mapped else np.array(data, copy=True), rows, cols, mapped, scales)


def pack_router(weight: torch.Tensor, shared_gate: torch.Tensor | None = None) -> Router:
    """Keeps the tensors."""
    return Router(weight, shared_gate)


def route(logits: torch.Tensor, top_k: int, norm_topk_prob: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits [T, E] -> chosen experts [T, top_k] int64, largest first, and their weights [T, top_k].

    Of equal logits the lowest index comes first, so that the choice does not depend on how a sort breaks ties.
    """
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = torch.softmax(logits, dim=-1).gather(-1, order)
    return order, weights / weights.sum(-1, keepdim=True) if norm_topk_prob else weights


#: What a matrix of a type sees of its input; the identity, or in tests the rounding of an implementation.
Seen = Callable[[torch.Tensor, QuantType], torch.Tensor]


def _expert(experts: Experts, member: int, y: torch.Tensor, seen: Seen) -> torch.Tensor:
    def times(stack: BlockStack, value: torch.Tensor) -> torch.Tensor:
        value = seen(value, stack.quant_type)
        product = value @ stack.dequantized(member).to(value.dtype).T
        return product * stack.scales[member] if stack.scales else product

    return times(experts.down, torch.nn.functional.silu(times(experts.gate, y)) * times(experts.up, y))


def moe_matmul(
    x: torch.Tensor,
    router: Router,
    experts: Experts,
    shared: Experts | None = None,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    top_k: int,
    norm_topk_prob: bool = True,
    compute_dtype: torch.dtype = torch.float32,
    seen: Seen = lambda value, _: value,
) -> torch.Tensor:
    """See :mod:`helexa_engine.ops.moe_matmul`. With a ``compute_dtype`` other than x's, x stays as it is."""
    if not 1 <= top_k <= experts.gate.stack:
        raise ValueError(f"moe_matmul: top_k: expected 1 to {experts.gate.stack}, got {top_k}")
    y = x.to(compute_dtype)
    if norm_weight is not None:
        y = rms_norm(y, norm_weight, norm_eps)
    chosen, weights = route(y @ router.weight.to(compute_dtype).T, top_k, norm_topk_prob)
    total = torch.zeros_like(y)
    for member in sorted(set(chosen.flatten().tolist())):
        token, rank = (chosen == member).nonzero(as_tuple=True)
        total.index_add_(0, token, weights[token, rank, None] * _expert(experts, member, y[token], seen))
    if shared is not None:
        assert router.shared_gate is not None, "a shared expert has a gate"
        gate = torch.sigmoid(y @ router.shared_gate.to(compute_dtype))
        total += gate[:, None] * _expert(shared, 0, y, seen)
    return x.add_(total) if compute_dtype == x.dtype else x.to(compute_dtype) + total
