"""The native quantisers: the reference's bytes at every instruction-set level, and errors within the bar set by ggml's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import helexa_engine
from benchmarks.ops import quantize as benchmark
from helexa_engine.errors import BackendUnavailable
from helexa_engine.ops.quantize import quantize as op
from helexa_engine.ops.quantize import reference
from helexa_engine.quant import types
from helexa_engine.quant.dequantize import dequantize
from helexa_engine.quant.quantize import LEAST_IMPORTANCE, QUANTISABLE, column_weights
from helexa_engine.quant.types import QuantType

from .levels import levels_here

_native = pytest.importorskip("helexa_engine._native")
from helexa_engine.ops.quantize import native  # noqa: E402

RESULTS = Path(helexa_engine.__file__).parents[1] / "benchmarks" / "results" / "quantize.jsonl"
LARGEST_RATIO = 1.02  # of our error to that of ggml's quantiser on the same tensor


@pytest.fixture(autouse=True)
def restore_isa() -> Iterator[None]:
    best = _native.cpu_isa()
    yield
    _native.set_cpu_isa(best)


def _matrices() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    normal = rng.standard_normal((3, 768))
    return {
        "normal": normal,
        "heavy": rng.standard_t(2, (5, 1280)),
        "one block": normal[:1, :256],
        "zero": np.zeros((2, 256)),
        "shifted": normal + 3,
        "positive": np.abs(normal),
        "constant": np.full((3, 256), 1.5),
        "integers": rng.integers(-8, 8, (5, 512)),
        "sparse": rng.standard_normal((5, 512)) * (rng.random((5, 512)) < 0.05),
        "tiny": normal * 1e-6,
        "subnormal products": normal * 1e-30,
        "beyond float16": normal * 1e30,
    }


@pytest.mark.parametrize("isa", levels_here())
@pytest.mark.parametrize("quant_type", QUANTISABLE, ids=str)
def test_same_bytes_as_the_reference(quant_type: QuantType, isa: str) -> None:
    _native.set_cpu_isa(isa)
    for name, matrix in _matrices().items():
        values = matrix.astype(np.float32)
        # Columns of no and of overwhelming importance among them.
        for importance in (None, np.random.default_rng(2).random(values.shape[1]) ** 6 * np.arange(values.shape[1])):
            with np.errstate(over="ignore", invalid="ignore"):
                expected = reference.quantize(values, quant_type, importance)
            np.testing.assert_array_equal(native.quantize(values, quant_type, importance), expected, err_msg=name)


def test_every_float32_pattern_of_sixteen_bits_converts_as_numpy_does() -> None:
    halves = np.arange(1 << 16, dtype=np.uint32) << 16
    for offset in (0, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):  # around both roundings' halves
        values = (halves | np.uint32(offset)).view(np.float32)
        finite = np.ascontiguousarray(values[np.isfinite(values)])
        for quant_type in (types.F16, types.BF16):
            with np.errstate(over="ignore"):
                expected = reference.quantize(finite[None], quant_type)
            np.testing.assert_array_equal(native.quantize(finite[None], quant_type), expected)


def test_rows_are_encoded_alone_on_any_number_of_threads() -> None:
    values = np.random.default_rng(3).standard_normal((64, 768)).astype(np.float32)
    importance = np.random.default_rng(4).random(768)
    threads = _native.num_threads()
    try:
        for quant_type in (types.Q4_K, types.Q6_K, types.Q4_0):
            _native.set_num_threads(3)
            together = native.quantize(values, quant_type, importance)
            _native.set_num_threads(1)
            np.testing.assert_array_equal(together, native.quantize(values, quant_type, importance))
            for row in (0, 1, 63):
                np.testing.assert_array_equal(together[row], native.quantize(values[row], quant_type, importance))
    finally:
        _native.set_num_threads(threads)


@pytest.mark.parametrize("quant_type", benchmark.TYPES, ids=str)
def test_error_is_at_most_that_of_ggml(quant_type: QuantType) -> None:
    """The peer's errors were measured on these tensors and are recorded; ours are measured here."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    (peer, *_) = [row["peer_errors"] for row in reversed(rows) if row["type"] == quant_type.name]
    ours = benchmark.errors(native.quantize, quant_type)
    assert ours.keys() == peer.keys() and len(ours) == 8
    ratios = {key: ours[key] / peer[key] for key in ours}
    assert max(ratios.values()) <= LARGEST_RATIO, ratios


@pytest.mark.parametrize("quant_type", [t for t in benchmark.TYPES if t is not types.Q8_0], ids=str)
def test_importances_lower_the_error_they_weigh(quant_type: QuantType) -> None:
    values, weights = benchmark.tensors()["normal"], benchmark.importances()
    errors = [
        benchmark.relative_error(
            values, dequantize(quant_type, native.quantize(values, quant_type, given), values.shape), weights
        )
        for given in (weights, None)
    ]
    assert errors[0] < 0.96 * errors[1]


def test_weights_of_columns() -> None:
    np.testing.assert_array_equal(column_weights(None, 3), [1, 1, 1])
    np.testing.assert_array_equal(column_weights(np.zeros(3), 3), [1, 1, 1])
    np.testing.assert_allclose(
        column_weights(np.array([0.0, 1e30, 3e30]), 3), [LEAST_IMPORTANCE, 0.75, 2.25], rtol=1e-6
    )
    for wrong in (np.ones(2), np.array([1.0, -1.0, 1.0]), np.array([1.0, np.nan, 1.0])):
        with pytest.raises(ValueError, match="expected 3 importances"):
            column_weights(wrong, 3)


def test_refusals() -> None:
    values = np.zeros((1, 256), dtype=np.float32)
    with pytest.raises(ValueError, match="no quantiser for IQ2_XS"):
        native.quantize(values, types.IQ2_XS)
    with pytest.raises(ValueError, match="quantize: quant_type: expected a type that has a quantiser, got 17"):
        _native.quantize(types.IQ2_XS.number, values.ctypes.data, 1, 256, 0, values.ctypes.data)
    with pytest.raises(ValueError, match="quantize: cols: expected a multiple of the block size 256, got 128"):
        _native.quantize(types.Q4_K.number, values.ctypes.data, 2, 128, 0, values.ctypes.data)
    with pytest.raises(ValueError, match="quantize: source: expected the address"):
        _native.quantize(types.Q4_K.number, 0, 1, 256, 0, values.ctypes.data)


def test_the_op_takes_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    assert op.choose("cpu") is native
    monkeypatch.setenv("HELEXA_OPS", "quantize=reference")
    assert op.choose("cpu") is reference
    monkeypatch.setenv("HELEXA_OPS", "quantize=gpu")
    with pytest.raises(BackendUnavailable, match="quantize=gpu"):
        op.choose("cpu")
