"""The quantisers: readable by the gguf package, never worse than the naive choice, exact where exactness is possible."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from helexa_engine.quant import mixes, quantize, types
from helexa_engine.quant.dequantize import dequantize
from helexa_engine.quant.types import QuantType

# Root mean square error over the values' own, on normal values. Information theory gives 2^-bits at best; the figures
# are what the format's plain definition (largest value sets the scale) costs on the same values, or, for the formats that
# the gguf package cannot quantise, a few percent above what ours was measured at: a guard against getting worse.
LARGEST_ERROR = {
    types.F16: 0.0003,
    types.BF16: 0.0018,
    types.Q8_0: 0.0055,
    types.Q4_0: 0.0840,
    types.Q4_1: 0.0740,
    types.Q5_0: 0.0415,
    types.Q5_1: 0.0360,
    types.Q2_K: 0.2800,
    types.Q3_K: 0.1500,
    types.Q4_K: 0.0740,
    types.Q5_K: 0.0375,
    types.Q6_K: 0.0175,
    types.IQ4_NL: 0.0770,
    types.IQ4_XS: 0.0780,
}
BLOCKS = [t for t in quantize.QUANTISABLE if t.is_quantised]


def normal(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def relative_error(values: np.ndarray, decoded: np.ndarray) -> float:
    return float(np.sqrt(((decoded - values) ** 2).mean() / (values**2).mean()))


@pytest.mark.parametrize("quant_type", LARGEST_ERROR, ids=str)
def test_error_on_normal_values(quant_type: QuantType) -> None:
    values = normal(32, 1024) * np.float32(0.02)
    data = quantize.quantize(values, quant_type)
    assert data.dtype == np.uint8 and data.shape == (32, quant_type.row_bytes(1024))
    assert relative_error(values, dequantize(quant_type, data, values.shape)) < LARGEST_ERROR[quant_type]
    oracle = gguf.quants.dequantize(
        data.view(np.float16) if quant_type is types.F16 else data, gguf.GGMLQuantizationType(quant_type.number)
    )
    np.testing.assert_array_equal(oracle.reshape(values.shape), dequantize(quant_type, data, values.shape))


@pytest.mark.parametrize("quant_type", [types.Q8_0, types.F16, types.BF16], ids=str)
def test_plain_formats_equal_the_gguf_package(quant_type: QuantType) -> None:
    values = normal(16, 512)
    expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType(quant_type.number))
    np.testing.assert_array_equal(quantize.quantize(values, quant_type), expected.view(np.uint8))


@pytest.mark.parametrize("quant_type", [types.Q4_0, types.Q4_1, types.Q5_0, types.Q5_1], ids=str)
@pytest.mark.parametrize("shape", ["normal", "outlier", "shifted", "tiny"])
def test_no_block_is_worse_than_the_naive_one(quant_type: QuantType, shape: str) -> None:
    values = normal(64, 32)
    if shape == "outlier":
        values[:, 5] *= 20
    elif shape == "shifted":
        values += 3
    elif shape == "tiny":
        values *= np.float32(1e-6)
    number = gguf.GGMLQuantizationType(quant_type.number)
    naive = gguf.quants.dequantize(gguf.quants.quantize(values, number), number)
    ours = dequantize(quant_type, quantize.quantize(values, quant_type), values.shape)
    naive_error, our_error = ((naive - values) ** 2).sum(axis=1), ((ours - values) ** 2).sum(axis=1)
    # The gguf package divides by the scale before it is rounded to float16, we after: a tie may fall either way.
    assert (our_error <= naive_error * 1.02).all()
    assert our_error.sum() <= naive_error.sum()


@pytest.mark.parametrize("quant_type", BLOCKS, ids=str)
def test_special_blocks(quant_type: QuantType) -> None:
    """Zeros stay zero; a constant, tiny and huge values stay finite and near."""
    size = quant_type.block_size
    values = np.zeros((6, size), dtype=np.float32)
    values[1], values[2], values[3, 0], values[4], values[5] = 1.5, -0.25, 7.0, 1e-30, 6e4
    with np.errstate(all="raise", under="ignore"):
        data = quantize.quantize(values, quant_type)
    decoded = dequantize(quant_type, data, values.shape)
    assert np.isfinite(decoded).all()
    assert not decoded[0].any() and not decoded[4].any()
    tolerance = 0.35 if quant_type in (types.Q2_K, types.Q3_K) else 0.15
    for row in (1, 2, 3, 5):
        assert np.abs(decoded[row] - values[row]).max() <= tolerance * np.abs(values[row]).max()


@pytest.mark.parametrize("quant_type", BLOCKS, ids=str)
def test_what_a_block_holds_exactly_is_quantised_with_little_loss(quant_type: QuantType) -> None:
    values = dequantize(quant_type, quantize.quantize(normal(4, 512), quant_type), (4, 512))
    again = dequantize(quant_type, quantize.quantize(values, quant_type), (4, 512))
    assert relative_error(values, again) < LARGEST_ERROR[quant_type] / 2


def test_rows_are_quantised_alone() -> None:
    values = normal(5, 512)
    together = quantize.quantize(values, types.Q4_K)
    for row in range(5):
        np.testing.assert_array_equal(together[row], quantize.quantize(values[row], types.Q4_K))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no quantiser for IQ2_XS"):
        quantize.quantize(normal(1, 256), types.IQ2_XS)
    with pytest.raises(ValueError, match="block size 256"):
        quantize.quantize(normal(1, 128), types.Q4_K)


# --- mixes ------------------------------------------------------------------------------------------------------------


def types_of(mix_name: str, module: str, num_layers: int = 28, gqa_ratio: int = 2, cols: int = 1024) -> list[str]:
    mix = mixes.by_name(mix_name)
    assert mix is not None
    return [
        mixes.quant_type_for(
            mix, f"model.layers.{i}.{module}.weight", (64, cols), num_layers=num_layers, gqa_ratio=gqa_ratio, tied=True
        ).name
        for i in range(num_layers)
    ]


def test_more_bits_as_llama_cpp_places_them() -> None:
    """The layers of Qwen3-0.6B's Q4_K_M file whose ffn_down is Q6_K."""
    chosen = [i for i, name in enumerate(types_of("Q4_K_M", "mlp.down_proj")) if name == "Q6_K"]
    assert chosen == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]
    assert types_of("Q4_K_M", "self_attn.v_proj") == types_of("Q4_K_M", "mlp.down_proj")
    assert set(types_of("Q4_K_M", "self_attn.q_proj")) == {"Q4_K"}
    assert set(types_of("Q5_K_M", "mlp.down_proj")) == {"Q5_K", "Q6_K"}


