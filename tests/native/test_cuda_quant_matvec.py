"""``csrc/cuda/quant_matvec.cu`` against the integer twin, within float32 rounding, for every type."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from helexa_engine.ops.quant_matmul import reference
from helexa_engine.quant import dequantize, types
from helexa_engine.quant.types import QuantType
from tests.engine.ops.test_quant_matmul import WITH_MINIMUM, activations, minimums, raw_weights
from tests.native.test_cuda_repack import TYPES, planes_of

UNIT = 2.0**-24  # of float32 rounding


def product(
    core,
    x: torch.Tensor,
    parts: Sequence[tuple[QuantType, np.ndarray, int]],
    *,
    scales: Sequence[float] = (),
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    silu_mul: bool = False,
    residual: torch.Tensor | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """``x`` [T, K] times matrices (type, data, rows) side by side."""
    rows, cols = x.shape
    width = sum(n for _, _, n in parts) // (2 if silu_mul else 1)
    packed = [core.put(planes_of(t, data, n, cols)) for t, data, n in parts]
    described = [
        (t.number, core.address(p), n, scales[i] if scales else 1.0)
        for i, ((t, _, n), p) in enumerate(zip(parts, packed, strict=True))
    ]
    given = core.put(x.numpy())
    norm = core.put(norm_weight.numpy()) if norm_weight is not None else None
    out = core.put(residual.numpy() if residual is not None else np.full((rows, width), np.nan, np.float32))
    needed = core.kernels.quant_matvec_workspace(rows, cols)
    workspace = core.put(np.full(needed, 0xFF, np.uint8)) if needed else None
    core.kernels.quant_matvec(
        described,
        cols,
        core.address(given),
        rows,
        core.address(norm) if norm is not None else 0,
        norm_eps,
        silu_mul,
        residual is not None,
        exact,
        core.address(out),
        core.address(workspace) if workspace is not None else 0,
    )
    return torch.from_numpy(core.get(out))


def seen(quant_type: QuantType, x: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
    """Activations as weights of this type meet them, float64."""
    if quant_type.is_quantised:
        return reference.quantized_activations(x)
    return reference.bfloat16_activations(x) if quant_type is types.BF16 and not exact else x.double()


def truth_and_bound(
    quant_type: QuantType, data: np.ndarray, rows: int, cols: int, x: torch.Tensor, *, exact: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The integer twin in float64, and how far from it float32 rounding can lead, both [T, rows].

    A sum of n terms in any fixed order is off by at most ``n u`` of the terms' magnitudes (Higham, Accuracy and Stability of
    Numerical Algorithms, 4.2). A term of a quantised type is the exact integer sum of 16 columns times their scale times the
    activations' scale, or a minimum times a sum of activations: up to four roundings; the twin's dequantised weights have three.
    """
    weights = torch.from_numpy(dequantize.dequantize(quant_type, data, (rows, cols)).astype(np.float64))
    meets = seen(quant_type, x, exact=exact)
    truth = meets @ weights.T
    if not quant_type.is_quantised:
        return truth, (cols + 1) * UNIT * (meets.abs() @ weights.abs().T)
    bare = torch.from_numpy(minimums(quant_type, data, rows, cols).astype(np.float64))
    terms = cols // 16 * (2 if quant_type.name in WITH_MINIMUM else 1)
    magnitudes = (weights - bare).abs() + bare.abs()
    return truth, (terms + 8) * UNIT * 1.001 * (meets.abs() @ magnitudes.T)


def check(out: torch.Tensor, truth: torch.Tensor, bound: torch.Tensor, what: object = "") -> None:
    excess = (out.double() - truth).abs() - bound
    assert (excess <= 0).all(), (what, excess.max())


def sizes(quant_type: QuantType) -> list[tuple[int, int]]:
    """Rows and columns: a pair a warp and more, one row, an odd number; columns beside whole steps of a warp."""
    block = max(quant_type.block_size, 32)
    return [(71, 3 * block), (1, block), (6, 1280 if quant_type.is_quantised else 1237)]


