from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from helexa_engine.errors import InvalidRequest
from helexa_engine.presets import PRESETS, PresetCheckpoint, preset, random_values, tensors, write_preset_gguf
from helexa_engine.quant import mixes, types
from helexa_engine.quant.dequantize import dequantize
from helexa_engine.weights.checkpoint import open_checkpoint

#: Parameters that the model cards state, in billions, embeddings included.
PARAMETERS = {
    "qwen3-0.6b": 0.6,
    "qwen3-1.7b": 1.7,
    "qwen3-4b": 4.0,
    "qwen3-8b": 8.2,
    "qwen3-14b": 14.8,
    "qwen3-32b": 32.8,
    "qwen3-30b-a3b": 30.5,
    "qwen3-next-80b-a3b": 80.0,
    "qwen3.5-4b": 4.2,
    "qwen3.5-9b": 9.0,
    "qwen3.5-27b": 27.0,
    "qwen3.5-35b-a3b": 35.0,
}


@pytest.mark.parametrize(("name", "billions"), PARAMETERS.items())
def test_shapes_have_the_published_size(name: str, billions: float) -> None:
    assert sum(int(np.prod(t.shape)) for t in tensors(preset(name), mixes.MIXES["Q8_0"])) / 1e9 == pytest.approx(
        billions, rel=0.02
    )


@pytest.mark.parametrize(
    "quant_type",
    [types.F32, types.F16, types.BF16, types.Q4_0, types.Q4_1, types.Q5_0, types.Q5_1, types.Q8_0, types.Q2_K, types.Q3_K,
     types.Q4_K, types.Q5_K, types.Q6_K, types.IQ4_NL, types.IQ4_XS],
    ids=str,
)  # fmt: skip
def test_random_values_have_the_size_asked_for(quant_type: types.QuantType) -> None:
    count = 256 * 4096
    raw = random_values(quant_type, count, 0.02, np.random.default_rng(1))
    assert raw.nbytes == quant_type.row_bytes(count)
    values = dequantize(quant_type, raw, [count])
    assert np.isfinite(values).all()
    assert values.std() == pytest.approx(0.02, rel=0.05)
    assert abs(values.mean()) < 0.0023  # half a 4-bit code: ggml's signed codes run from -8 to 7
    assert len(np.unique(raw)) > 60


def size(values: np.ndarray) -> float:
    return float(np.sqrt((values.astype(np.float64) ** 2).mean()))


@pytest.mark.parametrize("quant", mixes.MIXES)
def test_the_file_is_what_another_reader_expects(tmp_path: Path, quant: str) -> None:
    path = tmp_path / "tiny.gguf"
    fractions: list[float] = []
    write_preset_gguf(path, "qwen3-tiny", quant, progress=fractions.append)
    reader = gguf.GGUFReader(path)
    shape = PRESETS["qwen3-tiny"]
    assert len(reader.fields["tokenizer.ggml.tokens"].data) == shape.vocab_size
    assert len(set(reader.fields["tokenizer.ggml.tokens"].contents())) == shape.vocab_size
    kinds = reader.fields["tokenizer.ggml.token_type"]
    assert kinds.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]  # what llama.cpp insists on
    assert len(kinds.data) == shape.vocab_size
    assert reader.fields["qwen3.block_count"].contents() == shape.num_hidden_layers
    assert len(reader.tensors) == 2 + 11 * shape.num_hidden_layers
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        expected = 1.0 if values.ndim == 1 else values.shape[-1] ** -0.5
        assert size(values) == pytest.approx(expected, rel=0.1), tensor.name
    assert fractions[-1] == 1.0 and fractions == sorted(fractions)
    assert list(tmp_path.iterdir()) == [path]


#: preset -> tensors of a layer with attention, of a layer with a delta net, and of one of either that the other families lack.
FAMILIES = {
    "qwen3-moe-tiny": (12, 0, {"ffn_gate_inp.weight": (16, 256), "ffn_down_exps.weight": (16, 256, 256)}),
    "qwen3.5-tiny": (11, 14, {"ssm_conv1d.weight": (1024, 4), "ssm_alpha.weight": (4, 256), "ssm_a": (4,)}),
}