def test_other_mixes() -> None:
    assert types_of("Q3_K_M", "self_attn.v_proj")[:3] == ["Q5_K", "Q5_K", "Q4_K"]
    assert types_of("Q3_K_M", "mlp.down_proj")[:2] == ["Q5_K", "Q4_K"]
    assert set(types_of("Q3_K_M", "self_attn.o_proj")) == {"Q4_K"}
    assert set(types_of("Q3_K_M", "mlp.up_proj")) == {"Q3_K"}
    assert set(types_of("IQ4_XS", "self_attn.v_proj", gqa_ratio=2)) == {"IQ4_XS"}
    assert set(types_of("IQ4_XS", "self_attn.v_proj", gqa_ratio=4)) == {"Q5_K"}
    assert types_of("IQ4_XS", "mlp.down_proj")[:4] == ["Q5_K"] * 3 + ["IQ4_XS"]
    for uniform in ("Q6_K", "Q8_0", "Q4_0", "BF16", "F16", "F32"):
        assert set(types_of(uniform, "mlp.down_proj")) == {uniform}


def test_an_importance_matrix_changes_two_mixes() -> None:
    def down(mix_name: str, *, has_importance: bool) -> list[str]:
        return [
            mixes.quant_type_for(
                mixes.MIXES[mix_name], f"model.layers.{i}.mlp.down_proj.weight", (64, 256), num_layers=16, gqa_ratio=2,
                tied=True, has_importance=has_importance,
            ).name
            for i in range(3)
        ]  # fmt: skip

    assert down("Q4_0", has_importance=True) == ["Q4_1", "Q4_1", "Q4_0"]
    assert down("Q4_0", has_importance=False) == ["Q4_0"] * 3
    assert down("IQ4_XS", has_importance=True) == ["IQ4_XS"] * 3
    assert down("IQ4_XS", has_importance=False) == ["Q5_K", "Q5_K", "IQ4_XS"]
    assert down("Q4_K_M", has_importance=True) == down("Q4_K_M", has_importance=False)


def test_head_norms_and_fallbacks() -> None:
    mix = mixes.MIXES["Q4_K_M"]
    shape = {"num_layers": 4, "gqa_ratio": 2}
    assert mixes.quant_type_for(mix, "model.embed_tokens.weight", (512, 256), tied=True, **shape) is types.Q6_K
    assert mixes.quant_type_for(mix, "model.embed_tokens.weight", (512, 256), tied=False, **shape) is types.Q4_K
    assert mixes.quant_type_for(mix, "lm_head.weight", (512, 256), tied=False, **shape) is types.Q6_K
    assert mixes.quant_type_for(mix, "model.norm.weight", (256,), tied=True, **shape) is types.F32
    assert set(types_of("Q4_K_M", "self_attn.q_proj", cols=96)) == {"Q5_0"}
    assert set(types_of("Q5_K_M", "self_attn.q_proj", cols=96)) == {"Q5_1"}
    assert set(types_of("Q3_K_M", "self_attn.q_proj", cols=96)) == {"Q4_0"}
    assert mixes.quant_type_for(mixes.MIXES["Q4_0"], "lm_head.weight", (512, 256), tied=False, **shape) is types.Q6_K
    assert mixes.quant_type_for(mixes.MIXES["Q4_0"], "lm_head.weight", (512, 96), tied=False, **shape) is types.Q8_0
    assert set(types_of("Q6_K", "self_attn.q_proj", cols=96)) == {"Q8_0"}
    assert set(types_of("IQ4_XS", "self_attn.q_proj", cols=96)) == {"IQ4_NL"}
    assert set(types_of("Q8_0", "self_attn.q_proj", cols=40)) == {"F16"}
    assert set(types_of("Q4_K_M", "self_attn.q_proj", cols=40)) == {"F16"}


def test_file_types_are_those_of_the_gguf_package() -> None:
    for mix in mixes.MIXES.values():
        name = "ALL_F32" if mix.name == "F32" else f"MOSTLY_{mix.name}"
        assert gguf.LlamaFileType[name] == mix.file_type
    assert mixes.by_name("q4_k_m") is mixes.MIXES["Q4_K_M"]
    assert mixes.by_name("Q9") is None
