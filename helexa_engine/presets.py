"""Models of known shape with random weights, as GGUF files or in memory: speed needs a shape, not a download.

Every block is valid and of natural size: codes are uniform random bytes and the scales are set so that a matrix of ``K``
columns has values of standard deviation ``1 / sqrt(K)``, which keeps activations finite and near 1. Random data,
never zeros: zeros run faster on real hardware.

Source of the shapes: the ``config.json`` of each published model.
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InvalidRequest
from .quant import dequantize, mixes, types
from .quant.mixes import Mix
from .quant.types import QuantType
from .weights import canonical, gguf_names
from .weights.checkpoint import Checkpoint
from .weights.gguf_writer import GGUFWriter
from .weights.raw_tensor import RawTensor

_CHUNK_VALUES = 1 << 23


@dataclass(frozen=True, slots=True)
class Preset:
    """The shape of a model; names as in HuggingFace's ``config.json``.

    ``architecture`` is GGUF's word. The delta net's heads have 128 dimensions, its convolution four taps; every fourth layer of a
    hybrid is full attention, of whose heads a quarter rotates. All this is the same in every release.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    tie_word_embeddings: bool
    head_dim: int = 128
    vocab_size: int = 151936
    max_position_embeddings: int = 40960
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    architecture: str = "qwen3"
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    linear_num_key_heads: int = 0
    linear_num_value_heads: int = 0

    @property
    def layer_types(self) -> list[str]:
        """The mixer of each layer."""
        if not self.linear_num_key_heads:
            return ["full_attention"] * self.num_hidden_layers
        kinds = ["linear_attention"] * (FULL_ATTENTION_INTERVAL - 1) + ["full_attention"]
        return [kinds[i % FULL_ATTENTION_INTERVAL] for i in range(self.num_hidden_layers)]


FULL_ATTENTION_INTERVAL = 4
LINEAR_HEAD_DIM = 128
CONV_KERNEL = 4


def _hybrid(
    hidden: int, layers: int, heads: int, kv_heads: int, feed_forward: int, key_heads: int, value_heads: int, *,
    tied: bool, **more: Any,
) -> Preset:  # fmt: skip
    """Qwen3.5's shape, with what ``more`` says otherwise."""
    made = Preset(
        hidden, layers, heads, kv_heads, feed_forward, tied, head_dim=256, vocab_size=248320, max_position_embeddings=262144,
        rope_theta=1e7, architecture="qwen35", linear_num_key_heads=key_heads, linear_num_value_heads=value_heads,
    )  # fmt: skip
    return dataclasses.replace(made, **more)


def _experts(count: int, per_token: int, width: int, shared_width: int = 0) -> dict[str, int]:
    return {
        "num_experts": count,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": shared_width,
    }


#: name -> shape. Those named ``tiny`` are no published models: they are for tests and for trying the tools out.
PRESETS = {
    "qwen3-tiny": Preset(256, 2, 4, 2, 512, tie_word_embeddings=True, head_dim=64, vocab_size=512),
    "qwen3-0.6b": Preset(1024, 28, 16, 8, 3072, tie_word_embeddings=True),
    "qwen3-1.7b": Preset(2048, 28, 16, 8, 6144, tie_word_embeddings=True),
    "qwen3-4b": Preset(2560, 36, 32, 8, 9728, tie_word_embeddings=True),
    "qwen3-8b": Preset(4096, 36, 32, 8, 12288, tie_word_embeddings=False),
    "qwen3-14b": Preset(5120, 40, 40, 8, 17408, tie_word_embeddings=False),
    "qwen3-32b": Preset(5120, 64, 64, 8, 25600, tie_word_embeddings=False),
    "qwen3-moe-tiny": Preset(
        256, 2, 4, 2, 512, tie_word_embeddings=False, head_dim=64, vocab_size=512, architecture="qwen3moe",
        **_experts(16, 4, 256),
    ),
    "qwen3-30b-a3b": Preset(
        2048, 48, 32, 4, 6144, tie_word_embeddings=False, architecture="qwen3moe", **_experts(128, 8, 768)
    ),
    "qwen3-next-80b-a3b": _hybrid(
        2048, 48, 16, 2, 5120, 16, 32, tied=False, architecture="qwen3next", vocab_size=151936, **_experts(512, 10, 512, 512)
    ),
    "qwen3.5-tiny": _hybrid(256, 4, 4, 2, 512, 2, 4, tied=True, head_dim=64, vocab_size=512),
    "qwen3.5-0.8b": _hybrid(1024, 24, 8, 2, 3584, 16, 16, tied=True),
    "qwen3.5-2b": _hybrid(2048, 24, 8, 2, 6144, 16, 16, tied=True),
    "qwen3.5-4b": _hybrid(2560, 32, 16, 4, 9216, 16, 32, tied=True),
    "qwen3.5-9b": _hybrid(4096, 32, 16, 4, 12288, 16, 32, tied=False),
    "qwen3.5-27b": _hybrid(5120, 64, 24, 4, 17408, 16, 48, tied=False),
    "qwen3.5-35b-a3b": _hybrid(
        2048, 40, 16, 2, 0, 16, 32, tied=False, architecture="qwen35moe", **_experts(256, 8, 512, 512)
    ),
}  # fmt: skip


