"""Attention, feed-forward, linear, embedding and norm against HuggingFace's Qwen3 layers, in float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding

from helexa_engine.batch import Batch
from helexa_engine.cache.spec import AttentionCacheSpec
from helexa_engine.layers.attention import Attention
from helexa_engine.layers.embedding import Embedding
from helexa_engine.layers.linear import Linear
from helexa_engine.layers.mlp import GatedMLP
from helexa_engine.layers.norm import RMSNorm
from helexa_engine.layers.rotary import rotary_table
from helexa_engine.quant import types

HIDDEN, EPS = 64, 1e-6


@dataclass
class Raw:
    name: str
    quant_type: types.QuantType
    shape: tuple[int, ...]
    data: np.ndarray
    scales: tuple[float, ...] = ()


def raw(name: str, value: torch.Tensor) -> Raw:
    array = value.detach().contiguous().numpy()
    return Raw(name, types.F32, array.shape, array.reshape(-1).view(np.uint8))


def load(slots, state: dict[str, torch.Tensor]) -> None:
    assert set(slots) == set(state)
    for name, slot in slots.items():
        assert slot.shape == tuple(state[name].shape)
        slot.load(raw(name, state[name]))


def randomise(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name or parameter.dim() == 1 else 0.2 * noise)


def norm() -> tuple[Qwen3RMSNorm, RMSNorm]:
    theirs, ours = Qwen3RMSNorm(HIDDEN, EPS), RMSNorm("norm.weight", HIDDEN, EPS)
    randomise(theirs)
    load(ours.slots(), {"norm.weight": theirs.weight})
    return theirs, ours


def inputs(rows: int) -> torch.Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 32), (4, 1, 16), (2, 2, 48)])
@torch.no_grad()
def test_attention(heads: int, kv_heads: int, head_dim: int, rows: int) -> None:
    config = Qwen3Config(
        hidden_size=HIDDEN, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, rms_norm_eps=EPS
    )
    config._attn_implementation = "eager"
    theirs, (their_norm, our_norm) = Qwen3Attention(config, 0), norm()
    randomise(theirs)
    theta = config.rope_parameters["rope_theta"]
    ours = Attention(
        "a", 0, hidden_size=HIDDEN, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, eps=EPS,
        rotary=rotary_table(head_dim, 128, theta),
    )  # fmt: skip
    load(ours.slots(), {f"a.{name}": value for name, value in theirs.state_dict().items()})

    x = inputs(rows)
    positions = torch.arange(rows)
    mask = torch.full((rows, rows), float("-inf")).triu(1)[None, None]
    rotary = Qwen3RotaryEmbedding(config)(x, positions[None])
    expected = x + theirs(their_norm(x)[None], rotary, mask)[0][0]

    cache = AttentionCacheSpec(kv_heads, head_dim, "float32").allocate(3)
    cache.k.fill_(float("nan")), cache.v.fill_(float("nan"))
    pages = torch.tensor([2, 0])
    batch = Batch(
        input_ids=torch.zeros(rows, dtype=torch.int64),
        positions=positions,
        cu_seqlens=torch.tensor([0, rows], dtype=torch.int32),
        slot_mapping=pages[positions // 64] * 64 + positions % 64,
        page_tables=pages[None].int(),
        seq_lens=torch.tensor([rows], dtype=torch.int32),
        state_slots=torch.arange(1, dtype=torch.int32),
        caches=[cache],
    )
    stream = x.clone()
    got = ours(stream, our_norm, batch)
    assert got is stream, "the residual stream is updated in place"
    assert (got - expected).abs().max() <= 1e-5
    assert (got - x).abs().max() > 0.1, "the block does something"


@pytest.mark.parametrize("rows", [1, 3, 70])
@torch.no_grad()
def test_mlp(rows: int) -> None:
    theirs, (their_norm, our_norm) = Qwen3MLP(Qwen3Config(hidden_size=HIDDEN, intermediate_size=96)), norm()
    randomise(theirs)
    ours = GatedMLP("m", HIDDEN, 96)
    load(ours.slots(), {f"m.{name}": value for name, value in theirs.state_dict().items()})
    x = inputs(rows)
    expected = x + theirs(their_norm(x))
    stream = x.clone()
    assert ours(stream, our_norm) is stream
    assert (stream - expected).abs().max() <= 1e-5
    assert (stream - x).abs().max() > 0.1


def test_parts_of_a_linear_stand_side_by_side_each_in_its_own_type() -> None:
    generator = torch.Generator().manual_seed(2)
    first, second = torch.randn(32, HIDDEN, generator=generator), torch.randn(16, HIDDEN, generator=generator).half()
    linear = Linear([("first", 32), ("second", 16)], HIDDEN)
    slots = linear.slots()
    slots["second"].load(Raw("second", types.F16, (16, HIDDEN), second.numpy().reshape(-1).view(np.uint8)))
    slots["first"].load(raw("first", first))
    x = inputs(5)
    expected = torch.cat([x @ first.T, x @ second.float().T], dim=1)
    error = (linear(x) - expected).abs()
    assert error[:, :32].max() <= 1e-4
    assert error[:, 32:].max() <= 0.2  # 16-bit types may multiply 16-bit activations


def test_a_tied_head_is_the_embedding_table() -> None:
    table = torch.randn(48, HIDDEN, generator=torch.Generator().manual_seed(3))
    embedding = Embedding("table", 48, HIDDEN)
    embedding.slots()["table"].load(raw("table", table))
    assert torch.equal(embedding(torch.tensor([47, 0, 5])), table[[47, 0, 5]])
    x = inputs(4)
    head = Linear.tied(embedding.parameter)
    assert (head(x) - x @ table.T).abs().max() <= 1e-4


@pytest.mark.parametrize("token", [-1, 48])
def test_a_token_outside_the_table_is_an_error(token: int) -> None:
    embedding = Embedding("table", 48, HIDDEN)
    embedding.slots()["table"].load(raw("table", torch.zeros(48, HIDDEN)))
    with pytest.raises(ValueError, match="ids"):
        embedding(torch.tensor([0, token]))