@pytest.mark.parametrize(("name", "family"), FAMILIES.items(), ids=FAMILIES)
def test_files_of_every_family_hold_their_tensors(
    tmp_path: Path, name: str, family: tuple[int, int, dict[str, tuple[int, ...]]]
) -> None:
    attention, delta_net, shapes = family
    path = tmp_path / "tiny.gguf"
    write_preset_gguf(path, name, "Q4_K_M")
    reader, shape = gguf.GGUFReader(path), PRESETS[name]
    attention_layers = shape.layer_types.count("full_attention")
    expected = attention_layers * attention + (shape.num_hidden_layers - attention_layers) * delta_net
    assert len(reader.tensors) == 2 + (not shape.tie_word_embeddings) + expected
    for tensor in reader.tensors:
        stem = tensor.name.split(".", 2)[-1]
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        if stem in shapes:
            assert values.shape == shapes[stem]
        if stem == "ssm_a":
            assert (values < 0).all()
        elif stem != "ssm_dt.bias":
            tolerance = 0.1 if values.size > 4096 else 0.2  # a few blocks, each with scales of its own
            wanted = 1.0 if values.ndim == 1 else values.shape[-1] ** -0.5
            assert size(values) == pytest.approx(wanted, rel=tolerance), stem


def test_qwen3_next_writes_what_it_alone_has() -> None:
    shapes = {t.name: t.shape for t in tensors(preset("qwen3-next-80b-a3b"), mixes.MIXES["Q4_K_M"])}
    assert shapes["blk.0.ssm_ba.weight"] == (64, 2048) and "blk.0.ssm_beta.weight" not in shapes
    assert shapes["blk.0.ffn_gate_inp_shexp.weight"] == (2048,) and shapes["blk.3.attn_q.weight"] == (8192, 2048)
    types_of = {t.name: t.quant_type.name for t in tensors(preset("qwen3.5-35b-a3b"), mixes.MIXES["Q4_K_M"])}
    raised = [types_of[f"blk.{i}.{stem}.weight"] for i in (0, 39) for stem in ("ffn_down_exps", "ffn_down_shexp", "attn_qkv")
              if f"blk.{i}.{stem}.weight" in types_of]  # fmt: skip
    assert set(raised) == {"Q6_K"} and types_of["blk.5.ffn_down_exps.weight"] == "Q4_K"
    assert types_of["blk.0.ffn_gate_inp.weight"] == types_of["blk.0.ssm_conv1d.weight"] == "F32"


def test_q4_k_m_mixes_as_the_published_files_do() -> None:
    kinds = {t.name: t.quant_type.name for t in tensors(preset("qwen3-0.6b"), mixes.MIXES["Q4_K_M"])}
    assert kinds["token_embd.weight"] == "Q6_K" and kinds["blk.0.attn_q.weight"] == "Q4_K"
    raised = [i for i in range(28) if kinds[f"blk.{i}.ffn_down.weight"] == "Q6_K"]
    assert raised == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]
    assert raised == [i for i in range(28) if kinds[f"blk.{i}.attn_v.weight"] == "Q6_K"]
    untied = {t.name: t.quant_type.name for t in tensors(preset("qwen3-8b"), mixes.MIXES["Q4_K_M"])}
    assert (untied["token_embd.weight"], untied["output.weight"]) == ("Q4_K", "Q6_K")


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_preset_gguf(tmp_path / name, "qwen3-tiny", "Q4_K_M", seed=seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b and a != c and len(a) == len(c)


@pytest.mark.parametrize(("name", "quant"), [("qwen9", "Q8_0"), ("qwen3-tiny", "Q9_9")])
def test_unknown_names_are_refused(tmp_path: Path, name: str, quant: str) -> None:
    with pytest.raises(InvalidRequest, match="expected one of"):
        write_preset_gguf(tmp_path / "x", name, quant)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quant", ["Q4_K_M", "BF16"])
@pytest.mark.parametrize("name", [name for name in PRESETS if "tiny" in name])
def test_a_preset_in_memory_is_the_file_but_for_its_values(tmp_path: Path, name: str, quant: str) -> None:
    path = tmp_path / "model.gguf"
    write_preset_gguf(path, name, quant)
    with open_checkpoint(path) as file, PresetCheckpoint(name, quant) as made:
        assert (made.architecture, made.config) == (file.architecture, file.config)
        assert made.generation_config == file.generation_config and made.chat_template == file.chat_template
        assert made.tensor_names() == file.tensor_names()
        for theirs in file.tensors:
            ours = made.tensor(theirs.name)
            assert (ours.shape, ours.quant_type, ours.nbytes) == (theirs.shape, theirs.quant_type, theirs.nbytes)
            assert ours.data.nbytes == theirs.nbytes
            assert size(ours.values()) == pytest.approx(size(theirs.values()), rel=0.3, abs=0.05)
            assert np.isfinite(ours.values()).all() and len(np.unique(ours.data)) > min(60, ours.nbytes // 16)


def test_a_preset_in_memory_must_exist() -> None:
    with pytest.raises(InvalidRequest, match="Q9"):
        PresetCheckpoint("qwen3-tiny", "Q9")
    with pytest.raises(InvalidRequest, match="qwen9"):
        PresetCheckpoint("qwen9", "Q8_0")
