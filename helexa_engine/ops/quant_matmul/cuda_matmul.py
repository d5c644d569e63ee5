"""Products with more than eight rows on a CUDA device: ``csrc/cuda/quant_matmul.cu``, and torch's product of a matrix that is
decoded for it where there are many."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ...quant import types
from .. import cuda

if TYPE_CHECKING:
    from .cuda import PlanarMatrix

_kernels = cuda.require_kernels

#: Rows from which a matrix is decoded once and multiplied by the library. Decoding [4096, 4096] writes and reads 67 MB, about 20
#: microseconds on an H200, which the library's product of bfloat16 wins back against the fused kernel from about 500 rows on; on
#: cards with less bandwidth, whose fused product is as fast as the library's, decoding is about a tenth of 1024 rows' product.
#: Derived, not measured.
LIBRARY_ROWS = 1024

#: The same for bfloat16 weights, of which nothing is decoded: from where a product is bound by arithmetic.
LIBRARY_ROWS_BF16 = 128

#: Most bytes of decoded weights, and of products that wait for their end, at a time.
SCRATCH_BYTES = 64 << 20

#: Multiprocessors that splits are chosen for where there is no card.
_EMULATED_MULTIPROCESSORS = 4

#: Most matrices in a launch (``kMostMatmulParts``).
MOST_PARTS = 8


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _EMULATED_MULTIPROCESSORS
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def supports(parts: Sequence[PlanarMatrix]) -> bool:
    """Whether these may be multiplied here: whole groups of 32 columns, as every model has."""
    return len(parts) <= MOST_PARTS and all(part.cols % 32 == 0 and part.rows > 0 for part in parts)


def quant_matmul_many(
    x: torch.Tensor,
    parts: Sequence[PlanarMatrix],
    *,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
    gated: bool,
    add: bool,
    out: torch.Tensor,
    exact: bool,
) -> torch.Tensor:
    """``out`` [T, N] = (``add``: +=) product of checked arguments, see :func:`helexa_engine.ops.quant_matmul.cuda.quant_matmul`.

    Activations and weights are rounded to bfloat16 and sums are float32, of every type but F32: its products, and with ``exact``
    those of BF16 and F16, are sums of two or three of bfloat16 that make up about 16 bits of mantissa.
    """
    rows, cols = x.shape
    precise = exact or any(part.quant_type is types.F32 for part in parts)
    activations = torch.empty((2 if precise else 1, rows, cols), dtype=torch.bfloat16, device=x.device)
    _kernels().rms_norm(
        x.data_ptr(),
        rows,
        cols,
        norm_weight.data_ptr() if norm_weight is not None else 0,
        norm_eps,
        activations[0].data_ptr(),
        activations[1].data_ptr() if precise else 0,
        cuda.stream(x),
    )
    if _in_library(rows, parts, exact):
        _multiply_in_library(activations, parts, gated=gated, add=add, out=out)
    else:
        _multiply_fused(activations, parts, gated=gated, add=add, out=out, exact=exact)
    return out


def _in_library(rows: int, parts: Sequence[PlanarMatrix], exact: bool) -> bool:
    kinds = {part.quant_type for part in parts}
    if types.F32 in kinds or (exact and types.F16 in kinds):
        return False
    return rows >= (LIBRARY_ROWS_BF16 if kinds == {types.BF16} else LIBRARY_ROWS)


def _multiply_fused(
    activations: torch.Tensor, parts: Sequence[PlanarMatrix], *, gated: bool, add: bool, out: torch.Tensor, exact: bool
) -> None:
    kernels = _kernels()
    _, rows, cols = activations.shape
    heights = [part.rows for part in parts]
    splits = kernels.quant_matmul_splits(heights, cols, rows, gated, _multiprocessors(out.device))
    partial = torch.empty((splits, rows, sum(heights)), device=out.device) if splits > 1 else None
    kernels.quant_matmul(
        [(p.quant_type.number, p.planes.data_ptr(), p.rows, p.scale) for p in parts],
        cols,
        activations[0].data_ptr(),
        activations[1].data_ptr() if len(activations) > 1 else 0,
        rows,
        gated,
        exact,
        add,
        out.data_ptr(),
        splits,
        partial.data_ptr() if partial is not None else 0,
        cuda.stream(out),
    )


def _product(activations: torch.Tensor, weights: torch.Tensor, *, remainder: bool) -> torch.Tensor:
    """float32 [T, N] of bfloat16 [1 or 2, T, K] and [N, K]; sums are float32, as the output is: the setting that lets the library
    reduce in bfloat16 is for bfloat16 outputs."""

    def once(x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:
            return torch.mm(x, weights.T, out_dtype=torch.float32)
        return x.float() @ weights.float().T

    product = once(activations[0])
    return product.add_(once(activations[1])) if remainder else product


def _multiply_in_library(
    activations: torch.Tensor, parts: Sequence[PlanarMatrix], *, gated: bool, add: bool, out: torch.Tensor
) -> None:
    kernels, stream = _kernels(), cuda.stream(out)
    _, rows, cols = activations.shape
    half = len(parts) // 2
    columns = (
        [[gate, up] for gate, up in zip(parts[:half], parts[half:], strict=True)] if gated else [[p] for p in parts]
    )
    first = 0
    for together in columns:
        # A product of float32 is as long as its rows are many: both it and the weights are bounded.
        row_bytes = len(together) * max(2 * cols, 4 * rows)
        step = min(max(SCRATCH_BYTES // row_bytes // 128 * 128, 128), together[0].rows)
        for begin in range(0, together[0].rows, step):
            count = min(step, together[0].rows - begin)
            weights = _decoded(together, begin, count)
            product = _product(
                activations,
                weights,
                remainder=len(activations) > 1 and any(part.quant_type is types.BF16 for part in together),
            )
            kernels.finish_products(
                product.data_ptr(),
                1,
                rows,
                len(together) * count,
                together[0].scale,
                together[-1].scale,
                gated,
                add,
                out.data_ptr(),
                out.shape[1],
                first + begin,
                stream,
            )
        first += together[0].rows


def _decoded(together: Sequence[PlanarMatrix], begin: int, count: int) -> torch.Tensor:
    """Rows [begin, begin + count) of one or two matrices below each other, bfloat16."""
    cols = together[0].cols
    if len(together) == 1 and together[0].quant_type is types.BF16:  # its plane is the matrix
        return together[0].planes.view(torch.bfloat16).view(-1, cols)[begin : begin + count]
    weights = torch.empty((len(together) * count, cols), dtype=torch.bfloat16, device=together[0].planes.device)
    for i, part in enumerate(together):
        _kernels().dequantize_planes(
            part.quant_type.number,
            part.planes.data_ptr(),
            begin,
            count,
            part.rows,
            cols,
            weights[i * count :].data_ptr(),
            cuda.stream(weights),
        )
    return weights