def preset(name: str) -> Preset:
    """The preset of this name. Raises :class:`InvalidRequest`."""
    if name not in PRESETS:
        raise InvalidRequest("preset", f"expected one of {', '.join(PRESETS)}; got {name!r}")
    return PRESETS[name]


# --- random blocks ----------------------------------------------------------------------------------------------------

#: quantised type -> block layout, and the value of its minimum's field for a scale of 1 that makes the mean zero.
_BLOCKS: dict[QuantType, tuple[np.dtype[Any], float]] = {
    types.Q4_0: (dequantize.Q4_0_BLOCK, 0.0),
    types.Q4_1: (dequantize.Q4_1_BLOCK, -7.5),
    types.Q5_0: (dequantize.Q5_0_BLOCK, 0.0),
    types.Q5_1: (dequantize.Q5_1_BLOCK, -15.5),
    types.Q8_0: (dequantize.Q8_0_BLOCK, 0.0),
    types.Q2_K: (dequantize.Q2_K_BLOCK, 1.5),
    types.Q3_K: (dequantize.Q3_K_BLOCK, 0.0),
    types.Q4_K: (dequantize.Q4_K_BLOCK, 7.5),
    types.Q5_K: (dequantize.Q5_K_BLOCK, 15.5),
    types.Q6_K: (dequantize.Q6_K_BLOCK, 0.0),
    types.IQ4_NL: (dequantize.IQ4_NL_BLOCK, 0.0),
    types.IQ4_XS: (dequantize.IQ4_XS_BLOCK, 0.0),
}