@pytest.mark.parametrize("quant_type", TYPES, ids=str)
def test_matches_the_integer_twin(cuda_core, quant_type: QuantType) -> None:
    for n, cols in sizes(quant_type):
        data = raw_weights(quant_type, n, cols)
        x = activations(8, cols)
        truth, bound = truth_and_bound(quant_type, data, n, cols, x)
        alone: dict[int, torch.Tensor] = {}
        for rows in (1, 3, 8) if n != 71 else (1, 2):
            out = product(cuda_core, x[:rows], [(quant_type, data, n)])
            check(out, truth[:rows], bound[:rows], (n, cols, rows))
            for r in range(rows):  # a row is the same bit for bit whatever runs beside it
                assert torch.equal(out[r], alone.setdefault(r, out[r])), (n, cols, rows, r)


@pytest.mark.parametrize("quant_type", TYPES, ids=str)
def test_the_bound_notices_one_wrong_bit(cuda_core, quant_type: QuantType) -> None:
    """The comparison above can fail."""
    n, cols = 3, max(quant_type.block_size, 32)
    data = raw_weights(quant_type, n, cols)
    x = activations(1, cols)
    out = product(cuda_core, x, [(quant_type, data, n)])
    before = dequantize.dequantize(quant_type, data, (n, cols))
    for place in range(quant_type.row_bytes(cols)):
        wrong = data.copy()
        wrong[place] ^= 0x80 if not quant_type.is_quantised else 1
        changed = np.abs(dequantize.dequantize(quant_type, wrong, (n, cols)) - before)
        if changed.max() > np.abs(before).mean() / 8:
            break
    truth, bound = truth_and_bound(quant_type, wrong, n, cols, x)
    assert (out.double() - truth).abs()[0, 0] > bound[0, 0]


@pytest.mark.parametrize(
    ("name", "cols"), [("Q4_K", 9216), ("Q8_0", 9184), ("F16", 3208), ("BF16", 3077), ("IQ2_S", 9216)]
)
def test_columns_that_do_not_fit_shared_memory(cuda_core, name: str, cols: int) -> None:
    """Chunks of them give the same bits as all at once, which one row does; with parts of several pairs a warp."""
    quant_type = types.by_name(name)
    assert quant_type is not None
    heights = (3, 67) if name == "Q4_K" else (3, 2)
    parts = [(quant_type, raw_weights(quant_type, n, cols, seed=i), n) for i, n in enumerate(heights)]
    x = activations(8, cols)
    both = [truth_and_bound(t, d, n, cols, x) for t, d, n in parts]
    out = product(cuda_core, x, parts)
    check(out, *(torch.cat(b, dim=1) for b in zip(*both, strict=True)))
    assert torch.equal(product(cuda_core, x[5:6].clone(), parts)[0], out[5])


