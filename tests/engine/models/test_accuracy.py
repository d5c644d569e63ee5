"""The accuracy bar: logits of files, as the engine computes them, against their exact dequantised weights in float32.

The measure is the normalised mean square error over all logits of 200 tokens, ``sum((got - truth)^2) / sum(truth^2)``. The truth
is a model in float32 with weights that the ``gguf`` package reads and dequantises, so only what *computing* costs is counted, not
what the file's types cost. For dense Qwen3 that model is HuggingFace's; for the others, whose files order some weights in a way of
their own, it is the engine's on a float32 file, which :func:`test_the_float32_path_is_exact` holds to HuggingFace's. The bounds
are what llama.cpp costs on such models (same measure, largest of several files).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helexa_engine import LLM
from helexa_engine.ops.quant_matmul import reference as quant_matmul_twin
from helexa_engine.ops.registry import native_core
from helexa_engine.quant import mixes, types
from helexa_engine.testing.checkpoints import write_folder, write_gguf
from helexa_engine.weights import gguf_names
from helexa_engine.weights.gguf import GGUFFile
from helexa_engine.weights.gguf_writer import GGUFWriter

NUM_TOKENS = 200


@dataclass(frozen=True)
class Bar:
    """Largest error of an architecture's files by the kind of arithmetic they ask for."""

    float32: float
    bf16: float
    q8_0: float
    q4_k_m: float

    def of(self, mix: str) -> float:
        """A mix without a row of its own is held to the stricter of its neighbours, but a 4-bit one to that of Q4_K_M."""
        rows = {"F32": self.float32, "BF16": self.bf16, "Q8_0": self.q8_0, "Q6_K": self.q8_0, "Q5_K_M": self.q8_0}
        return rows.get(mix, self.q4_k_m)


BARS = {
    "qwen3": Bar(float32=1e-8, bf16=2.5e-5, q8_0=3.6e-4, q4_k_m=8.1e-4),
    "qwen3moe": Bar(float32=1e-6, bf16=1.1e-3, q8_0=2.7e-3, q4_k_m=3.4e-3),
    "qwen3next": Bar(float32=1e-6, bf16=9.3e-4, q8_0=8.6e-3, q4_k_m=1.5e-2),
    "qwen35": Bar(float32=1e-8, bf16=1.6e-4, q8_0=2.7e-3, q4_k_m=7.2e-3),
    "qwen35moe": Bar(float32=1e-6, bf16=3.3e-4, q8_0=4.8e-3, q4_k_m=7.1e-3),
}

#: mix -> types that its matrices have on disk, in a model of four layers whose rows are multiples of 256.
MIXES = {
    "F32": {"F32"},
    "BF16": {"BF16"},
    "Q8_0": {"Q8_0"},
    "Q6_K": {"Q6_K"},
    "Q5_K_M": {"Q5_K", "Q6_K"},
    "Q4_K_M": {"Q4_K", "Q6_K"},
    "Q4_0": {"Q4_0"},
    "IQ4_XS": {"IQ4_XS", "Q6_K"},
}


@dataclass(frozen=True)
class Model:
    """A tiny seeded model of four layers."""

    name: str
    architecture: str
    seed: int
    changes: dict[str, Any] = field(hash=False)


TIED = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64,
    "tie_word_embeddings": True, "num_hidden_layers": 4,
}  # fmt: skip
UNTIED = {
    "hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 128,
    "tie_word_embeddings": False, "num_hidden_layers": 4,
}  # fmt: skip
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4, "num_hidden_layers": 4}
# Rounding shows in the mixtures mostly where it changes which expert a token goes to, so a single model says little.
MODELS = {
    model.name: model
    for model in (
        Model("qwen3-tied-gqa4-a", "qwen3", 0, TIED),
        Model("qwen3-tied-gqa4-b", "qwen3", 1, TIED),
        Model("qwen3-untied-gqa1", "qwen3", 2, UNTIED),
        Model("qwen3moe-a", "qwen3moe", 0, EXPERTS),
        Model("qwen3moe-b", "qwen3moe", 1, EXPERTS),
        Model("qwen3next-a", "qwen3next", 0, EXPERTS),
        Model("qwen3next-b", "qwen3next", 1, EXPERTS | {"linear_num_value_heads": 12}),
        Model("qwen35-a", "qwen35", 0, {}),
        Model("qwen35-b", "qwen35", 1, {"linear_num_value_heads": 12, "tie_word_embeddings": True}),
        Model("qwen35moe-a", "qwen35moe", 0, EXPERTS),
        Model("qwen35moe-b", "qwen35moe", 1, EXPERTS | {"linear_num_value_heads": 12}),
    )
}
DENSE_QWEN3 = [name for name, model in MODELS.items() if model.architecture == "qwen3"]
#: The F32 files of the others are the truth of the rest: :func:`test_the_float32_path_is_exact` is theirs.
CASES = [(model, mix) for model in MODELS for mix in MIXES if mix != "F32" or model in DENSE_QWEN3]