def random_values(quant_type: QuantType, count: int, std: float, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """The bytes of ``count`` random values of mean 0 and standard deviation ``std`` in this type.

    ``count`` is a multiple of the block size. Raises :class:`InvalidRequest` for a type that presets do not write.
    """
    if quant_type in _BLOCKS:
        raw = _random_blocks(quant_type, count // quant_type.block_size, std / _unit_std(quant_type), rng)
        return raw.view(np.uint8)
    values = rng.standard_normal(count, dtype=np.float32) * np.float32(std)
    if quant_type is types.F32:
        return values.view(np.uint8)
    if quant_type is types.F16:
        return values.astype("<f2").view(np.uint8)
    if quant_type is types.BF16:
        return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    raise InvalidRequest("quant", f"presets are not written in {quant_type.name}")


def _random_blocks(
    quant_type: QuantType, count: int, scale: float, rng: np.random.Generator
) -> np.ndarray[Any, np.dtype[np.void]]:
    layout, minimum = _BLOCKS[quant_type]
    words = rng.integers(0, 2**64, size=-(-count * quant_type.block_bytes // 8), dtype=np.uint64)
    blocks = words.view(np.uint8)[: count * quant_type.block_bytes].view(layout)
    blocks["d"] = scale
    for field in ("m", "dmin"):
        if field in (layout.names or ()):
            blocks[field] = minimum * scale
    return blocks


@cache
def _unit_std(quant_type: QuantType) -> float:
    """The standard deviation of random blocks whose scale is 1, measured with the decoder that defines the type."""
    blocks = _random_blocks(quant_type, 2048, 1.0, np.random.default_rng(0))
    return float(dequantize.dequantize(quant_type, blocks.view(np.uint8), [2048 * quant_type.block_size]).std())


# --- the file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the file: shape in torch order, and the mean and standard deviation of its values."""

    name: str
    shape: tuple[int, ...]
    quant_type: QuantType
    mean: float
    std: float

    @property
    def nbytes(self) -> int:
        return self.quant_type.row_bytes(self.shape[-1]) * math.prod(self.shape[:-1])


def _full_attention(shape: Preset) -> dict[str, tuple[int, ...]]:
    hidden, gated = shape.hidden_size, bool(shape.linear_num_key_heads)
    q_size, kv_size = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    return {
        "attn_q.weight": (q_size * (2 if gated else 1), hidden),
        "attn_k.weight": (kv_size, hidden),
        "attn_v.weight": (kv_size, hidden),
        "attn_q_norm.weight": (shape.head_dim,),
        "attn_k_norm.weight": (shape.head_dim,),
        "attn_output.weight": (hidden, q_size),
    }


def _delta_net(shape: Preset) -> dict[str, tuple[int, ...]]:
    hidden, value_heads = shape.hidden_size, shape.linear_num_value_heads
    v_size = value_heads * LINEAR_HEAD_DIM
    channels = 2 * shape.linear_num_key_heads * LINEAR_HEAD_DIM + v_size
    gates: dict[str, tuple[int, ...]] = (
        {"ssm_ba.weight": (2 * value_heads, hidden)}
        if shape.architecture == "qwen3next"
        else {"ssm_beta.weight": (value_heads, hidden), "ssm_alpha.weight": (value_heads, hidden)}
    )
    return {
        "attn_qkv.weight": (channels, hidden),
        "attn_gate.weight": (v_size, hidden),
        "ssm_conv1d.weight": (channels, CONV_KERNEL),
        "ssm_a": (value_heads,),
        "ssm_dt.bias": (value_heads,),
        **gates,
        "ssm_norm.weight": (LINEAR_HEAD_DIM,),
        "ssm_out.weight": (hidden, v_size),
    }


def _feed_forward(shape: Preset) -> dict[str, tuple[int, ...]]:
    hidden, experts, width = shape.hidden_size, shape.num_experts, shape.moe_intermediate_size
    if not experts:
        return {
            "ffn_gate.weight": (shape.intermediate_size, hidden),
            "ffn_up.weight": (shape.intermediate_size, hidden),
            "ffn_down.weight": (hidden, shape.intermediate_size),
        }
    sparse: dict[str, tuple[int, ...]] = {
        "ffn_gate_inp.weight": (experts, hidden),
        "ffn_gate_exps.weight": (experts, width, hidden),
        "ffn_up_exps.weight": (experts, width, hidden),
        "ffn_down_exps.weight": (experts, hidden, width),
    }
    if shared := shape.shared_expert_intermediate_size:
        sparse |= {
            "ffn_gate_inp_shexp.weight": (hidden,),
            "ffn_gate_shexp.weight": (shared, hidden),
            "ffn_up_shexp.weight": (shared, hidden),
            "ffn_down_shexp.weight": (hidden, shared),
        }
    return sparse


def _distribution(stem: str, dims: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values: matrices keep the size of what they are applied to."""
    if stem.endswith("norm.weight"):
        return 1.0, 0.1
    special = {"ssm_a": (-1.0, 0.1), "ssm_dt.bias": (0.0, 0.1)}  # ssm_a is negative: the state decays
    return special.get(stem, (0.0, dims[-1] ** -0.5))


def tensors(shape: Preset, mix: Mix) -> list[Tensor]:
    """All tensors of the model in the types that ``mix`` gives them."""
    hidden, layer_types = shape.hidden_size, shape.layer_types
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (shape.vocab_size, hidden),
        "output_norm.weight": (hidden,),
    }
    if not shape.tie_word_embeddings:
        shapes["output.weight"] = (shape.vocab_size, hidden)
    second_norm = "post_attention_norm.weight" if shape.linear_num_key_heads else "ffn_norm.weight"
    for i, kind in enumerate(layer_types):
        layer: dict[str, tuple[int, ...]] = {"attn_norm.weight": (hidden,), second_norm: (hidden,)}
        layer |= _delta_net(shape) if kind == "linear_attention" else _full_attention(shape)
        shapes |= {f"blk.{i}.{stem}": dims for stem, dims in (layer | _feed_forward(shape)).items()}
    gqa_ratio = shape.num_attention_heads // shape.num_key_value_heads

    def quant_type(name: str, dims: tuple[int, ...]) -> QuantType:
        hf_name = gguf_names.hf_name(name, layer_types)
        assert hf_name is not None
        return mixes.quant_type_for(
            mix,
            hf_name,
            dims,
            num_layers=shape.num_hidden_layers,
            gqa_ratio=gqa_ratio,
            tied=shape.tie_word_embeddings,
        )

    return [
        Tensor(name, dims, quant_type(name, dims), *_distribution(re.sub(r"^blk\.\d+\.", "", name), dims))
        for name, dims in shapes.items()
    ]


_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>")
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _byte_tokens() -> list[str]:
    """GPT-2's printable stand-ins of the 256 bytes, in the order of the bytes."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), ord("\xff") + 1)]
    moved = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(moved)) for byte in range(256)]


def _token_types(shape: Preset) -> list[int]:
    """GGUF's kind of every token of :func:`_metadata`, in order."""
    special = [_CONTROL] * 3 + [_USER_DEFINED] * 4
    num_normal = 256 + 1
    return [_NORMAL] * num_normal + [_UNUSED] * (shape.vocab_size - num_normal - len(special)) + special


def _metadata(name: str, shape: Preset, mix: Mix) -> dict[str, Any]:
    """The file's metadata: hyperparameters, and a byte-level tokenizer padded to the vocabulary."""
    by_bytes = _byte_tokens()
    padding = shape.vocab_size - len(by_bytes) - len(_SPECIAL_TOKENS) - 1
    tokens = [*by_bytes, "he", *(f"[PAD{i}]" for i in range(padding)), *_SPECIAL_TOKENS]
    first_special = shape.vocab_size - len(_SPECIAL_TOKENS)
    hyperparameters = {f"{shape.architecture}.{key}": value for key, value in _hyperparameters(shape).items()}
    return {
        "general.architecture": shape.architecture,
        "general.name": f"{name} with random weights",
        "general.file_type": mix.file_type,
        **hyperparameters,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen35" if shape.architecture.startswith("qwen35") else "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.eos_token_id": first_special + 2,
        "tokenizer.ggml.padding_token_id": first_special,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": _CHAT_TEMPLATE,
    }


def _hyperparameters(shape: Preset) -> dict[str, Any]:
    """The architecture's own metadata, without its prefix."""
    values: dict[str, Any] = {
        "block_count": shape.num_hidden_layers,
        "context_length": shape.max_position_embeddings,
        "embedding_length": shape.hidden_size,
        "attention.head_count": shape.num_attention_heads,
        "attention.head_count_kv": shape.num_key_value_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": shape.rms_norm_eps,
        "rope.freq_base": shape.rope_theta,
    }
    if shape.intermediate_size:
        values["feed_forward_length"] = shape.intermediate_size
    if shape.num_experts:
        values |= {
            "expert_count": shape.num_experts,
            "expert_used_count": shape.num_experts_per_tok,
            "expert_feed_forward_length": shape.moe_intermediate_size,
        }
    if shape.shared_expert_intermediate_size:
        values["expert_shared_feed_forward_length"] = shape.shared_expert_intermediate_size
    if shape.linear_num_key_heads:
        values |= {
            "ssm.conv_kernel": CONV_KERNEL,
            "ssm.state_size": LINEAR_HEAD_DIM,
            "ssm.group_count": shape.linear_num_key_heads,
            "ssm.time_step_rank": shape.linear_num_value_heads,
            "ssm.inner_size": shape.linear_num_value_heads * LINEAR_HEAD_DIM,
            "full_attention_interval": FULL_ATTENTION_INTERVAL,
            "rope.dimension_count": shape.head_dim // 4,
        }
    if shape.architecture.startswith("qwen35"):
        pairs = shape.head_dim // 8
        third = -(-pairs // 3)
        values["rope.dimension_sections"] = [third, third, pairs - 2 * third, 0]  # llama.cpp insists on them
    return values


def write_preset_gguf(
    path: Path, name: str, quant: str, *, seed: int = 0, progress: Callable[[float], None] | None = None
) -> None:
    """Writes preset ``name`` in the mix ``quant`` (``Q4_K_M``). The same arguments give the same file.

    Tensors are drawn and written piece by piece, so memory stays small whatever the model's size; ``path`` appears only when it
    is complete. ``progress`` is told the share written, 0 to 1.

    Raises:
        InvalidRequest: no such preset or no such mix.
    """
    shape, mix = preset(name), mixes.by_name(quant)
    if mix is None:
        raise InvalidRequest("quant", f"expected one of {', '.join(mixes.MIXES)}; got {quant!r}")
    listed = tensors(shape, mix)
    total, written = sum(tensor.nbytes for tensor in listed), 0

    def pieces(tensor: Tensor) -> Iterator[npt.NDArray[np.uint8]]:
        nonlocal written
        for piece in _pieces(tensor, seed):
            yield piece
            written += piece.nbytes
            if progress is not None:
                progress(written / total)

    with GGUFWriter(path, _metadata(name, shape, mix)) as writer:
        writer.add_metadata("tokenizer.ggml.token_type", _token_types(shape), "int32")  # llama.cpp reads no other
        for tensor in listed:
            writer.add_tensor(tensor.name, tensor.quant_type, tensor.shape, partial(pieces, tensor))


def _pieces(tensor: Tensor, seed: int) -> Iterator[npt.NDArray[np.uint8]]:
    """The tensor's bytes, a few million values at a time."""
    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(tensor.name.encode())]))
    if tensor.quant_type is types.F32:
        values = rng.standard_normal(tensor.shape, dtype=np.float32)
        yield (np.float32(tensor.mean) + np.float32(tensor.std) * values).reshape(-1).view(np.uint8)
        return
    cols = tensor.shape[-1]
    rows_at_once = max(1, _CHUNK_VALUES // cols)
    all_rows = math.prod(tensor.shape[:-1])
    for row in range(0, all_rows, rows_at_once):
        rows = min(rows_at_once, all_rows - row)
        yield random_values(tensor.quant_type, rows * cols, tensor.std, rng)


# --- without a file ---------------------------------------------------------------------------------------------------


class PresetCheckpoint(Checkpoint):
    """The model that :func:`write_preset_gguf` writes, without the file: for models that are larger than a disk, and to be loaded at once.

    Tensors of one type and size of values are the same random blocks, as many as each needs; they lie in memory once. So how fast it
    loads says nothing.

    Raises:
        InvalidRequest: no such preset or no such mix.
    """

    def __init__(self, name: str, quant: str, *, seed: int = 0) -> None:
        shape, mix = preset(name), mixes.by_name(quant)
        if mix is None:
            raise InvalidRequest("quant", f"expected one of {', '.join(mixes.MIXES)}; got {quant!r}")
        self.path = Path(f"{name}-{quant.upper()}")
        self.architecture = shape.architecture
        said = {**_metadata(name, shape, mix), "tokenizer.ggml.token_type": np.array(_token_types(shape))}
        # As a file holds numbers.
        self.metadata = {key: float(np.float32(v)) if isinstance(v, float) else v for key, v in said.items()}
        self.generation_config = gguf_names.generation_config(self.metadata, self.where)
        self.chat_template = _CHAT_TEMPLATE
        self.config = gguf_names.hf_config(self.metadata, shape.vocab_size, shape.tie_word_embeddings, self.where)
        self.unused = {}
        self._seed = seed
        self._largest: dict[tuple[QuantType, float], int] = {}
        self._blocks: dict[tuple[QuantType, float], npt.NDArray[np.uint8]] = {}
        listed = tensors(shape, mix)
        self.nbytes = sum(tensor.nbytes for tensor in listed)
        for tensor in listed:
            key = tensor.quant_type, tensor.std
            self._largest[key] = max(self._largest.get(key, 0), tensor.nbytes)
        stored = [
            RawTensor(tensor.name, tensor.quant_type, tensor.shape, partial(self._made, tensor), (tensor.name,))
            for tensor in listed
        ]
        renamed = [raw.presented(gguf_names.hf_name(raw.name, shape.layer_types) or raw.name) for raw in stored]
        self._tensors = canonical.split(self.config, renamed, self.where)

    def _made(self, tensor: Tensor) -> npt.NDArray[np.uint8]:
        if len(tensor.shape) == 1 or tensor.quant_type is types.F32:  # small, and each has a mean of its own
            return np.concatenate(list(_pieces(tensor, self._seed)))
        key = tensor.quant_type, tensor.std
        if key not in self._blocks:
            rng = np.random.Generator(np.random.SFC64([self._seed, len(self._blocks)]))
            block = tensor.quant_type.block_size
            values = min(_CHUNK_VALUES, self._largest[key] // tensor.quant_type.block_bytes * block)
            drawn = random_values(tensor.quant_type, values // block * block, tensor.std, rng)
            self._blocks[key] = np.resize(drawn, self._largest[key])  # again and again: speed does not tell
        return self._blocks[key][: tensor.nbytes]

    def _release_stored(self, name: str) -> None:
        return None  # what it shares with others is needed again
