"""quant_matmul and quant_embedding in the native core against their twins, for every type and instruction-set level."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from helexa_engine.ops.quant_embedding import native as native_embedding
from helexa_engine.ops.quant_embedding import reference as reference_embedding
from helexa_engine.ops.quant_matmul import native, reference
from helexa_engine.ops.registry import native_core
from helexa_engine.quant import dequantize, types
from helexa_engine.quant.types import QuantType

from .levels import MATMUL_LEVELS, levels_here

_native = native_core()
pytestmark = pytest.mark.skipif(_native is None, reason="the native core is not built")

STORED = [t for t in types.QUANT_TYPES if t.kind != "activation"]
CODES = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
WITH_MINIMUM = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
SUBSCALES = ("Q2_K", "Q3_K", "Q6_K")  # a scale for 16 columns; 32 for the others
ROWS = (1, 2, 7, 8, 9, 13, 14, 33, 64, 65)  # of the remainders that register blocks leave all
UNIT = 2.0**-24  # of float32 rounding


ISAS = levels_here(MATMUL_LEVELS)


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    best = _native.cpu_isa()
    yield
    _native.set_cpu_isa(best)
    _native.set_num_threads(0)


def raw_weights(quant_type: QuantType, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """Random bytes of a tensor [rows, cols] whose float scales are sane; every code occurs."""
    rng = np.random.default_rng([seed, quant_type.number, rows, cols])
    values = rng.standard_normal((rows, cols))
    plain = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
    if quant_type.name in plain:
        return values.astype(plain[quant_type.name]).view(np.uint8).reshape(-1)
    if quant_type is types.BF16:
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(-1)
    if quant_type.kind == "integer":
        return (values * 40).astype(dequantize._PLAIN[quant_type.name]).view(np.uint8).reshape(-1)
    data = rng.integers(0, 256, rows * quant_type.row_bytes(cols), dtype=np.uint8)
    layout, _ = dequantize._DECODERS[quant_type.name]
    blocks = data.view(layout)
    scale = rng.uniform(0.01, 0.02, len(blocks)).astype(np.float16)
    if quant_type is types.IQ1_M:
        bits = scale.view(np.uint16)
        for i in range(4):
            blocks["scales"][:, i] = blocks["scales"][:, i] & 0x0FFF | (bits >> 4 * i & 15) << 12
    elif quant_type is types.MXFP4:
        blocks["e"] = rng.integers(118, 124, len(blocks))
    elif quant_type is types.NVFP4:
        blocks["d"] = rng.integers(0, 0x7F, blocks["d"].shape)
    else:
        blocks["d"] = scale
        for name in ("m", "dmin"):
            if name in layout.names:
                blocks[name] = -scale if name == "m" else scale
    return data


def activations(rows: int, cols: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator)
    x[:, cols // 2] *= 8  # an outlier
    return x


def run(x: torch.Tensor, *parts: object, **keywords: object) -> torch.Tensor:
    width = sum(p.rows for p in parts) // (2 if keywords.get("activation") else 1)
    poisoned = None if "residual" in keywords else torch.full((x.shape[0], width), float("nan"))
    return native.quant_matmul(x, parts, out=poisoned, **keywords)


def twin(quant_type: QuantType, data: np.ndarray, rows: int, cols: int, x: torch.Tensor) -> torch.Tensor:
    """The truth in float64 for what the kernel of this type computes."""
    seen = reference.quantized_activations(x) if quant_type.name in CODES else x
    if quant_type is types.BF16:
        seen = reference.bfloat16_activations(x)
    return twin_of_floats(quant_type, data, rows, cols, seen)


def twin_of_floats(quant_type: QuantType, data: np.ndarray, rows: int, cols: int, x: torch.Tensor) -> torch.Tensor:
    """``x`` times the dequantised weights in float64."""
    block = reference.BlockMatrix(quant_type, data, rows, cols)
    return reference.quant_matmul(x, [block], compute_dtype=torch.float64)


def minimums(quant_type: QuantType, data: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """What stays of the weights when every code is 0: [rows, cols], 0 for types without a minimum."""
    if quant_type.name not in WITH_MINIMUM:
        return np.zeros((rows, cols), np.float32)
    layout, _ = dequantize._DECODERS[quant_type.name]
    bare = data.copy().view(layout)
    for name in {"qs", "qh"} & set(layout.names):
        bare[name] = 0
    return np.asarray(dequantize.dequantize(quant_type, bare.view(np.uint8).reshape(-1), (rows, cols)))


def rounding_bound(quant_type: QuantType, data: np.ndarray, rows: int, cols: int, x: torch.Tensor) -> torch.Tensor:
    """Largest distance [T, rows] of a kernel from the twin that float32 rounding can explain, whatever the values.

    A sum of n terms in any fixed order is off by at most ``n u`` of the terms' magnitudes (Higham, Accuracy and Stability of
    Numerical Algorithms, 4.2). Float weights: n is the columns, and a level without fma rounds each product too. Codes: a term is
    the exact integer sum of a scale's columns times that scale, times the activations' scale (up to three roundings), or a
    minimum times a sum of activations (as many); the twin's dequantised weights have three roundings of their own.
    """
    w = dequantize.dequantize(quant_type, data, (rows, cols)).astype(np.float64)
    if quant_type.name not in CODES:
        return (cols + 1) * UNIT * (x.double().abs() @ torch.from_numpy(np.abs(w)).T)
    terms = cols // (16 if quant_type.name in SUBSCALES else 32) * (2 if quant_type.name in WITH_MINIMUM else 1)
    bare = minimums(quant_type, data, rows, cols).astype(np.float64)
    magnitudes = torch.from_numpy(np.abs(w - bare) + np.abs(bare))
    return (terms + 6) * UNIT * 1.001 * (reference.quantized_activations(x).abs() @ magnitudes.T)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quant_type", STORED, ids=str)
def test_matches_the_integer_twin(quant_type: QuantType, isa: str) -> None:
    _native.set_cpu_isa(isa)
    for n, cols in ((37, 3 * quant_type.block_size), (16, quant_type.block_size), (1, 320), (20, 257)):
        if cols % quant_type.block_size:
            continue
        cols = cols if cols >= 32 or quant_type.name not in CODES else 32
        data = raw_weights(quant_type, n, cols)
        packed = native.pack(quant_type, data, n, cols)
        alone: dict[int, torch.Tensor] = {}
        for rows in ROWS if isa != "generic" else (1, 9, 33):
            x = activations(65, cols)[:rows]
            out = run(x.contiguous(), packed)
            excess = (out.double() - twin(quant_type, data, n, cols, x)).abs() - rounding_bound(
                quant_type, data, n, cols, x
            )
            assert (excess <= 0).all(), (isa, n, cols, rows, excess.max())
            for r in range(rows):  # a row is the same bit for bit whatever runs beside it
                assert torch.equal(out[r], alone.setdefault(r, out[r])), (isa, n, cols, rows, r)


@pytest.mark.parametrize("quant_type", STORED, ids=str)
def test_the_bound_notices_one_wrong_code(quant_type: QuantType) -> None:
    """The comparison above can fail: a twin whose first row has its last bits flipped in one place is too far away."""
    n, cols = 16, 2 * max(quant_type.block_size, 32)
    data = raw_weights(quant_type, n, cols)
    x = activations(1, cols)
    out = run(x, native.pack(quant_type, data, n, cols)).double()
    before = dequantize.dequantize(quant_type, data, (n, cols))
    contribution = torch.from_numpy(np.abs(before[0]).astype(np.float64)) * x[0].abs()
    for place in range(
        quant_type.row_bytes(cols)
    ):  # the first byte whose lowest bit changes a single weight of some size
        wrong = data.copy()
        wrong[place] ^= 1
        changed = dequantize.dequantize(quant_type, wrong, (n, cols)) != before
        if changed.sum() == 1 and contribution[int(changed[0].argmax())] > contribution.median():
            break
    else:
        for place in range(quant_type.row_bytes(cols)):  # types whose bits all stand for several weights
            wrong = data.copy()
            wrong[place] ^= 1
            if (dequantize.dequantize(quant_type, wrong, (n, cols)) != before).any():
                break
    if quant_type.is_float:
        wrong = data.copy()
        wrong[quant_type.block_bytes - 1] ^= 0x80  # one sign: the lowest bit of a float is within rounding
    error = (out - twin(quant_type, wrong, n, cols, x)).abs()
    assert error[0, 0] > rounding_bound(quant_type, wrong, n, cols, x)[0, 0]


def exact_case(quant_type: QuantType, rows: int, cols: int) -> tuple[np.ndarray, torch.Tensor]:
    """Weights of a code type and activations [5, cols] that make every float32 operation of a kernel exact.

    Scales are powers of two and so are the activations' (each 32 hold small integers and one of magnitude 127, times a power of
    two), and every sum of magnitudes is below 2^24 units of the last place.
    """
    data = raw_weights(quant_type, rows, cols)
    layout, _ = dequantize._DECODERS[quant_type.name]
    blocks = data.view(layout)
    for name in {"d", "m", "dmin"} & set(layout.names):
        blocks[name] = -0.015625 if name == "m" else 0.015625
    generator = torch.Generator().manual_seed(6)
    x = torch.randint(-3, 4, (5, cols // 32, 32), generator=generator).float()
    x[:, ::2, 7], x[:, 1::2, 20] = 127, -127
    x[:, ::3] *= 2
    x = x.reshape(5, cols)
    w = dequantize.dequantize(quant_type, data, (rows, cols)).astype(np.float64)
    bare = minimums(quant_type, data, rows, cols).astype(np.float64)
    per_scale = 16 if quant_type.name in SUBSCALES else 32
    for part in (w - bare, bare):
        sums = np.einsum(
            "tgk,rgk->trg", x.double().numpy().reshape(5, -1, per_scale), part.reshape(rows, -1, per_scale)
        )
        assert np.abs(sums).sum(-1).max() / 0.015625 < 2**23
    return data, x


@pytest.mark.parametrize("name", CODES)
def test_every_level_computes_the_same_integers(name: str) -> None:
    """Nothing rounds here, so every level equals the twin, and with it generic, bit for bit."""
    quant_type = types.by_name(name)
    n, cols = 37, 512
    data, x = exact_case(quant_type, n, cols)
    truth = twin(quant_type, data, n, cols, x)
    assert torch.equal(truth, twin_of_floats(quant_type, data, n, cols, x)), "quantising the activations must be exact"
    packed = native.pack(quant_type, data, n, cols)
    for isa in ISAS:
        _native.set_cpu_isa(isa)
        for rows in (1, 5, 40):
            out = run(x.repeat(8, 1)[:rows].contiguous(), packed)
            assert torch.equal(out.double(), truth.repeat(8, 1)[:rows]), (isa, rows)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CODES)
def test_the_largest_codes_and_activations_do_not_overflow(name: str, isa: str) -> None:
    """Where sums are narrow at first, this is what they have to hold."""
    _native.set_cpu_isa(isa)
    quant_type = types.by_name(name)
    n, cols = 17, 512
    for byte in (0x00, 0xFF, 0x80, 0x7F):
        data = raw_weights(quant_type, n, cols)
        layout, _ = dequantize._DECODERS[name]
        blocks = data.view(layout)
        for field in {"qs", "qh", "ql", "hmask"} & set(layout.names):
            blocks[field].view(np.uint8)[...] = byte
        packed = native.pack(quant_type, data, n, cols)
        for sign in (1.0, -1.0):
            x = torch.full((9, cols), 127 * sign)
            truth, bound = twin(quant_type, data, n, cols, x), rounding_bound(quant_type, data, n, cols, x)
            for rows in (1, 9):
                assert ((run(x[:rows].contiguous(), packed).double() - truth[:rows]).abs() <= bound[:rows]).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_bfloat16_weights_meet_activations_as_they_are_on_demand(rows: int, isa: str) -> None:
    _native.set_cpu_isa(isa)
    n, cols = 37, 513
    data, half = raw_weights(types.BF16, n, cols), raw_weights(types.F16, n, cols)
    x = activations(rows, cols)
    parts = [native.pack(types.BF16, data, n, cols), native.pack(types.F16, half, n, cols)]
    truth = torch.cat([twin_of_floats(t, d, n, cols, x) for t, d in ((types.BF16, data), (types.F16, half))], dim=1)
    bound = torch.cat([rounding_bound(t, d, n, cols, x) for t, d in ((types.BF16, data), (types.F16, half))], dim=1)
    assert ((run(x, *parts, exact=True).double() - truth).abs() <= bound).all()
    rounded = (run(x, *parts).double() - truth).abs()
    assert (rounded[:, n:] <= bound[:, n:]).all() and (rounded[:, :n] > bound[:, :n]).any()


@pytest.mark.parametrize("quant_type", STORED, ids=str)
def test_vector_levels_agree_to_the_last_bit(quant_type: QuantType) -> None:
    """All fuse and sum alike. Generic rounds products as well; it is held to the twin by its bound and by exact cases."""
    if len(ISAS) < 3:
        pytest.skip("one vector level at most")
    n, cols = 37, 2 * max(quant_type.block_size, 64)
    packed = native.pack(quant_type, raw_weights(quant_type, n, cols), n, cols)
    norm = torch.rand(cols, generator=torch.Generator().manual_seed(4)) + 0.5
    for rows in (1, 3, 40):
        x = activations(rows, cols)
        results = []
        for isa in ISAS[1:]:
            _native.set_cpu_isa(isa)
            plain = run(x, packed, norm_weight=norm, norm_eps=1e-6)
            results.append((plain, run(x, packed, packed, activation="silu_mul")))
        for plain, gated in results[1:]:
            assert torch.equal(plain, results[0][0]) and torch.equal(gated, results[0][1]), rows


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quant_type", STORED, ids=str)
def test_error_of_quantised_activations_is_within_the_bound_of_the_type(quant_type: QuantType, isa: str) -> None:
    _native.set_cpu_isa(isa)
    n, cols = 48, 512
    data = raw_weights(quant_type, n, cols)
    x = torch.randn(12, cols, generator=torch.Generator().manual_seed(3))
    out = run(x, native.pack(quant_type, data, n, cols)).double()
    truth = reference.quant_matmul(x, [reference.BlockMatrix(quant_type, data, n, cols)], compute_dtype=torch.float64)
    error = ((out - truth).square().sum() / truth.square().sum()).item()
    assert error <= quant_type.matmul_nmse_bound


@pytest.mark.parametrize("quant_type", STORED, ids=str)
def test_native_decoder_equals_the_reference_bit_for_bit(quant_type: QuantType) -> None:
    n, cols = 5, 2 * quant_type.block_size
    data = raw_weights(quant_type, n, cols)
    out = np.full((n, cols), np.nan, dtype=np.float32)
    _native.dequantize(quant_type.number, data.ctypes.data, n * cols, out.ctypes.data)
    np.testing.assert_array_equal(out, dequantize.dequantize(quant_type, data, (n, cols)))


@pytest.mark.parametrize("quant_type", STORED, ids=str)
def test_packing_is_reversible_and_small(quant_type: QuantType) -> None:
    for rows in (1, 16, 37):
        cols = 2 * max(quant_type.block_size, 64)
        size = rows * quant_type.row_bytes(cols)
        data = np.random.default_rng(rows).integers(0, 256, size, dtype=np.uint8)  # any bits at all survive
        packed = native.pack(quant_type, data, rows, cols)
        back = np.zeros_like(data)
        packed.unpack(back.ctypes.data)
        np.testing.assert_array_equal(back, data)
        padded_rows = (rows + 15) // 16 * 16
        assert packed.nbytes <= max(padded_rows * quant_type.row_bytes(cols) * 1.05, 0) + 64


@pytest.mark.parametrize("name", ["Q4_K", "F16", "IQ2_S"])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_stack_holds_what_was_packed_and_is_no_part(name: str, mapped: bool) -> None:
    quant_type, stack, rows, cols = types.by_name(name), 3, 20, 256
    data = raw_weights(quant_type, stack * (rows + 4), cols).reshape(stack, rows + 4, -1)
    stride = data[0].nbytes  # each matrix of the stack is the first rows of a taller one
    arguments = (quant_type.number, data.ctypes.data, rows, cols, stack, stride)
    packed = _native.map_stack(*arguments, data) if mapped else _native.pack(*arguments)
    back = np.zeros_like(data[:, :rows])
    packed.unpack(back.ctypes.data)
    np.testing.assert_array_equal(back, data[:, :rows])
    assert (packed.stack, packed.rows, packed.cols) == (stack, rows, cols)
    assert (packed.nbytes == 0) == mapped
    with pytest.raises(ValueError, match="parts: expected single matrices, not a stack, got 3"):
        native.quant_matmul(activations(1, cols), [packed])


@pytest.mark.parametrize("quant_type", STORED, ids=str)
def test_embedding_rows_are_exact(quant_type: QuantType) -> None:
    rows, cols = 37, 2 * max(quant_type.block_size, 32)
    data = raw_weights(quant_type, rows, cols)
    packed = native.pack(quant_type, data, rows, cols)
    ids = torch.tensor([36, 0, 17, 17, 15, 16])
    expected = dequantize.dequantize(quant_type, data, (rows, cols))[ids.numpy()]
    np.testing.assert_array_equal(native_embedding.quant_embedding(ids, packed).numpy(), expected)
    for bad in (-1, 37):
        with pytest.raises(ValueError, match="quant_embedding: ids: expected 0 to 36, got"):
            native_embedding.quant_embedding(torch.tensor([bad]), packed)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("name", ["NVFP4", "F16", "Q4_K"])
def test_a_scale_multiplies_the_products_of_its_part(name: str, rows: int) -> None:
    quant_type, n, cols, scale = types.by_name(name), 37, 256, 0.37
    data, other = raw_weights(quant_type, n, cols), raw_weights(types.Q8_0, n, cols)
    x = activations(rows, cols)
    for module in (native, reference):
        plain, scaled = (module.pack(quant_type, data, n, cols, scale=s) for s in (1.0, scale))
        beside = module.pack(types.Q8_0, other, n, cols)
        expected = module.quant_matmul(x, [plain, beside])
        expected[:, :n] *= np.float32(scale)
        assert torch.equal(module.quant_matmul(x, [scaled, beside]), expected)
        gate, up = expected.split(n, dim=1)
        gated = module.quant_matmul(x, [scaled, beside], activation="silu_mul")
        np.testing.assert_allclose(gated, torch.nn.functional.silu(gate) * up, rtol=1e-5, atol=1e-5 * gated.abs().max())
    ids = torch.tensor([36, 0, 17])
    rows_of = native_embedding.quant_embedding(ids, native.pack(quant_type, data, n, cols, scale=scale))
    assert torch.equal(rows_of, torch.from_numpy(dequantize.dequantize(quant_type, data, (n, cols)))[ids] * scale)
    assert torch.equal(
        rows_of, reference_embedding.quant_embedding(ids, reference.pack(quant_type, data, n, cols, scale=scale))
    )
    with pytest.raises(ValueError, match="pack: scales: expected one a matrix or none, got 2"):
        _native.pack(quant_type.number, data.ctypes.data, n, cols, scales=[1.0, 2.0])


def kernel_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm in the kernels' own float32 steps: squares in 16 running sums, then halves. Equal bit for bit, so that a twin
    quantises the same numbers."""
    lanes = torch.zeros(x.shape[0], 16)
    for part in x.split(16, dim=1):
        lanes = lanes + part * part
    for width in (8, 4, 2, 1):
        lanes = lanes[:, :width] + lanes[:, width : 2 * width]
    factor = np.float32(1) / np.sqrt(lanes.numpy() / np.float32(x.shape[1]) + np.float32(eps))
    return weight * (x * torch.from_numpy(factor))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "types_of_parts", [("F32", "F32"), ("Q8_0", "Q8_0"), ("Q4_K", "Q6_K"), ("Q8_0", "F16"), ("F16", "BF16")]
)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_norm_parts_swiglu_and_residual_in_one_call(types_of_parts: tuple[str, str], rows: int, isa: str) -> None:
    _native.set_cpu_isa(isa)
    n, cols, eps = 40, 512, 1e-6
    parts = [types.by_name(name) for name in types_of_parts]
    datas = [raw_weights(t, n, cols, seed=i) for i, t in enumerate(parts)]
    packed = [native.pack(t, d, n, cols) for t, d in zip(parts, datas, strict=True)]
    x = activations(rows, cols)
    norm = torch.rand(cols, generator=torch.Generator().manual_seed(4)) + 0.5

    def truth_and_bound(norm: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        seen = kernel_norm(x, norm, eps)
        arguments = [(t, d, n, cols, seen) for t, d in zip(parts, datas, strict=True)]
        return [twin(*a) for a in arguments], [rounding_bound(*a) for a in arguments]

    truth, bound = (torch.cat(both, dim=1) for both in truth_and_bound(norm))
    out = run(x, *packed, norm_weight=norm, norm_eps=eps)
    assert ((out.double() - truth).abs() <= bound).all()

    residual = activations(rows, 2 * n, seed=9)
    expected = residual.double() + truth
    added = run(x, *packed, norm_weight=norm, norm_eps=eps, residual=residual)
    assert added.data_ptr() == residual.data_ptr()
    assert ((added.double() - expected).abs() <= bound + UNIT * (expected.abs() + bound)).all()

    # silu's slope is at most 1.1. In float32 it costs 8 roundings: e^x about 5 (its argument's rest, seven steps of a polynomial
    # whose later terms are small, the scaling), then 1 + e^x, a division and a product.
    (gate, up), (gate_bound, up_bound) = truth_and_bound(norm * 0.1)
    silu = torch.nn.functional.silu(gate)
    bound = 1.1 * gate_bound * (up.abs() + up_bound) + silu.abs() * up_bound
    gated = run(x, *packed, norm_weight=norm * 0.1, norm_eps=eps, activation="silu_mul")
    assert ((gated.double() - silu * up).abs() <= bound + 8 * UNIT * ((silu * up).abs() + bound)).all()


@pytest.mark.parametrize("name", ["Q4_K", "F16"])
def test_threads_do_not_change_results_and_may_call_at_once(name: str) -> None:
    quant_type = types.by_name(name)
    n, cols = 200, 256
    packed = native.pack(quant_type, raw_weights(quant_type, n, cols), n, cols)
    x = activations(70, cols)
    expected = run(x, packed)
    for threads in (1, 2, 3):
        _native.set_num_threads(threads)
        assert torch.equal(run(x, packed), expected)
    results: list[torch.Tensor] = []
    callers = [threading.Thread(target=lambda: results.extend(run(x, packed) for _ in range(10))) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 30 and all(torch.equal(r, expected) for r in results)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_activation_is_not_hidden(value: float, isa: str) -> None:
    _native.set_cpu_isa(isa)
    packed = native.pack(types.Q8_0, raw_weights(types.Q8_0, 16, 64), 16, 64)
    x = activations(2, 64)
    x[1, 40] = value
    out = run(x, packed)
    assert out[0].isfinite().all() and not out[1].isfinite().any()


@pytest.mark.parametrize("isa", ISAS)
def test_zero_activations_give_zero(isa: str) -> None:
    _native.set_cpu_isa(isa)
    packed = native.pack(types.Q4_K, raw_weights(types.Q4_K, 16, 256), 16, 256)
    assert (run(torch.zeros(3, 256), packed) == 0).all()


def test_bad_arguments_are_named() -> None:
    data = raw_weights(types.Q8_0, 4, 64)
    packed = native.pack(types.Q8_0, data, 4, 64)
    other = native.pack(types.Q8_0, raw_weights(types.Q8_0, 4, 32), 4, 32)
    taller = native.pack(types.Q8_0, raw_weights(types.Q8_0, 8, 64), 8, 64)
    with pytest.raises(ValueError, match="pack: quant_type: expected the ggml number"):
        _native.pack(9999, data.ctypes.data, 4, 64)
    with pytest.raises(ValueError, match="pack: cols: expected a positive multiple of the Q8_0 block size 32, got 33"):
        _native.pack(8, data.ctypes.data, 4, 33)
    with pytest.raises(ValueError, match="pack: source"):
        _native.pack(8, 0, 4, 64)
    with pytest.raises(ValueError, match="parts: expected one number of columns, 64, got 32"):
        run(activations(1, 64), packed, other)
    with pytest.raises(ValueError, match="parts: expected gates and as many ups"):
        run(activations(1, 64), packed, activation="silu_mul")
    with pytest.raises(ValueError, match="parts: expected each up as tall as its gate, 4, got 8"):
        run(activations(1, 64), packed, taller, activation="silu_mul")
    with pytest.raises(ValueError, match="set_cpu_isa"):
        _native.set_cpu_isa("sse9")
    with pytest.raises(ValueError, match="set_num_threads"):
        _native.set_num_threads(-1)
