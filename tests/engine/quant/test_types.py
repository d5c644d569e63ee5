"""The table against the gguf package, which knows every type that files can hold."""

from __future__ import annotations

import gguf
import pytest

from helexa_engine.quant import types


def test_every_type_of_the_gguf_package_has_its_row() -> None:
    expected = {(t.name, t.value, *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    assert {(t.name, t.number, t.block_size, t.block_bytes) for t in types.QUANT_TYPES} == expected


def test_lookup_by_number_and_name() -> None:
    for t in types.QUANT_TYPES:
        assert types.by_number(t.number) is t
        assert types.by_name(t.name) is t
        assert types.by_name(t.name.lower()) is t
    assert types.by_number(4) is None  # Q4_2, removed from ggml
    assert types.by_name("Q9_K") is None


def test_row_bytes() -> None:
    assert types.Q4_K.row_bytes(512) == 288
    assert types.Q4_K.bits_per_weight == 4.5
    with pytest.raises(ValueError, match="300 values.*Q4_K block size 256"):
        types.Q4_K.row_bytes(300)
