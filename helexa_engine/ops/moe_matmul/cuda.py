"""``moe_matmul`` on CUDA: see ``csrc/cuda/moe_router.cu``, ``moe_matmul.cu`` for a few tokens, ``moe_grouped.cu`` for many."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ...errors import InvalidRequest
from ...quant.types import F32, QuantType
from .. import cuda
from ..upload import upload_planes
from .experts import Experts
from .reference import check_stack

#: Up to so many tokens take two launches behind the router's one: ``kFewTokens`` of ``csrc/cuda/moe_router.h``.
FEW_TOKENS = 8
#: So many are computed together at most: bounds the memory of what lies between the launches.
MOST_TOKENS = 2048
#: Tokens of a tile of one expert's: ``kNarrowMoeTile`` and ``kWideMoeTile`` of ``csrc/cuda/moe_grouped.h``.
NARROW_TILE, WIDE_TILE = 32, 128


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
    for first in range(0, len(x), MOST_TOKENS):
        rows = x[first : first + MOST_TOKENS]
        few = len(rows) <= FEW_TOKENS
        routed = _route(rows, router, norm_weight, norm_eps, top_k, norm_topk_prob, few)
        (_few if few else _many)(rows, router, routed, experts, shared, top_k)
    return x


@dataclass(frozen=True)
class _Routed:
    """What ``moe_router`` leaves of rows [T, H]: the experts [T, top_k] that each goes to, ascending, and their weights with the
    shared expert's last; the rows normalised as float32, and for a few tokens as int8 ``codes`` with ``scales`` [T, H / 16, 2], for
    many as bfloat16 with what rounding left."""

    chosen: torch.Tensor
    weights: torch.Tensor
    normed: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    rounded: torch.Tensor
    remainder: torch.Tensor


def _route(
    x: torch.Tensor,
    router: Router,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
    top_k: int,
    norm_topk_prob: bool,
    few: bool,
) -> _Routed:
    num_rows, hidden = x.shape
    for_few, for_many = (num_rows, 0) if few else (0, num_rows)
    routed = _Routed(
        _empty(x, torch.int32, num_rows, top_k),
        _empty(x, torch.float32, num_rows, top_k + router.shared),
        torch.empty_like(x),
        _empty(x, torch.uint8, for_few, hidden),
        _empty(x, torch.float32, for_few, hidden // 16, 2),
        _empty(x, torch.bfloat16, for_many, hidden),
        _empty(x, torch.bfloat16, for_many, hidden),
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
        routed.rounded.data_ptr(),
        routed.remainder.data_ptr(),
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
        tuple(map(_stack, experts)),
        tuple(map(_stack, shared)) if shared is not None else (_NO_STACK,) * 3,
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


@dataclass(frozen=True)
class _Groups:
    """The pairs (token, rank) sorted by expert, ``pair`` at each place and ``place`` of each pair, and cut into ``most`` tiles or fewer."""

    pair: torch.Tensor
    place: torch.Tensor
    tiles: torch.Tensor
    num_tiles: torch.Tensor
    most: int
    tile_rows: int


def _group(routed: _Routed, num_experts: int) -> _Groups:
    pairs = routed.chosen.numel()
    tile_rows = WIDE_TILE if pairs >= WIDE_TILE * num_experts else NARROW_TILE
    most = pairs // tile_rows + min(pairs, num_experts)
    groups = _Groups(
        _empty(routed.chosen, torch.int32, pairs),
        _empty(routed.chosen, torch.int32, pairs),
        _empty(routed.chosen, torch.int32, most, 3),
        _empty(routed.chosen, torch.int32, 1),
        most,
        tile_rows,
    )
    cuda.require_kernels().moe_group(
        routed.chosen.data_ptr(),
        pairs,
        num_experts,
        tile_rows,
        groups.pair.data_ptr(),
        groups.place.data_ptr(),
        groups.tiles.data_ptr(),
        groups.num_tiles.data_ptr(),
        cuda.stream(routed.chosen),
    )
    return groups


def _many(
    x: torch.Tensor, router: Router, routed: _Routed, experts: Experts, shared: Experts | None, top_k: int
) -> None:
    groups = _group(routed, router.num_experts)
    products = _products(routed, experts, groups, len(x) * top_k, router.num_experts, top_k)
    of_shared = _products(routed, shared, None, len(x), 1, 1) if shared is not None else None
    cuda.require_kernels().moe_sum(
        x.data_ptr(),
        *x.shape,
        top_k,
        routed.weights.data_ptr(),
        groups.place.data_ptr(),
        products.data_ptr(),
        of_shared.data_ptr() if of_shared is not None else 0,
        cuda.stream(x),
    )


def _products(
    routed: _Routed, stacks: Experts, groups: _Groups | None, places: int, num_experts: int, top_k: int
) -> torch.Tensor:
    """[places, H] float32: of each pair its expert's, or without groups of each row the one expert's."""
    kernels, stream = cuda.require_kernels(), cuda.stream(routed.normed)
    gated = _empty(routed.normed, torch.bfloat16, places, stacks.gate.rows)
    remainder = torch.empty_like(gated) if stacks.down.quant_type is F32 else None
    out = _empty(routed.normed, torch.float32, places, stacks.down.rows)
    if groups is not None:
        tiles = (groups.tiles.data_ptr(), groups.num_tiles.data_ptr(), groups.most)
        pair, tile_rows = groups.pair.data_ptr(), groups.tile_rows
    else:
        tiles, pair, tile_rows = (0, 0, 0), 0, WIDE_TILE if places > NARROW_TILE else NARROW_TILE
    kernels.moe_grouped(
        _stack(stacks.gate),
        _stack(stacks.up),
        num_experts,
        routed.rounded.data_ptr(),
        routed.remainder.data_ptr(),
        pair,
        top_k,
        *tiles,
        places,
        tile_rows,
        gated.data_ptr(),
        remainder.data_ptr() if remainder is not None else 0,
        stream,
    )
    kernels.moe_grouped(
        _stack(stacks.down),
        _NO_STACK,
        num_experts,
        gated.data_ptr(),
        remainder.data_ptr() if remainder is not None else 0,
        0,
        1,
        *tiles,
        places,
        tile_rows,
        out.data_ptr(),
        0,
        stream,
    )
    return out


def _empty(like: torch.Tensor, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


_StackArgument = tuple[int, int, int, int, int]
_NO_STACK: _StackArgument = (0, 0, 0, 0, 0)


def _stack(stack: PlaneStack) -> _StackArgument:
    """As the kernels' functions take it: type, addresses of planes and scales, rows, cols."""
    scales = stack.scales.data_ptr() if stack.scales is not None else 0
    return stack.quant_type.number, stack.planes.data_ptr(), scales, stack.rows, stack.cols


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