class Files:
    """Every model in every mix, written when asked for, with its true logits."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = cache(self._folder)
        self.gguf = cache(self._gguf)
        self.truth = cache(self._truth)

    def _folder(self, model: str) -> Path:
        described = MODELS[model]
        return write_folder(self.root / model, described.architecture, seed=described.seed, **described.changes)

    def _gguf(self, model: str, mix: str) -> Path:
        return write_gguf(self.folder(model), self.root / f"{model}-{mix}.gguf", mixes.MIXES[mix])

    def _truth(self, model: str, mix: str) -> torch.Tensor:
        path = self.gguf(model, mix)
        weights = {
            t.name: np.array(gguf.dequantize(t.data, t.tensor_type), np.float32) for t in gguf.GGUFReader(path).tensors
        }
        if model not in DENSE_QWEN3:
            return computed(write_float32(path, weights), model)
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.folder(model)), dtype=torch.float32)
        state = {gguf_names.hf_name(name): torch.from_numpy(values) for name, values in weights.items()}
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
        theirs.load_state_dict(state)
        return exact_logits(theirs, token_ids(model))


def write_float32(source: Path, weights: dict[str, np.ndarray]) -> Path:
    """The same file with these values for its tensors."""
    metadata = {
        key: value if isinstance(value, (str, int, float)) else list(value)
        for key, value in GGUFFile(source).metadata.items()
    }
    path = source.with_name(f"{source.stem}-dequantised.gguf")
    with GGUFWriter(path, metadata) as writer:
        for name, values in weights.items():
            writer.add_tensor(name, types.F32, values.shape, values)
    return path


@torch.no_grad()
def exact_logits(theirs: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    return theirs.eval()(torch.tensor([ids])).logits[0].double()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("accuracy"))


@cache
def token_ids(model: str) -> list[int]:
    generator = torch.Generator().manual_seed(MODELS[model].seed)
    return torch.randint(0, 390, (NUM_TOKENS,), generator=generator).tolist()


def computed(path: Path, model: str, **options: Any) -> torch.Tensor:
    with LLM(path, max_model_len=256, max_num_seqs=1, **options) as llm:
        return llm.logits(token_ids(model)).double()


def nmse(got: torch.Tensor, truth: torch.Tensor) -> float:
    assert got.shape == truth.shape and truth.shape[0] == NUM_TOKENS
    error = float((got - truth).square().sum() / truth.square().sum())
    assert error == error, "NaN"
    return error


def bar_of(model: str, mix: str) -> float:
    return BARS[MODELS[model].architecture].of(mix)


@pytest.mark.parametrize(("model", "mix"), CASES)
def test_logits_of_a_file_meet_the_bar_of_its_type(files: Files, model: str, mix: str) -> None:
    """In the engine's own settings: integer activations for quantised matrices, float16 keys and values for all but F32."""
    if native_core() is None and MIXES[mix] != {"F32"}:
        pytest.skip("the twins multiply in float32 whatever the type: the F32 file says all about them")
    error = nmse(computed(files.gguf(model, mix), model), files.truth(model, mix))
    print(f"{model} {mix}: {error:.3g}")
    assert error <= bar_of(model, mix)
    assert error > 0, "nothing was rounded: this did not compare what it meant to"


@pytest.mark.parametrize("model", [model for model in MODELS if model not in DENSE_QWEN3])
def test_the_float32_path_is_exact(files: Files, model: str) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(files.folder(model), dtype=torch.float32)
    error = nmse(computed(files.gguf(model, "F32"), model), exact_logits(theirs, token_ids(model)))
    print(f"{model} F32: {error:.3g}")
    assert 0 < error <= bar_of(model, "F32")


