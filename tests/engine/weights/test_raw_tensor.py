"""A tensor made out of others: exact bytes, nothing read before it is asked for, and errors that name the place."""

from __future__ import annotations

import numpy as np
import pytest

from helexa_engine.errors import UnsupportedCheckpoint
from helexa_engine.quant import types
from helexa_engine.quant.quantize import quantize
from helexa_engine.quant.types import QuantType
from helexa_engine.weights.raw_tensor import RawTensor, scaled, stack

VALUES = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)


def raw(name: str = "w", quant_type: QuantType = types.Q8_0, values: np.ndarray = VALUES) -> RawTensor:
    return RawTensor(name, quant_type, values.shape, quantize(values, quant_type).reshape(-1), (f"file.{name}",))


def never() -> np.ndarray:
    raise AssertionError("read too early")


def test_sizes_come_from_the_shape_alone() -> None:
    tensor = RawTensor("w", types.Q4_K, (3, 5, 512), never)
    assert tensor.nbytes == 3 * 5 * 2 * 144 and tensor.row_bytes == 2 * 144
    assert tensor.presented("v", (15, 512)).nbytes == tensor.nbytes
    assert stack("s", [tensor, tensor], "f").shape == (2, 3, 5, 512)
    tensor.rearranged("r", (15, 512), lambda rows: rows)
    tensor.mapped("m", lambda values: values)


def test_the_label_has_the_file_s_name_where_it_differs() -> None:
    assert raw("w").label == "'w' (stored as 'file.w')"
    assert RawTensor("w", types.F32, (1,), never, ("w",)).label == "'w'"
    assert RawTensor("w", types.F32, (1,), never, ("a", "b")).label == "'w'"


@pytest.mark.parametrize("quant_type", [types.F32, types.BF16, types.Q8_0, types.Q4_0], ids=str)
def test_rows_are_rearranged_exactly(quant_type: QuantType) -> None:
    tensor = raw(quant_type=quant_type)
    order = [5, 0, 3, 1, 4, 2]
    moved = tensor.rearranged("r", (6, 64), lambda rows: rows[order])
    np.testing.assert_array_equal(moved.values(), tensor.values()[order])
    half = tensor.rearranged("h", (3, 64), lambda rows: rows[3:])
    assert np.shares_memory(half.data, tensor.data), "a slice is no copy"
    np.testing.assert_array_equal(half.values(), tensor.values()[3:])


def test_a_function_of_the_values_is_float32() -> None:
    made = raw().mapped("m", lambda values: 1 + values.T)
    assert made.quant_type is types.F32 and made.name == "m"
    np.testing.assert_array_equal(made.data.view(np.float32).reshape(64, 6), 1 + raw().values().T)


def test_float64_comes_as_float32() -> None:
    values = VALUES.astype(np.float64)
    tensor = RawTensor("w", types.F64, values.shape, values.reshape(-1).view(np.uint8))
    assert tensor.values().dtype == np.float32
    np.testing.assert_array_equal(tensor.values(), VALUES)


def test_a_stack_is_its_members_one_after_the_other() -> None:
    members = [raw("a"), raw("b", values=-VALUES)]
    both = stack("s", members, "file")
    assert both.shape == (2, 6, 64) and both.stored_names == ("file.a", "file.b")
    for member, tensor in zip(both.members(), members, strict=True):
        np.testing.assert_array_equal(member, tensor.data)
    for other in (raw("b", types.Q4_0), raw("b", values=VALUES[:3])):
        with pytest.raises(UnsupportedCheckpoint, match=r"file: tensor 'b': expected Q8_0 \[6, 64\] as 'a' has"):
            stack("s", [raw("a"), other], "file")


def test_a_scale_stands_beside_the_blocks() -> None:
    def scale(*values: float, quant_type: QuantType = types.F32) -> RawTensor:
        return raw("w.scale", quant_type, np.array(values, np.float32))

    one = scaled(raw(), scale(0.5), "file")
    assert one.scales == (0.5,) and one.stored_names == ("file.w", "file.w.scale")
    np.testing.assert_array_equal(one.data, raw().data)
    experts = stack("s", [raw("a"), raw("b")], "file")
    assert scaled(experts, scale(0.5, 2.0), "file").scales == (0.5, 2.0)
    with pytest.raises(
        UnsupportedCheckpoint, match=r"tensor 'w.scale': expected the scale of a matrix, or one an expert"
    ):
        scaled(raw(), scale(1.0, 2.0), "file")
    with pytest.raises(UnsupportedCheckpoint, match="expected finite numbers in F32, got F32"):
        scaled(raw(), scale(float("inf")), "file")
    with pytest.raises(UnsupportedCheckpoint, match="expected finite numbers in F32, got F16"):
        scaled(raw(), scale(1.0, quant_type=types.F16), "file")
