"""``csrc/cuda/quant_matmul.cu`` and ``rms_norm.cu`` against float64, within float32 rounding of what they round to bfloat16."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from helexa_engine.quant import dequantize, types
from helexa_engine.quant.types import QuantType
from tests.engine.ops.test_quant_matmul import activations, raw_weights
from tests.native.test_cuda_quant_matvec import check, silu_bound
from tests.native.test_cuda_repack import TYPES, planes_of

UNIT = 2.0**-24  # of float32 rounding
Matrix = tuple[QuantType, np.ndarray, int]


def bits(x: torch.Tensor) -> np.ndarray:
    """A bfloat16 tensor as a kernel's array."""
    return x.contiguous().view(torch.int16).numpy().view(np.uint16)


def product(
    core,
    x: torch.Tensor,
    parts: Sequence[Matrix],
    *,
    scales: Sequence[float] = (),
    silu_mul: bool = False,
    residual: torch.Tensor | None = None,
    exact: bool = False,
    splits: int = 1,
) -> torch.Tensor:
    """``x`` [T, K] float32 times matrices (type, data, rows) side by side."""
    rows, cols = x.shape
    products = sum(n for _, _, n in parts)
    packed = [core.put(planes_of(t, data, n, cols)) for t, data, n in parts]
    described = [
        (t.number, core.address(p), n, scales[i] if scales else 1.0)
        for i, ((t, _, n), p) in enumerate(zip(parts, packed, strict=True))
    ]
    rounded = x.bfloat16()
    given, remainder = core.put(bits(rounded)), core.put(bits((x - rounded.float()).bfloat16()))
    poisoned = np.full((rows, products // (2 if silu_mul else 1)), np.nan, np.float32)
    out = core.put(residual.numpy() if residual is not None else poisoned)
    partial = core.put(np.full((splits, rows, products), np.nan, np.float32))
    core.kernels.quant_matmul(
        described,
        cols,
        core.address(given),
        core.address(remainder) if exact or types.F32 in [t for t, _, _ in parts] else 0,
        rows,
        silu_mul,
        exact,
        residual is not None,
        core.address(out),
        splits,
        core.address(partial) if splits > 1 else 0,
    )
    return torch.from_numpy(core.get(out))


def truth_and_bound(
    quant_type: QuantType, data: np.ndarray, rows: int, cols: int, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The product in float64 of weights and activations rounded to bfloat16, and how far from it sums in float32 can lead.

    Products of two bfloat16 are exact in float32, and a sum of n terms is off by at most ``n u`` of their magnitudes (Higham, Accuracy
    and Stability of Numerical Algorithms, 4.2); a tensor core cuts off instead of rounding, which is ``2 u``.
    """
    weights = torch.from_numpy(dequantize.dequantize(quant_type, data, (rows, cols))).bfloat16().double()
    meets = x.bfloat16().double()
    return meets @ weights.T, 2 * (cols + 2) * UNIT * (meets.abs() @ weights.abs().T)


@pytest.mark.parametrize("quant_type", TYPES, ids=str)
def test_every_type(cuda_core, quant_type: QuantType) -> None:
    """Nine rows; columns of one and of several blocks, of which those of 32 are no whole steps."""
    block = max(quant_type.block_size, 32)
    for n, cols in ((37, 3 * block), (1, block)):
        data = raw_weights(quant_type, n, cols)
        x = activations(9, cols)
        parts = [(quant_type, data, n)]
        if quant_type is types.F32:  # a sum of three products
            weights = torch.from_numpy(dequantize.dequantize(quant_type, data, (n, cols))).double()
            bound = (2.0**-15 + 6 * (cols + 2) * UNIT) * (x.double().abs() @ weights.abs().T)
            check(product(cuda_core, x, parts, exact=True), x.double() @ weights.T, bound, (n, cols))
        else:
            check(product(cuda_core, x, parts), *truth_and_bound(quant_type, data, n, cols, x), (n, cols))


@pytest.mark.parametrize("quant_type", TYPES, ids=str)
def test_the_bound_notices_one_wrong_bit(cuda_core, quant_type: QuantType) -> None:
    """The comparison above can fail."""
    n, cols = 3, max(quant_type.block_size, 32)
    data = raw_weights(quant_type, n, cols)
    x = activations(9, cols)
    before = dequantize.dequantize(quant_type, data, (n, cols))
    for place in range(quant_type.row_bytes(cols)):
        wrong = data.copy()
        wrong[place] ^= 0x80 if not quant_type.is_quantised else 1
        changed = np.abs(dequantize.dequantize(quant_type, wrong, (n, cols)) - before)
        if changed.max() > np.abs(before).mean() / 8:
            break
    truth, bound = truth_and_bound(quant_type, wrong, n, cols, x)
    out = product(cuda_core, x, [(quant_type, data, n)])
    assert ((out.double() - truth).abs()[:, 0] > bound[:, 0]).any()


@pytest.mark.parametrize("rows", [9, 31, 32, 33, 127, 128, 129])
def test_both_sides_of_every_border_of_tiles(cuda_core, rows: int) -> None:
    """Of activations and of weights; a row is the same bit for bit whatever rows of its tile run beside it."""
    cols = 96
    x = activations(129, cols)[:rows].contiguous()
    for n in (127, 128, 129) if rows in (9, 33) else (5,):
        data = raw_weights(types.Q8_0, n, cols)
        out = product(cuda_core, x, [(types.Q8_0, data, n)])
        check(out, *truth_and_bound(types.Q8_0, data, n, cols, x), (rows, n))
    if rows in (33, 129):
        assert torch.equal(product(cuda_core, x[-33:].contiguous(), [(types.Q8_0, data, n)]), out[-33:])


@pytest.mark.parametrize("splits", [1, 3])
def test_parts_of_several_types_are_one_launch(cuda_core, splits: int) -> None:
    cols, scales = 512, (0.5, 1.0, 0.25, 2.0)
    kinds = [types.Q4_K, types.Q6_K, types.BF16, types.Q4_K]
    heights = (130, 3, 128, 1)
    parts = [(t, raw_weights(t, n, cols, seed=i), n) for i, (t, n) in enumerate(zip(kinds, heights, strict=True))]
    x = activations(10, cols)
    residual = activations(10, sum(heights), seed=5)
    both = [truth_and_bound(t, d, n, cols, x) for t, d, n in parts]
    truth = torch.cat([s * t for s, (t, _) in zip(scales, both, strict=True)], dim=1)
    bound = torch.cat([s * b for s, (_, b) in zip(scales, both, strict=True)], dim=1)
    out = product(cuda_core, x, parts, scales=scales, splits=splits)
    check(out, truth, bound)
    added = product(cuda_core, x, parts, scales=scales, splits=splits, residual=residual.clone())
    assert torch.equal(added, residual + out)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(("rows", "n"), [(9, 65), (33, 63), (40, 64)])
def test_gates_and_ups(cuda_core, rows: int, n: int, splits: int) -> None:
    """Of two types, and of two pairs of them."""
    cols, scales = 256, (0.5, 1.0, 0.25, 0.125)
    kinds, heights = [types.Q4_K, types.Q8_0, types.Q6_K, types.Q8_0], (n, 8, n, 8)
    parts = [(t, raw_weights(t, h, cols, seed=i), h) for i, (t, h) in enumerate(zip(kinds, heights, strict=True))]
    x = activations(rows, cols) * 0.1
    both = [truth_and_bound(t, d, h, cols, x) for t, d, h in parts]
    (gate, gate_bound), (up, up_bound) = (
        tuple(torch.cat([scales[i] * both[i][j] for i in which], dim=1) for j in (0, 1)) for which in ((0, 1), (2, 3))
    )
    out = product(cuda_core, x, parts, scales=scales, silu_mul=True, splits=splits)
    check(out, torch.nn.functional.silu(gate) * up, silu_bound(gate, gate_bound, up, up_bound))


def test_large_negative_gates_give_zero(cuda_core) -> None:
    x = torch.full((9, 32), 100.0)
    gate, up = (np.full((4, 32), sign * 100.0, np.float32).view(np.uint8).reshape(-1) for sign in (-1, 1))
    out = product(cuda_core, x, [(types.F32, gate, 4), (types.F32, up, 4)], silu_mul=True)
    assert torch.equal(out, torch.zeros(9, 4))


@pytest.mark.parametrize("quant_type", [types.BF16, types.F16, types.F32], ids=str)
def test_exact_numbers(cuda_core, quant_type: QuantType) -> None:
    """About 16 bits of mantissa, where one product of bfloat16 has eight."""
    n, cols = 20, 160
    data = raw_weights(quant_type, n, cols)
    x = activations(11, cols)
    weights = torch.from_numpy(dequantize.dequantize(quant_type, data, (n, cols))).double()
    magnitudes = x.double().abs() @ weights.abs().T
    truth, bound = x.double() @ weights.T, (2.0**-15 + 6 * (cols + 2) * UNIT) * magnitudes
    parts = [(quant_type, data, n)]
    check(product(cuda_core, x, parts, exact=True), truth, bound)
    check(product(cuda_core, x, parts, exact=True, splits=2), truth, bound)
    if quant_type is not types.F32:
        assert ((product(cuda_core, x, parts).double() - truth).abs() > bound).any()


@pytest.mark.parametrize("quant_type", TYPES, ids=str)
def test_matrices_as_bfloat16(cuda_core, quant_type: QuantType) -> None:
    n, cols = 7, 3 * max(quant_type.block_size, 32)
    data = raw_weights(quant_type, n, cols)
    planes = cuda_core.put(planes_of(quant_type, data, n, cols))
    out = cuda_core.put(np.full((4, cols), 0xFFFF, np.uint16))
    cuda_core.kernels.dequantize_planes(
        quant_type.number, cuda_core.address(planes), 2, 4, n, cols, cuda_core.address(out)
    )
    expected = torch.from_numpy(dequantize.dequantize(quant_type, data, (n, cols)))[2:6].bfloat16()
    np.testing.assert_array_equal(cuda_core.get(out), bits(expected))


@pytest.mark.parametrize("cols", [32, 1024, 1060])
@pytest.mark.parametrize("normed", [True, False])
def test_norm_and_rounding(cuda_core, cols: int, normed: bool) -> None:
    x = activations(3, cols)
    weight = torch.rand(cols, generator=torch.Generator().manual_seed(3)) + 0.5
    given, norm = cuda_core.put(x.numpy()), cuda_core.put(weight.numpy())
    outs = [cuda_core.put(np.full((3, cols), 0xFFFF, np.uint16)) for _ in range(3)]
    at = cuda_core.address
    for out, remainder in ((outs[0], outs[1]), (outs[2], None)):
        cuda_core.kernels.rms_norm(
            at(given), 3, cols, at(norm) if normed else 0, 1e-6, at(out), at(remainder) if remainder is not None else 0
        )
    rounded, rest, again = (
        torch.from_numpy(cuda_core.get(out).view(np.int16)).view(torch.bfloat16).double() for out in outs
    )
    truth = x.double()
    if normed:
        truth = weight.double() * truth * torch.rsqrt(truth.square().mean(-1, keepdim=True) + 1e-6)
        slack = 2.0**-20 * truth.abs()
        assert ((rounded - truth).abs() <= 2.0**-8 * truth.abs() + slack).all()
        assert ((rounded + rest - truth).abs() <= 2.0**-16 * truth.abs() + slack).all()
    else:
        assert torch.equal(rounded, x.bfloat16().double())
        assert torch.equal(rest, (x - x.bfloat16().float()).bfloat16().double())
    assert torch.equal(again, rounded)


@pytest.mark.parametrize("add", [True, False])
def test_products_are_finished(cuda_core, add: bool) -> None:
    """Splits summed, scaled, and put behind each other in wider rows, of which the rest stays."""
    products = activations(6, 7).reshape(2, 3, 7)
    before = activations(3, 12, seed=2)
    given, out = cuda_core.put(products.numpy()), cuda_core.put(before.numpy())
    cuda_core.kernels.finish_products(
        cuda_core.address(given), 2, 3, 7, 0.5, 0.5, False, add, cuda_core.address(out), 12, 4
    )
    expected = before.clone()
    expected[:, 4:11] = (before[:, 4:11] if add else 0) + 0.5 * (products[0] + products[1])
    assert torch.equal(torch.from_numpy(cuda_core.get(out)), expected)


def test_splits_fill_a_device_with_few_tiles(simt) -> None:
    splits = simt.quant_matmul_splits
    assert splits([4096], 4096, 16, False, 132) == 8
    assert splits([24576], 4096, 16, False, 132) == 1
    assert splits([64, 64], 1024, 16, True, 132) == 2  # of at least eight steps
    assert splits([4096], 256, 16, False, 132) == 1
    assert splits([4096], 4096, 2048, False, 132) == 1


def test_bad_arguments(cuda_core) -> None:
    def call(parts, *, cols=64, x=1, silu_mul=False, exact=False, add=False, splits=1):
        cuda_core.kernels.quant_matmul(parts, cols, x, 0, 9, silu_mul, exact, add, 1, splits, 0)

    part = (types.Q8_0.number, 1, 4, 1.0)
    for match, arguments in (
        ("parts: expected 1 to 8, got 0", {"parts": []}),
        ("parts: expected gates and as many ups, got 3", {"parts": [part] * 3, "silu_mul": True}),
        ("parts: expected gates and ups of the same rows, got 5", {"parts": [part, (8, 1, 5, 1.0)], "silu_mul": True}),
        ("add: expected 0 with silu_mul", {"parts": [part] * 2, "silu_mul": True, "add": True}),
        ("cols: expected a multiple of 32, got 48", {"parts": [part], "cols": 48}),
        ("x: expected the address of a tensor", {"parts": [part], "x": 0}),
        ("splits: expected 1 to 8, got 9", {"parts": [part], "splits": 9}),
        ("partial: expected the address of a tensor", {"parts": [part], "splits": 2}),
        ("remainder: expected the address of a tensor", {"parts": [(0, 1, 4, 1.0)]}),
        ("remainder: expected the address of a tensor", {"parts": [(30, 1, 4, 1.0)], "exact": True}),
        ("quant_type: expected the ggml number", {"parts": [(28, 1, 4, 1.0)]}),
    ):
        with pytest.raises(ValueError, match=f"quant_matmul: {match}"):
            call(**arguments)