@pytest.mark.parametrize("mix", MIXES)
def test_files_hold_the_types_of_their_mix(files: Files, mix: str) -> None:
    """As the ``gguf`` package reads them: otherwise the bar would be met by some other type."""
    for model in [model for model, of in CASES if of == mix]:
        reader = gguf.GGUFReader(files.gguf(model, mix))
        stored = {t.name: t.tensor_type.name for t in reader.tensors if len(t.shape) > 1}
        for small in ("ssm_conv1d", "ffn_gate_inp", "ffn_gate_inp_shexp"):
            stored = {name: kind for name, kind in stored.items() if f".{small}." not in name}
        head = stored.get("output.weight", stored["token_embd.weight"])
        expected = MIXES[mix] | ({"Q5_K"} if mix == "IQ4_XS" and "gqa4" in model else set())
        assert set(stored.values()) == expected | {head}
        assert head == {"Q5_K_M": "Q6_K", "Q4_K_M": "Q6_K", "Q4_0": "Q6_K", "IQ4_XS": "Q6_K"}.get(mix, mix)
        assert int(reader.fields["general.file_type"].contents()) == mixes.MIXES[mix].file_type


@pytest.mark.parametrize("mix", ["F32", "Q8_0", "Q4_K_M"])
def test_a_folder_and_its_file_are_as_accurate(files: Files, mix: str) -> None:
    """Quantising on loading gives what quantising to a file gives."""
    model = "qwen3-tied-gqa4-a"
    got = computed(files.folder(model), model, **({} if mix == "F32" else {"quant": mix}))
    assert torch.equal(got, computed(files.gguf(model, mix), model))


# --- known to be bad: each of these must break the bar -----------------------------------------------------------------


@pytest.mark.parametrize("model", DENSE_QWEN3)
def test_one_scale_for_the_activations_of_a_token_breaks_the_bar(
    files: Files, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = quant_matmul_twin.quant_matmul

    def coarse(x: torch.Tensor, parts: Any, *, norm_weight: Any = None, norm_eps: float = 0.0, **rest: Any) -> Any:
        if norm_weight is not None:
            x = quant_matmul_twin.rms_norm(x, norm_weight, norm_eps)
        scale = x.abs().amax(-1, keepdim=True) / 127
        return exact(torch.round(x / scale) * scale, parts, **rest)

    monkeypatch.setenv("HELEXA_OPS", "quant_matmul=reference")
    monkeypatch.setattr(quant_matmul_twin, "quant_matmul", coarse)
    error = nmse(computed(files.gguf(model, "Q8_0"), model), files.truth(model, "Q8_0"))
    assert bar_of(model, "Q8_0") < error < 2 * bar_of(model, "Q8_0"), "wrong, and near enough to be a fair test"


@pytest.mark.parametrize(
    ("model", "matrix"),
    [
        ("qwen3-untied-gqa1", "blk.3.attn_k.weight"),
        ("qwen3moe-a", "blk.1.ffn_up_exps.weight"),
        ("qwen3next-a", "blk.2.ffn_down_shexp.weight"),
        ("qwen35-a", "blk.1.ssm_out.weight"),
        ("qwen35moe-a", "blk.0.attn_qkv.weight"),
    ],
)
def test_swapped_nibbles_in_one_matrix_break_the_bar(files: Files, model: str, matrix: str, tmp_path: Path) -> None:
    path = files.gguf(model, "Q4_0")
    record = next(t for t in gguf.GGUFReader(path).tensors if t.name == matrix)
    content = np.fromfile(path, np.uint8)
    blocks = content[record.data_offset : record.data_offset + record.n_bytes].reshape(-1, 18)
    blocks[:, 2:] = blocks[:, 2:] >> 4 | blocks[:, 2:] << 4  # behind the two bytes of the scale
    content.tofile(tmp_path / "swapped.gguf")
    assert nmse(computed(tmp_path / "swapped.gguf", model), files.truth(model, "Q4_0")) > bar_of(model, "Q4_0")


def test_a_wrong_expert_breaks_the_bar(files: Files, tmp_path: Path) -> None:
    """Two of sixteen experts exchanged in one matrix of one layer of four."""
    path = files.gguf("qwen3moe-a", "Q8_0")
    record = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.3.ffn_up_exps.weight")
    content = np.fromfile(path, np.uint8)
    experts = content[record.data_offset : record.data_offset + record.n_bytes].reshape(EXPERTS["num_experts"], -1)
    experts[[0, 1]] = experts[[1, 0]]
    content.tofile(tmp_path / "exchanged.gguf")
    got, truth = computed(tmp_path / "exchanged.gguf", "qwen3moe-a"), files.truth("qwen3moe-a", "Q8_0")
    assert nmse(got, truth) > bar_of("qwen3moe-a", "Q8_0")
