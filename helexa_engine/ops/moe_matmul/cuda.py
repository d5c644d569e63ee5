"""``moe_matmul`` on CUDA: see ``csrc/cuda/moe_router.cu`` and ``csrc/cuda/moe_matmul.cu``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ...errors import InvalidRequest
from ...quant.types import QuantType
from .. import cuda
from ..upload import upload_planes
from .experts import Experts
from .reference import check_stack

#: Up to so many tokens take two launches behind the router's one: ``kFewTokens`` of ``csrc/cuda/moe_router.h``.
FEW_TOKENS = 8


@dataclass(frozen=True)
class PlaneStack:
    """``stack`` matrices [rows, cols] in the planes of one with ``stack * rows`` rows.

    ``scales`` [stack] float32 or None multiply the products.
    """

    quant_type: QuantType
    planes: torch.Tensor
    stack: int
    rows: int
    cols: int
    scales: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        return int(self.planes.nbytes)


@dataclass(frozen=True)
class Router:
    """``weight`` [E, H] float32, with a shared expert its gate as one more row; ``ticket`` [1] counts the blocks of a launch."""

    weight: torch.Tensor
    shared: bool
    ticket: torch.Tensor

    @property
    def num_experts(self) -> int:
        return len(self.weight) - self.shared


def pack_experts(
    quant_type: QuantType,
    data: np.ndarray,
    rows: int,
    cols: int,
    *,
    scales: tuple[float, ...] = (),
    mapped: bool = False,
) -> PlaneStack:
    """Brings the experts to the device, in planes.

    Raises:
        InvalidRequest: ``mapped``: a device's kernels cannot read the file.
        ValueError: ``data`` has the wrong number of bytes, or ``rows`` or ``cols`` is no multiple of 32.
    """
    if mapped:
        raise InvalidRequest(
            "mmap_experts", "experts can stay in the file on the CPU only; leave it out, or choose device cpu"
        )
    check_stack(quant_type, data, rows, cols)
    if rows % 32 or cols % 32:
        raise ValueError(
            f"pack_experts: rows and cols: expected multiples of 32 for experts on CUDA, got {rows} x {cols}"
        )
    planes = upload_planes(quant_type, data, len(data) * rows, cols)
    of_experts = torch.tensor(scales, dtype=torch.float32, device=planes.device) if scales else None
    return PlaneStack(quant_type, planes, len(data), rows, cols, of_experts)


def pack_router(weight: torch.Tensor, shared_gate: torch.Tensor | None = None) -> Router:
    """One float32 matrix: the shared expert's gate is its last row."""
    rows = weight if shared_gate is None else torch.cat([weight, shared_gate[None]])
    rows = rows.to(torch.float32).contiguous()
    return Router(rows, shared_gate is not None, torch.zeros(1, dtype=torch.int32, device=rows.device))


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
) -> torch.Tensor:
    """See :mod:`helexa_engine.ops.moe_matmul`. Matrices are :class:`PlaneStack`."""
    _check(x, router, experts, shared, top_k)
    if not len(x):
        return x
    for first in range(0, len(x), FEW_TOKENS):
        rows = x[first : first + FEW_TOKENS]
        routed = _route(rows, router, norm_weight, norm_eps, top_k, norm_topk_prob)
        _few(rows, router, routed, experts, shared, top_k)
    return x


@dataclass(frozen=True)
class _Routed:
    """What ``moe_router`` leaves of rows [T, H]: normalised as float32, and as int8 codes with scales [T, H / 16, 2]; the experts
    [T, top_k] that each row goes to, ascending, and their weights with the shared expert's last."""

    normed: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor


def _route(
    x: torch.Tensor,
    router: Router,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
    top_k: int,
    norm_topk_prob: bool,
) -> _Routed:
    num_rows, hidden = x.shape
    routed = _Routed(
        torch.empty_like(x),
        _empty(x, torch.uint8, num_rows, hidden),
        _empty(x, torch.float32, num_rows, hidden // 16, 2),
        _empty(x, torch.int32, num_rows, top_k),
        _empty(x, torch.float32, num_rows, top_k + router.shared),
    )
    logits = _empty(x, torch.float32, num_rows, len(router.weight))
    cuda.require_kernels().moe_router(
        x.data_ptr(),
        num_rows,
        hidden,
        norm_weight.data_ptr() if norm_weight is not None else 0,
        norm_eps,
        router.weight.data_ptr(),
        router.num_experts,
        router.shared,
        top_k,
        norm_topk_prob,
        router.ticket.data_ptr(),
        logits.data_ptr(),
        routed.normed.data_ptr(),
        0,
        routed.codes.data_ptr(),
        routed.scales.data_ptr(),
        routed.chosen.data_ptr(),
        routed.weights.data_ptr(),
        cuda.stream(x),
    )
    return routed


def _few(
    x: torch.Tensor, router: Router, routed: _Routed, experts: Experts, shared: Experts | None, top_k: int
) -> None:
    size = len(x) * (top_k * experts.gate.rows + (shared.gate.rows if shared is not None else 0))
    hidden, codes = _empty(x, torch.float32, size), _empty(x, torch.uint8, size)
    scales = _empty(x, torch.float32, size // 8)
    cuda.require_kernels().moe_matmul_few(
        x.data_ptr(),
        len(x),
        router.num_experts,
        top_k,
        _stacks(experts),
        _stacks(shared),
        routed.chosen.data_ptr(),
        routed.weights.data_ptr(),
        routed.normed.data_ptr(),
        routed.codes.data_ptr(),
        routed.scales.data_ptr(),
        hidden.data_ptr(),
        codes.data_ptr(),
        scales.data_ptr(),
        cuda.stream(x),
    )


def _empty(like: torch.Tensor, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


_NO_STACK = (0, 0, 0, 0, 0)


def _stacks(experts: Experts | None) -> tuple[tuple[int, int, int, int, int], ...]:
    """As the kernels' functions take them: type, addresses of planes and scales, rows, cols."""
    if experts is None:
        return (_NO_STACK,) * 3
    return tuple(
        (s.quant_type.number, s.planes.data_ptr(), s.scales.data_ptr() if s.scales is not None else 0, s.rows, s.cols)
        for s in experts
    )


def _check(x: torch.Tensor, router: Router, experts: Experts, shared: Experts | None, top_k: int) -> None:
    cols = router.weight.shape[1]
    if x.dtype != torch.float32 or not x.is_contiguous() or x.dim() != 2 or x.shape[1] != cols:
        raise ValueError(f"moe_matmul: x: expected contiguous float32 [T, {cols}], got {x.dtype} {tuple(x.shape)}")
    if any(stack is None for stack in experts):
        raise ValueError("moe_matmul: experts: expected a gate, an up and a down, got None")
    num_experts = experts.gate.stack
    for name, stacks, count in (("experts", experts, num_experts), ("shared", shared, 1)):
        if stacks is None:
            continue
        width = stacks.gate.rows
        for stack, rows, columns in zip(stacks, (width, width, cols), (cols, cols, width), strict=True):
            if (stack.stack, stack.rows, stack.cols) != (count, rows, columns):
                raise ValueError(
                    f"moe_matmul: {name}: expected {count} of [{rows}, {columns}], "
                    f"got {stack.stack} of [{stack.rows}, {stack.cols}]"
                )
    expected = num_experts + (shared is not None)
    if len(router.weight) != expected or router.shared != (shared is not None):
        raise ValueError(f"moe_matmul: router: expected {expected} rows, got {len(router.weight)}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"moe_matmul: top_k: expected 1 to {num_experts}, got {top_k}")
