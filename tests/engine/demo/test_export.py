"""A checkpoint in the Qwen3.5 layout written as GGUF and read back: the same model, in the conventions of that architecture."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

from helexa_engine.demo import evaluate, export, hybrid, tokenizer  # noqa: E402
from helexa_engine.demo.conversations import training  # noqa: E402
from helexa_engine.demo.gguf_layout import from_gguf, gguf_name, to_gguf  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A HuggingFace folder with random weights of the demo's shape, whose matrices Q8_0 holds exactly."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(3)
    model = hybrid.new_model()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.05 if p.ndim == 2 else 0.2))
            if p.ndim == 2:
                q8 = gguf.GGMLQuantizationType.Q8_0
                # Moving whole value heads keeps blocks of 32 together, so the detour through the file's order changes nothing.
                p.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(p.numpy(), q8), q8)))
    model.save_pretrained(folder)
    texts = (tokenizer.conversation(sample) for sample in itertools.islice(training(seed=0), 4000))
    tokenizer.train_tokenizer(texts).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    export.export(folder, folder / "tokenizer.json", folder / "model.gguf")
    return folder / "model.gguf"


def test_read_back_gives_identical_logits(folder: Path, file: Path) -> None:
    from transformers import Qwen3_5ForCausalLM

    saved = Qwen3_5ForCausalLM.from_pretrained(folder).eval()
    read, _ = evaluate.load_gguf(file)
    ids = torch.randint(0, tokenizer.VOCAB_SIZE, (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = saved(input_ids=ids).logits, read(input_ids=ids).logits
    # Not bit for bit: 1 + w and exp(A_log) are rounded once on the way.
    assert (expected - got).abs().max() < 1e-4 * expected.abs().max()
    for (name, a), b in zip(saved.state_dict().items(), read.state_dict().values(), strict=True):
        assert torch.equal(a, b) if a.ndim > 1 else torch.allclose(a, b, atol=1e-6), name


def test_every_tensor_has_a_name_of_the_architecture(file: Path) -> None:
    known = {
        (gguf.TENSOR_NAMES[kind].format(bid=i) if "{bid}" in gguf.TENSOR_NAMES[kind] else gguf.TENSOR_NAMES[kind])
        for kind in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.QWEN35]
        for i in range(8)
    }
    reader = gguf.GGUFReader(file)
    assert len(reader.tensors) == 2 + 2 * 11 + 6 * 14
    for tensor in reader.tensors:
        stem = tensor.name.removesuffix(".weight").removesuffix(".bias")
        assert stem in known, tensor.name
        is_matrix = len(tensor.shape) == 2 and "conv1d" not in tensor.name
        assert tensor.tensor_type.name == ("Q8_0" if is_matrix else "F32"), tensor.name


def test_conventions_of_the_stored_values(folder: Path, file: Path) -> None:
    from safetensors.numpy import load_file

    saved = load_file(folder / "model.safetensors")
    stored = {t.name: np.array(t.data) for t in gguf.GGUFReader(file).tensors if t.tensor_type.name == "F32"}
    net, layer = "model.layers.0.linear_attn", "model.layers.0"
    tiled = [0, 2, 1, 3]  # two key heads with two value heads each
    assert np.allclose(stored["blk.0.ssm_a"], -np.exp(saved[f"{net}.A_log"][tiled]))
    assert np.array_equal(stored["blk.0.ssm_dt.bias"], saved[f"{net}.dt_bias"][tiled])
    assert np.allclose(stored["blk.0.attn_norm.weight"], 1 + saved[f"{layer}.input_layernorm.weight"])
    assert np.array_equal(stored["blk.0.ssm_norm.weight"], saved[f"{net}.norm.weight"])
    taps = saved[f"{net}.conv1d.weight"][:, 0]
    assert np.array_equal(stored["blk.0.ssm_conv1d.weight"][:256], taps[:256])
    assert np.array_equal(stored["blk.0.ssm_conv1d.weight"][256 + 64 : 256 + 128], taps[256 + 128 : 256 + 192])


@pytest.mark.parametrize(("keys", "values"), [(2, 2), (2, 4), (2, 6), (3, 6)])
def test_layouts_invert_each_other(keys: int, values: int) -> None:
    config: dict[str, Any] = {
        "linear_num_key_heads": keys,
        "linear_num_value_heads": values,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 8,
    }
    shapes = {
        "in_proj_qkv.weight": (2 * keys * 4 + values * 8, 5),
        "in_proj_z.weight": (values * 8, 5),
        "in_proj_a.weight": (values, 5),
        "conv1d.weight": (2 * keys * 4 + values * 8, 1, 4),
        "A_log": (values,),
        "out_proj.weight": (5, values * 8),
    }
    rng = np.random.default_rng(0)
    for module, shape in shapes.items():
        name = f"model.layers.3.linear_attn.{module}"
        original = rng.standard_normal(shape).astype(np.float32)
        stored = to_gguf(name, original, config)
        assert np.allclose(from_gguf(name, stored, config), original, atol=1e-6)
        # The value head j of the file belongs to key head j mod K: in a checkpoint it is the next one of that key head.
        if module == "in_proj_a.weight":
            for j in range(values):
                assert np.array_equal(stored[j], original[(j % keys) * (values // keys) + j // keys])


def test_names_of_other_models_are_refused() -> None:
    with pytest.raises(KeyError):
        gguf_name("model.layers.0.mlp.experts.gate_proj.weight")


def test_config_is_written_as_metadata(folder: Path, file: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    fields = gguf.GGUFReader(file).fields
    assert fields["general.architecture"].contents() == "qwen35"
    for key, expected in {
        "ssm.conv_kernel": 4,
        "ssm.state_size": 64,
        "ssm.group_count": 2,
        "ssm.time_step_rank": 4,
        "ssm.inner_size": 256,
        "full_attention_interval": 4,
        "rope.dimension_count": 16,
        "rope.dimension_sections": [3, 3, 2, 0],
        "block_count": config["num_hidden_layers"],
    }.items():
        assert fields[f"qwen35.{key}"].contents() == expected, key