def kernel_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm in the kernel's own float32 steps: squares in 256 running sums of every fourth value's four (of single values where
    columns are no multiple of four), then halves of warps, then warps. Equal bit for bit, so that a twin quantises the same
    numbers."""
    rows, cols = x.shape
    width = 4 if cols % 4 == 0 else 1
    padded = torch.nn.functional.pad(x * x, (0, -cols % (256 * width))).reshape(rows, -1, 256, width)
    threads = torch.zeros(rows, 256)
    for part in padded.unbind(1):
        for value in part.unbind(-1):
            threads = threads + value
    warps = threads.reshape(rows, 8, 32)
    for half in (16, 8, 4, 2, 1):
        warps = warps[..., :half] + warps[..., half : 2 * half]
    total = warps[:, 0, 0]
    for warp in range(1, 8):
        total = total + warps[:, warp, 0]
    factor = np.float32(1) / np.sqrt(total.numpy() / np.float32(cols) + np.float32(eps))
    return weight * (x * torch.from_numpy(factor)[:, None])


def silu_bound(gate: torch.Tensor, gate_bound: torch.Tensor, up: torch.Tensor, up_bound: torch.Tensor) -> torch.Tensor:
    """silu's slope is at most 1.1. In float32 it costs 8 roundings: e^x about 3, then 1 + e^x, a division and a product, and the
    scales of both."""
    silu = torch.nn.functional.silu(gate)
    bound = 1.1 * gate_bound * (up.abs() + up_bound) + silu.abs() * up_bound
    return bound + 8 * UNIT * ((silu * up).abs() + bound)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("cols", [512, 2560])  # prepared by each block, and for 5 rows or 2560 columns by a kernel
@pytest.mark.parametrize("names", [("F32", "BF16"), ("Q8_0", "Q8_0"), ("Q4_K", "Q6_K"), ("IQ1_M", "F16")])
def test_norm_parts_silu_mul_and_residual(cuda_core, names: tuple[str, str], rows: int, cols: int) -> None:
    heights, eps = (5, 7), 1e-6
    kinds = [types.by_name(name) for name in names]
    parts = [(t, raw_weights(t, n, cols, seed=i), n) for i, (t, n) in enumerate(zip(kinds, heights, strict=True))]
    x = activations(rows, cols)
    norm = torch.rand(cols, generator=torch.Generator().manual_seed(4)) + 0.5
    both = [truth_and_bound(t, d, n, cols, kernel_norm(x, norm, eps)) for t, d, n in parts]
    truth, bound = (torch.cat(b, dim=1) for b in zip(*both, strict=True))
    check(product(cuda_core, x, parts, norm_weight=norm, norm_eps=eps), truth, bound)

    residual = activations(rows, sum(heights), seed=9)
    expected = residual.double() + truth
    added = product(cuda_core, x, parts, norm_weight=norm, norm_eps=eps, residual=residual)
    check(added, expected, bound + UNIT * (expected.abs() + bound))

    small = norm * 0.1  # gates that are not all saturated
    four = [(t, raw_weights(t, n, cols, seed=2 + i), n) for i, (t, _, n) in enumerate(parts * 2)]
    pairs = [truth_and_bound(t, d, n, cols, kernel_norm(x, small, eps)) for t, d, n in four]
    truths, bounds = [], []
    for (gate, gate_bound), (up, up_bound) in zip(pairs[:2], pairs[2:], strict=True):
        truths.append(torch.nn.functional.silu(gate) * up)
        bounds.append(silu_bound(gate, gate_bound, up, up_bound))
    gated = product(cuda_core, x, four, norm_weight=small, norm_eps=eps, silu_mul=True)
    check(gated, torch.cat(truths, dim=1), torch.cat(bounds, dim=1))


def test_scales_multiply_the_products_of_their_parts(cuda_core) -> None:
    cols, scales = 256, (0.37, 1.0, 2.5)
    parts = [(t, raw_weights(t, n, cols), n) for t, n in ((types.NVFP4, 4), (types.Q8_0, 3), (types.F16, 2))]
    x = activations(2, cols)
    expected = product(cuda_core, x, parts)
    for i, (first, last) in enumerate(((0, 4), (4, 7), (7, 9))):
        expected[:, first:last] *= np.float32(scales[i])
    assert torch.equal(product(cuda_core, x, parts, scales=scales), expected)


def test_more_parts_than_a_launch_takes(cuda_core) -> None:
    cols = 64
    parts = [(types.Q8_0, raw_weights(types.Q8_0, 1 + i % 3, cols, seed=i), 1 + i % 3) for i in range(19)]
    x = activations(2, cols)
    both = [truth_and_bound(t, d, n, cols, x) for t, d, n in parts]
    check(product(cuda_core, x, parts), *(torch.cat(b, dim=1) for b in zip(*both, strict=True)))


@pytest.mark.parametrize("exact", [False, True])
def test_bfloat16_weights_meet_rounded_activations_unless_told(cuda_core, exact: bool) -> None:
    n, cols = 6, 256
    data = raw_weights(types.BF16, n, cols)
    x = activations(3, cols)
    out = product(cuda_core, x, [(types.BF16, data, n)], exact=exact)
    check(out, *truth_and_bound(types.BF16, data, n, cols, x, exact=exact))
    truth, bound = truth_and_bound(types.BF16, data, n, cols, x, exact=not exact)
    assert ((out.double() - truth).abs() > bound).any()


@pytest.mark.parametrize("quant_type", TYPES, ids=str)
def test_error_of_quantised_activations_is_within_the_bound_of_the_type(cuda_core, quant_type: QuantType) -> None:
    n, cols = 16, 512
    data = raw_weights(quant_type, n, cols)
    x = torch.randn(8, cols, generator=torch.Generator().manual_seed(3))
    out = product(cuda_core, x, [(quant_type, data, n)]).double()
    truth = x.double() @ torch.from_numpy(dequantize.dequantize(quant_type, data, (n, cols)).astype(np.float64)).T
    assert ((out - truth).square().sum() / truth.square().sum()).item() <= quant_type.matmul_nmse_bound


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "F16"])
def test_a_broken_activation_is_not_hidden(cuda_core, name: str, value: float) -> None:
    quant_type = types.by_name(name)
    data = raw_weights(quant_type, 4, 256)
    x = activations(2, 256)
    x[1, 40] = value
    out = product(cuda_core, x, [(quant_type, data, 4)])
    assert out[0].isfinite().all() and not out[1].isfinite().any()


def test_zero_activations_give_zero(cuda_core) -> None:
    data = raw_weights(types.Q4_K, 4, 256)
    assert (product(cuda_core, torch.zeros(3, 256), [(types.Q4_K, data, 4)]) == 0).all()


def test_bad_arguments_are_named(cuda_core) -> None:
    place = cuda_core.address(cuda_core.put(np.zeros(1024, dtype=np.float32)))

    def call(parts, cols=32, rows=1, silu_mul=False, add=False) -> None:
        cuda_core.kernels.quant_matvec(parts, cols, place, rows, 0, 0.0, silu_mul, add, False, place, 0)

    q8, q4 = (types.Q8_0.number, place, 4, 1.0), (types.Q4_0.number, place, 4, 1.0)
    with pytest.raises(ValueError, match="quant_matvec: parts: expected at least one matrix, got 0"):
        call([])
    with pytest.raises(ValueError, match="quant_matvec: rows: expected 0 to 8, got 9"):
        call([q8], rows=9)
    with pytest.raises(ValueError, match="quant_matvec: cols: expected .* block size 32, got 48"):
        call([q8], cols=48)
    with pytest.raises(ValueError, match="quant_matvec: quant_type: expected .* got 15"):
        call([(types.Q8_K.number, place, 4, 1.0)], cols=256)
    with pytest.raises(ValueError, match="quant_matvec: parts: expected gates and as many ups for silu_mul, got 1"):
        call([q8], silu_mul=True)
    with pytest.raises(ValueError, match="quant_matvec: parts: expected each up as tall as its gate, 4, got 3"):
        call([q8, (types.Q8_0.number, place, 3, 1.0)], silu_mul=True)
    with pytest.raises(ValueError, match="quant_matvec: parts: expected each up of its gate's type, 8, got 2"):
        call([q8, q4], silu_mul=True)
    with pytest.raises(ValueError, match="quant_matvec: add: expected false with silu_mul, got true"):
        call([q8, q8], silu_mul=True, add=True)
    with pytest.raises(ValueError, match=r"quant_matvec: workspace: expected the address of .* bytes, got 0"):
        call([q8], cols=16384)
    with pytest.raises(ValueError, match="quant_matvec: parts: expected the address of a tensor, got 0"):
        call([(types.Q8_0.number, 0, 4, 1.0)])
    with pytest.raises(ValueError, match="quant_matvec: x: expected an address that is a multiple of 16"):
        cuda_core.kernels.quant_matvec([q8], 32, place + 4, 1, 0, 0.0, False, False, False, place, 0)
