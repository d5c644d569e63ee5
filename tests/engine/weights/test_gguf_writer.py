"""The writer, read back by the gguf package and by our reader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helexa_engine.errors import HelexaError, UnsupportedCheckpoint
from helexa_engine.models.config import ModelConfig
from helexa_engine.quant import quantize, types
from helexa_engine.quant.dequantize import dequantize
from helexa_engine.weights.checkpoint import open_checkpoint
from helexa_engine.weights.gguf import GGUFFile
from helexa_engine.weights.gguf_writer import VALUE_TYPES, GGUFWriter

QWEN3 = {
    "general.architecture": "qwen3",
    "qwen3.block_count": 1,
    "qwen3.context_length": 4096,
    "qwen3.embedding_length": 64,
    "qwen3.feed_forward_length": 128,
    "qwen3.attention.head_count": 4,
    "qwen3.attention.head_count_kv": 2,
    "qwen3.attention.key_length": 16,
    "qwen3.attention.value_length": 16,
    "qwen3.attention.layer_norm_rms_epsilon": 1e-6,
    "qwen3.rope.freq_base": 1e6,
    "qwen3.rope.scaling.type": "yarn",
    "qwen3.rope.scaling.factor": 4.0,
    "qwen3.rope.scaling.original_context_length": 1024,
    "tokenizer.ggml.eos_token_id": 5,
    "tokenizer.ggml.eot_token_id": 6,
    "general.sampling.temp": 0.6,
    "general.sampling.top_k": 20,
    "tokenizer.chat_template": "{{ messages }}",
    "split.count": 1,
    "split.no": 0,
}


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def read_both(path: Path) -> tuple[gguf.GGUFReader, GGUFFile]:
    return gguf.GGUFReader(path), GGUFFile(path)


def test_every_metadata_type(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    values = {name: 1.5 if "float" in name else "näme" if name == "string" else 1 for name in VALUE_TYPES}
    with GGUFWriter(path) as writer:
        for name, value in values.items():
            writer.add_metadata(f"one.{name}", bool(value) if name == "bool" else value, name)
            writer.add_metadata(f"many.{name}", [value] * 3, name)
        writer.add_metadata("empty", [], "string")
    reader, ours = read_both(path)
    for name, value in values.items():
        field = reader.fields[f"one.{name}"]
        assert field.types == [VALUE_TYPES[name]]
        assert field.contents() == value == ours.metadata[f"one.{name}"]
        field = reader.fields[f"many.{name}"]
        assert field.types == [gguf.GGUFValueType.ARRAY, VALUE_TYPES[name]]
        assert field.contents() == [value] * 3 == list(ours.metadata[f"many.{name}"])
    assert len(ours.metadata["empty"]) == 0


@pytest.mark.parametrize(
    "value, number",
    [
        (3, gguf.GGUFValueType.UINT32),
        (-3, gguf.GGUFValueType.INT32),
        (1 << 40, gguf.GGUFValueType.UINT64),
        (-(1 << 40), gguf.GGUFValueType.INT64),
        (0.5, gguf.GGUFValueType.FLOAT32),
        (True, gguf.GGUFValueType.BOOL),
        ("x", gguf.GGUFValueType.STRING),
    ],
)
def test_inferred_types(tmp_path: Path, value: object, number: int) -> None:
    path = tmp_path / "m.gguf"
    GGUFWriter(path, {"alone": value, "list": [value, value]}).write()
    reader, ours = read_both(path)
    assert reader.fields["alone"].types == [number]
    assert reader.fields["list"].types == [gguf.GGUFValueType.ARRAY, number]
    assert ours.metadata["alone"] == value and list(ours.metadata["list"]) == [value, value]


def test_nested_arrays(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    GGUFWriter(path, {"nested": [[1, 2], [3]], "texts": [["a"], ["b", "c"]]}).write()
    ours = GGUFFile(path)
    assert [list(v) for v in ours.metadata["nested"]] == [[1, 2], [3]]
    assert [list(v) for v in ours.metadata["texts"]] == [["a"], ["b", "c"]]
    with pytest.raises(TypeError, match="mixed"):
        GGUFWriter(path, {"mixed": ["a", 1]})


def test_tensors_streamed_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    matrix, vector = normal(6, 512), normal(7)

    def pieces() -> Iterator[np.ndarray]:
        for row in matrix:
            yield quantize.quantize(row, types.Q4_K)

    with GGUFWriter(path, alignment=64) as writer:
        writer.add_tensor("streamed", types.Q4_K, (6, 512), pieces)
        writer.add_tensor("vector", types.F32, (7,), vector)
        writer.add_tensor("cube", types.F16, (2, 3, 4), lambda: normal(2, 3, 4).astype(np.float16))
    reader, ours = read_both(path)
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    for name, shape in (("streamed", (6, 512)), ("vector", (7,)), ("cube", (2, 3, 4))):
        theirs, tensor = by_name[name], ours.tensors[name]
        assert tensor.shape == shape == tuple(reversed(theirs.shape.tolist()))
        assert tensor.offset == theirs.data_offset and tensor.offset % 64 == 0
        np.testing.assert_array_equal(tensor.data, np.ascontiguousarray(theirs.data).reshape(-1).view(np.uint8))
    decoded = dequantize(types.Q4_K, ours.tensors["streamed"].data, (6, 512))
    np.testing.assert_array_equal(
        decoded, gguf.quants.dequantize(by_name["streamed"].data, by_name["streamed"].tensor_type)
    )
    np.testing.assert_array_equal(ours.tensors["vector"].data.view(np.float32), vector)


def test_mistakes_leave_no_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(ValueError, match="needs 32 bytes, got 16"), GGUFWriter(path) as writer:
        writer.add_tensor("short", types.F32, (2, 4), np.zeros(4, np.float32))
    with pytest.raises(RuntimeError), GGUFWriter(path):
        raise RuntimeError
    writer = GGUFWriter(path)
    writer.add_tensor("a", types.F32, (1,), np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="twice"):
        writer.add_tensor("a", types.F32, (1,), np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="dimensions"):
        writer.add_tensor("b", types.F32, (1, 1, 1, 1, 1), np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="block size"):
        writer.add_tensor("b", types.Q4_K, (1, 100), np.zeros(1, np.uint8))
    assert not list(tmp_path.iterdir())


def write_model(path: Path, changes: dict[str, object] | None = None, extra: tuple[str, ...] = ()) -> Path:
    with GGUFWriter(path, {**QWEN3, **(changes or {})}) as writer:
        writer.add_tensor("token_embd.weight", types.F32, (32, 64), normal(32, 64))
        for name in extra:
            writer.add_tensor(name, types.F32, (1,), normal(1))
    return path


def test_metadata_becomes_a_config(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf"))
    config = checkpoint.config
    assert (config["vocab_size"], config["hidden_size"], config["tie_word_embeddings"]) == (32, 64, True)
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    assert checkpoint.generation_config == {"temperature": pytest.approx(0.6), "top_k": 20, "eos_token_id": [5, 6]}
    assert checkpoint.chat_template == "{{ messages }}"
    assert ModelConfig.from_checkpoint(checkpoint.architecture, config, checkpoint.where).head_dim == 16


@pytest.mark.parametrize(
    ("name", "scale", "message"),
    [
        ("blk.0.attn_k", np.ones(1, np.float32), "attn_k.scale.*a scale without its matrix 'blk.0.attn_k.weight'"),
        (
            "blk.0.attn_q",
            np.ones(2, np.float32),
            "attn_q.scale.*expected the scale of a matrix, .* got .2. for .16, 64.",
        ),
        ("blk.0.attn_norm", np.ones(1, np.float32), r"attn_norm.scale.*expected the scale of a matrix, .* for \[64\]"),
        ("blk.0.attn_q", np.full(1, np.nan, np.float32), "attn_q.scale.*expected finite numbers in F32"),
        ("blk.0.attn_q", np.ones(1, np.float16), "attn_q.scale.*expected finite numbers in F32, got F16"),
    ],
)
def test_a_scale_that_fits_nothing_is_named(tmp_path: Path, name: str, scale: np.ndarray, message: str) -> None:
    with GGUFWriter(tmp_path / "m.gguf", QWEN3) as writer:
        writer.add_tensor("token_embd.weight", types.F32, (32, 64), normal(32, 64))
        writer.add_tensor("blk.0.attn_q.weight", types.F32, (16, 64), normal(16, 64))
        writer.add_tensor("blk.0.attn_norm.weight", types.F32, (64,), normal(64))
        quant_type = types.F16 if scale.dtype == np.float16 else types.F32
        writer.add_tensor(f"{name}.scale", quant_type, scale.shape, scale)
    with pytest.raises(UnsupportedCheckpoint, match=message):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_renamed_part_of_a_split_model_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", {"split.count": 2, "split.no": 1})
    with pytest.raises(UnsupportedCheckpoint, match="not the first part"):
        open_checkpoint(path)
    first = write_model(tmp_path / "x-00001-of-00002.gguf", {"split.count": 2, "split.no": 0})
    with GGUFWriter(tmp_path / "x-00002-of-00002.gguf", {"split.count": 3, "split.no": 1}) as writer:
        writer.add_tensor("a", types.F32, (1,), normal(1))
    with pytest.raises(UnsupportedCheckpoint, match="not part 2 of 2"):
        open_checkpoint(first)


ANYTHING = st.one_of(
    st.booleans(),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.floats(width=32),
    st.text(max_size=8),
    st.lists(st.integers(0, 1 << 32), max_size=3),
    st.lists(st.text(max_size=3), min_size=1, max_size=3),
    st.lists(st.lists(st.integers(0, 3), max_size=2), min_size=1, max_size=2),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(sorted(QWEN3)), value=ANYTHING)
def test_metadata_of_any_type_and_value_gives_a_config_or_one_of_our_errors(
    tmp_path: Path, key: str, value: object
) -> None:
    path = write_model(tmp_path / "m.gguf", {key: value})
    try:
        checkpoint = open_checkpoint(path)
        ModelConfig.from_checkpoint(checkpoint.architecture, checkpoint.config, checkpoint.where)
    except HelexaError as error:
        assert str(path) in str(error) or "m.gguf" in str(error)
