"""quant_matmul and quant_embedding in the native core against their twins, for every type and instruction-set level."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from helexa_engine.ops.quant_embedding import native as native_embedding
from helexa_engine.ops.quant_matmul import native, reference
from helexa_engine.ops.registry import native_core
from helexa_engine.quant import dequantize, types
from helexa_engine.quant.types import QuantType

_native = native_core()
pytestmark = pytest.mark.skipif(_native is None, reason="the native core is not built")

STORED = [t for t in types.QUANT_TYPES if t.kind != "activation"]
CODES = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
ROWS = (1, 2, 7, 8, 9, 33, 64, 65)


def _isas() -> list[str]:
    if _native is None:
        return []
    best = _native.cpu_isa()
    levels = ["generic", "avx2", "avx512"]
    return levels[: levels.index(best) + 1]


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
    block = reference.BlockMatrix(quant_type, data, rows, cols)
    return reference.quant_matmul(seen, [block], compute_dtype=torch.float64)


def rounding_bound(quant_type: QuantType, data: np.ndarray, rows: int, cols: int, x: torch.Tensor) -> torch.Tensor:
    """Float32 rounding of a sum over the columns, from the sizes of codes and minimums (not of their differences)."""
    w = np.abs(dequantize.dequantize(quant_type, data, (rows, cols))).reshape(rows, -1)
    size = torch.from_numpy(w.max(1, keepdims=True) * 4 + w).double()
    return x.abs().double() @ size.T * (2**-23 * 4) + 1e-7


@pytest.mark.parametrize("isa", _isas())
@pytest.mark.parametrize("quant_type", STORED, ids=str)
def test_matches_the_integer_twin(quant_type: QuantType, isa: str) -> None:
    _native.set_cpu_isa(isa)
    for n, cols in ((37, 3 * quant_type.block_size), (16, quant_type.block_size), (1, 320)):
        if cols % quant_type.block_size:
            continue
        cols = cols if cols >= 32 or quant_type.name not in CODES else 32
        data = raw_weights(quant_type, n, cols)
        packed = native.pack(quant_type, data, n, cols)
        alone: dict[int, torch.Tensor] = {}
        for rows in ROWS if isa != "generic" else (1, 9, 33):
            x = activations(65, cols)[:rows]
            out = run(x.contiguous(), packed)
            error = (out.double() - twin(quant_type, data, n, cols, x)).abs()
            assert (error <= rounding_bound(quant_type, data, n, cols, x)).all(), (isa, n, cols, rows, error.max())
            for r in range(rows):  # a row is the same bit for bit whatever runs beside it
                assert torch.equal(out[r], alone.setdefault(r, out[r])), (isa, n, cols, rows, r)


@pytest.mark.parametrize("isa", _isas())
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


def _pair(first: QuantType, second: QuantType, n: int, cols: int) -> tuple[list[object], list[reference.BlockMatrix]]:
    datas = [raw_weights(t, n, cols, seed=i) for i, t in enumerate((first, second))]
    packed = [native.pack(t, d, n, cols) for t, d in zip((first, second), datas, strict=True)]
    blocks = [reference.BlockMatrix(t, d, n, cols) for t, d in zip((first, second), datas, strict=True)]
    return packed, blocks


@pytest.mark.parametrize("isa", _isas())
@pytest.mark.parametrize("types_of_parts", [("F32", "F32"), ("Q8_0", "Q8_0"), ("Q4_K", "Q6_K"), ("Q8_0", "F16")])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_norm_parts_swiglu_and_residual_in_one_call(types_of_parts: tuple[str, str], rows: int, isa: str) -> None:
    _native.set_cpu_isa(isa)
    n, cols, eps = 40, 512, 1e-6
    first, second = (types.by_name(name) for name in types_of_parts)
    packed, blocks = _pair(first, second, n, cols)
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(1))
    norm = torch.rand(cols, generator=torch.Generator().manual_seed(4)) + 0.5
    truth = reference.quant_matmul(x, blocks, norm_weight=norm, norm_eps=eps, compute_dtype=torch.float64)
    # Float: twice the expected rounding of a running sum. Integer: twice the root of the type's bound, as a product of two is taken.
    exact = types_of_parts == ("F32", "F32")
    relative = 2 * cols**0.5 * 2**-24 if exact else 2 * types.Q8_0.matmul_nmse_bound**0.5

    def close(out: torch.Tensor, expected: torch.Tensor) -> None:
        assert (out.double() - expected).norm() <= relative * expected.norm()

    close(run(x, *packed, norm_weight=norm, norm_eps=eps), truth)
    residual = activations(rows, 2 * n, seed=9)
    before = residual.double()
    out = run(x, *packed, norm_weight=norm, norm_eps=eps, residual=residual)
    assert out.data_ptr() == residual.data_ptr()
    close(out.double() - before, truth)
    gated = run(x, *packed, norm_weight=norm * 0.1, norm_eps=eps, activation="silu_mul")
    close(
        gated,
        reference.quant_matmul(
            x, blocks, norm_weight=norm * 0.1, norm_eps=eps, activation="silu_mul", compute_dtype=torch.float64
        ),
    )


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


@pytest.mark.parametrize("isa", _isas())
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_activation_is_not_hidden(value: float, isa: str) -> None:
    _native.set_cpu_isa(isa)
    packed = native.pack(types.Q8_0, raw_weights(types.Q8_0, 16, 64), 16, 64)
    x = activations(2, 64)
    x[1, 40] = value
    out = run(x, packed)
    assert out[0].isfinite().all() and not out[1].isfinite().any()


@pytest.mark.parametrize("isa", _isas())
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
